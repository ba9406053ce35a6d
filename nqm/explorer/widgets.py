"""The controls: ipywidgets over `Exploration`, in a notebook or in a browser."""

from __future__ import annotations

import base64
import html
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nqm.errors import NQMError, check_installed
from nqm.explorer.settings import (
    METHODS,
    NOISE,
    WITH_MEMBERS,
    Exploration,
    problem_of_file,
    problem_table,
)
from nqm.problems.quadratic import Problem

if TYPE_CHECKING:
    from ipywidgets import Widget

#: Spectra that need no file, by what the list shows.
SPECTRA: dict[str, dict[str, Any]] = {
    "harmonic, 1 / i": {"name": "harmonic", "directions": 200},
    "power law, 1 / i^1.5": {"name": "power_law", "directions": 200, "exponent": 1.5},
    "log-uniform": {"name": "log_uniform", "directions": 200},
}
_WIDE = {"description_width": "9em"}


def explore(problem: Problem | Mapping[str, Any] | None = None) -> Widget:
    """Show controls over SGD until T0, and a method with members or averages after it.

    Needs the extra ``notebook``. The command ``nqm explore`` shows the same in a browser.

    Parameters
    ----------
    problem : Problem or mapping, optional
        Your own problem, or the table [problem] of a configuration file. By default the controls
        offer three spectra with noise C = H, and take a file of your own; C = H there as well,
        unless it has a column ``noise_variance``.

    Returns
    -------
    Widget
        At the end of a notebook's cell it shows itself. ``widget.settings`` is what the controls
        state, an `nqm.explorer.settings.Exploration`; ``widget.words`` what stands below the
        pictures.

    Raises
    ------
    NQMError
        If ipywidgets or Matplotlib is missing, or the problem has correlated directions.
    """
    check_installed("nqm.explore", "notebook", "ipywidgets", "matplotlib")
    return _Controls(problem).box


