"""The site: ``make docs`` builds it under ``out/site`` and treats every warning as an error."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

import nqm

OURS = ("nqm.", "neural.", "figures.", "paper_repro.")

project = "late-phase-nqm"
author = "the authors of late-phase-nqm"
version = release = nqm.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "_templates", "examples"]
templates_path = ["_templates"]
#: A name in single backticks becomes a link where it is one of ours, and stays code elsewhere.
default_role = "py:obj"

# Pages are Markdown that a code host shows as well: its dialect of formulas and anchors.
myst_enable_extensions = ["attrs_block", "deflist", "dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4

# Signatures show types; a parameter's section, where there is one, says what they mean.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {
    name: name
    for name in ("ArrayLike", "FloatArray", "NDArray", "Progress", "Function", "LinearOperator")
}
python_maximum_signature_line_length = 88
numpydoc_show_class_members = False

# A name of ours that does not exist is an error. Other names are not asked: parameters and formulas
# in single backticks, and other libraries' types.
nitpicky = True
nitpick_ignore_regex = [("py:.*", rf"(?!{'|'.join(OURS)}).*")]

html_theme = "furo"
html_title = f"late-phase-nqm {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False


def _mathml(self: Any, node: Any, display: str) -> None:
    """A formula as MathML, which browsers draw by themselves: no script, no network."""
    from docutils.nodes import SkipNode
    from latex2mathml.converter import convert

    formula = convert(node.astext(), display=display)
    self.body.append(f'<div class="math">{formula}</div>' if display == "block" else formula)
    raise SkipNode


def _exists(app: Any, env: Any, node: Any, content: Any) -> Any:
    """A name of ours without an entry in the reference stays code, if it can be imported."""
    name = node.get("reftarget") or ""
    if not name.startswith(OURS):
        return None
    try:
        resolve_name(name)
    except (ImportError, AttributeError):
        return None
    return content


def _open_branch(app: Any, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """The sidebar shows all pages, and names of the API on pages of the reference only.

    The theme's own has every name on every page, which takes a third of the time of the build.
    """
    if whole := context.get("toctree"):
        context["toctree"] = lambda **options: whole(**{**options, "collapse": True})


def setup(app: Any) -> None:
    """Register the renderer of formulas, the look-up of names, and the sidebar."""
    app.connect("missing-reference", _exists)
    app.connect("html-page-context", _open_branch, priority=400)  # the theme's own has 500
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda self, node: _mathml(self, node, "inline"), None),
        block_renderers=(lambda self, node: _mathml(self, node, "block"), None),
    )
