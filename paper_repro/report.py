"""One self-contained HTML page: every picture, its parameters, what it shows and its claims."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from nqm.files import replacing
from paper_repro.build import Built
from paper_repro.study import ZHANG2019, passed


def report_name(figures: Sequence[str]) -> str:
    """Return the file name, without its suffix, of the page with these figures.

    Parameters
    ----------
    figures : sequence of str
        Names of the figures.

    Returns
    -------
    str
        ``zhang2019`` if all figures are from that paper, else ``report``.
    """
    return "zhang2019" if all(name in ZHANG2019 for name in figures) else "report"


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
    name = report_name([one.name for one in built])
    environment = Environment(
        loader=PackageLoader("paper_repro"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
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
    page = environment.get_template(f"{name}.html.j2").render(
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