class _Controls:
    """Widgets, and what is computed when one of them changes."""

    def __init__(self, problem: Problem | Mapping[str, Any] | None):
        import ipywidgets as w

        self.quiet = False
        self.own = problem_table(problem) if isinstance(problem, Problem) else problem
        self.folder = Path()
        self.files: tempfile.TemporaryDirectory[str] | None = None
        names = ["your problem"] if self.own is not None else list(SPECTRA)
        self.spectrum = w.Dropdown(options=names, description="problem", style=_WIDE)
        self.upload = w.FileUpload(
            accept=".csv,.parquet,.npy", multiple=False, description="own spectrum"
        )
        self.method = w.Dropdown(options=list(METHODS), description="after T0", style=_WIDE)
        quiet = {"continuous_update": False, "style": _WIDE}
        self.members = w.IntSlider(10, 1, 64, description="members K", **quiet)
        self.gamma = w.Dropdown(options=["mean", "sum"], description="gamma", style=_WIDE)
        rate = {"base": 10, "min": -5, "max": 2, "step": 0.05, "readout_format": ".3g", **quiet}
        self.first_lr = w.FloatLogSlider(0.5, description="rate before T0", **rate)
        self.later_lr = w.FloatLogSlider(0.1, description="rate after T0", **rate)
        self.batch_size = w.IntSlider(8, 1, 128, description="batch size B", **quiet)
        self.switch = w.IntSlider(400, 0, 2000, 50, description="T0, steps of SGD", **quiet)
        self.later = w.IntSlider(400, 50, 2000, 50, description="minibatches after", **quiet)
        self.picture = w.Image(format="png")
        self.picture.layout.max_width = "100%"
        self.text, self.file = w.HTML(), w.HTML()
        left = w.VBox([self.spectrum, self.upload, self.batch_size, self.first_lr, self.switch])
        right = w.VBox([self.method, self.members, self.gamma, self.later_lr, self.later])
        controls = w.HBox([left, right], layout=w.Layout(flex_flow="row wrap"))
        self.box = w.VBox([controls, self.text, self.picture, self.file])
        for one in self._inputs():
            one.observe(self._changed, "value")
        self._scale()
        self._show()

    def _inputs(self) -> tuple[Any, ...]:
        return (
            self.spectrum, self.upload, self.method, self.members, self.gamma, self.first_lr,
            self.later_lr, self.batch_size, self.switch, self.later,
        )  # fmt: skip

    def _changed(self, change: Mapping[str, Any]) -> None:
        if change["owner"] is self.upload:
            self._take_file()
        elif change["owner"] is self.spectrum:
            self._scale()
            self._show()
        elif not self.quiet:
            self._show()

    def _scale(self) -> None:
        """Set rates that suit the problem's largest curvature."""
        try:
            sharpest = self._settings().sharpest
        except NQMError:
            return  # `_show` says what is wrong with the problem
        self.quiet = True
        self.first_lr.value, self.later_lr.value = 0.5 / sharpest, 0.1 / sharpest
        self.quiet = False

    def _take_file(self) -> None:
        """Keep an uploaded spectrum, and choose it."""
        (one,) = self.upload.value
        self.files = self.files or tempfile.TemporaryDirectory(prefix="nqm-explore-")
        self.folder = Path(self.files.name)
        name = Path(one["name"]).name
        (self.folder / name).write_bytes(bytes(one["content"]))
        options = [*(n for n in self.spectrum.options if not n.startswith("file ")), f"file {name}"]
        self.spectrum.value = options[0]  # so that a file of the same name counts as another
        self.spectrum.options = options
        self.spectrum.value = options[-1]  # which shows it

    def _problem(self) -> Mapping[str, Any]:
        chosen = self.spectrum.value
        if chosen.startswith("file "):
            name = chosen.removeprefix("file ")
            return problem_of_file(self.folder / name, name)
        if self.own is not None:
            return self.own
        return {"spectrum": SPECTRA[chosen], "noise": NOISE}

    def _settings(self) -> Exploration:
        names = ("method", "members", "gamma", "first_lr", "later_lr", "batch_size", "switch",
                 "later")  # fmt: skip
        values = {name: getattr(self, name).value for name in names}
        return Exploration(problem=self._problem(), folder=self.folder, **values)

    def _show(self) -> None:
        """Compute, draw and say; a mistake is said in place of a picture."""
        self.members.disabled = self.method.value not in WITH_MEMBERS
        self.gamma.disabled = self.method.value != "late_phase"
        try:
            settings = self._settings()
            words = settings.words()
            picture = _picture(settings)
            self.file.value = _link(settings.toml())
        except NQMError as error:
            self.text.value = f"<p><b>{html.escape(str(error))}</b></p>"
            self.box.settings, self.box.words = None, [str(error)]
            return
        self.picture.value = picture
        self.text.value = "".join(f"<p>{html.escape(line)}</p>" for line in words)
        self.box.settings, self.box.words = settings, words


def _picture(settings: Exploration) -> bytes:
    """The two pictures as one PNG."""
    from figures import explore as pictures
    from figures import style

    with style.context():
        figure = style.new_figure(style.PAGE, 2.6)
        left, right = figure.subplots(1, 2)
        pictures.over_examples(settings.curves(), ax=left)
        pictures.against_rate(settings.rates(), settings.later_lr, settings.size, ax=right)
        content = io.BytesIO()
        figure.savefig(content, format="png")
    return content.getvalue()


def _link(text: str) -> str:
    """A link that saves a text as a file, and the text folded below it."""
    coded = base64.b64encode(text.encode()).decode()
    return (
        f'<p><a download="explored.toml" href="data:text/plain;base64,{coded}">Save as '
        "explored.toml</a> for <code>nqm run explored.toml</code></p>"
        f"<details><summary>the file</summary><pre>{html.escape(text[:4000])}</pre></details>"
    )
