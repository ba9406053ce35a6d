"""One self-contained HTML page: every picture, its parameters, what it shows and its claims."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from nqm.files import replacing
from paper_repro.build import Built
from paper_repro.study import GROUPS, ZHANG2019, passed

#: Symbols as the texts of a figure write them, and as the page shows them.
_AS_SHOWN = (
    ("eta_phi", "&eta;<sub>&phi;</sub>"),
    ("eta_theta", "&eta;<sub>&theta;</sub>"),
    ("eta", "&eta;"),
    ("lambda", "&lambda;"),
    ("gamma", "&gamma;"),
    ("sigma^2", "&sigma;<sup>2</sup>"),
    ("h_i", "h<sub>i</sub>"),
    ("&lt;=", "&le;"),
    ("&gt;=", "&ge;"),
)
_SYMBOLS = dict(_AS_SHOWN)
_SYMBOL = re.compile("|".join(rf"(?<!\w){re.escape(one)}(?!\w)" for one in _SYMBOLS))


def symbols(text: str) -> Markup:
    """Show a text's symbols as such.

    Parameters
    ----------
    text : str
        Plain text, e.g. ``"lambda = eta_phi + gamma K eta_theta"``.

    Returns
    -------
    Markup
        Escaped.
    """
    shown = _SYMBOL.sub(lambda at: _SYMBOLS[at[0]], str(escape(text)))
    return Markup(re.sub(r"\bT(\d)\b", r"T<sub>\1</sub>", shown))


def report_name(figures: Sequence[str]) -> str:
    """Return the file name, without its suffix, of the page with these figures.

    Parameters
    ----------
    figures : sequence of str
        Names of the figures.

    Returns
    -------
    str
        ``report`` for the group ``all``, the name of another group, or that of a single figure: no
        page takes another one's place.
    """
    given = tuple(figures)
    groups = {tuple(names): group for group, names in GROUPS.items()}
    return "report" if given == tuple(GROUPS["all"]) else groups.get(given, "_".join(given))


def write_report(built: Sequence[Built], out: Path) -> Path:
    """Write one HTML page with all figures, all or nothing.

    Parameters
    ----------
    built : sequence of Built
        The figures, in the order of the page.
    out : Path
        Folder of the page; `report_name` gives its file name.

    Returns
    -------
    Path
        Path of the page.
    """
    names = [one.name for one in built]
    name = report_name(names)
    template = "zhang2019" if all(one in ZHANG2019 for one in names) else "report"
    environment = Environment(
        loader=PackageLoader("paper_repro"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["symbols"] = symbols
    figures = [
        {
            "name": one.name,
            "title": one.study.TITLE,
            "summary": one.study.SUMMARY,
            "image": base64.b64encode(one.png.read_bytes()).decode(),
            "settings": {key: _shown(value) for key, value in one.metadata["settings"].items()},
            "claims": [vars(claim) | {"measured": f"{claim.measured:.4g}"} for claim in one.claims],
            "key": one.metadata["key"],
            "files": [one.pdf.name, one.png.name, one.png.with_suffix(".parquet").name],
            "rows": len(one.table),
        }
        for one in built
    ]
    claims = [claim for one in built for claim in one.claims]
    page = environment.get_template(f"{template}.html.j2").render(
        figures=figures,
        version=built[0].metadata["version"],
        scale=built[0].metadata["scale"],
        passed=passed(claims),
        total=len(claims),
    )
    path = out / f"{name}.html"
    with replacing(path) as stream:
        stream.write(page.encode())
    return path


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
