"""``nqm explore``: the controls in a browser. This module imports only click at the top."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

#: Files that hold a spectrum; any other is read as a configuration.
_SPECTRA = (".csv", ".parquet", ".npy")


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=8866,
    show_default=True,
    help="Port on this machine.",
)
@click.option("--browser/--no-browser", default=True, help="Open a browser.")
def explore(file: Path | None, port: int, browser: bool) -> None:
    """Show controls over K, rates, batch size, T0 and the method in a browser, until Ctrl-C.

    FILE is a configuration, of which the problem is taken, or a spectrum (.csv, .parquet or .npy).
    Without it the controls offer three spectra, and take a file. Needs the extra `explore`.

    \b
    nqm explore
    nqm explore spectrum.csv --port 8900
    """
    from nqm.errors import check_installed
    from nqm.runs import config

    problem = None if file is None else _problem(file)
    if problem is not None:
        phase = {"algorithm": "sgd", "lr": 0.1, "steps": 1}
        config.build({"problem": problem, "phase": [phase]}).additive("nqm explore")
    check_installed("nqm explore", "explore", "voila", "ipywidgets", "matplotlib")
    with tempfile.TemporaryDirectory(prefix="nqm-explore-") as folder:
        notebook = Path(folder, "explore.ipynb")
        notebook.write_text(json.dumps(_notebook(problem)), encoding="utf-8")
        command = [sys.executable, "-m", "voila", str(notebook), f"--port={port}"]
        command += ["--Voila.ip=127.0.0.1", *([] if browser else ["--no-browser"])]
        click.echo(f"http://127.0.0.1:{port} shows the controls; end with Ctrl-C", err=True)
        server = subprocess.Popen(command)
        try:
            status = server.wait()
        finally:
            server.terminate()
            server.wait()
    raise click.exceptions.Exit(status)


def _problem(file: Path) -> Mapping[str, Any]:
    """The table [problem] that a file holds or is; files it names are absolute."""
    from nqm.errors import NQMError
    from nqm.explorer.settings import problem_of_file
    from nqm.runs import toml

    if file.suffix.lower() in _SPECTRA:
        return problem_of_file(file, str(file.resolve()))
    problem = toml.load(file).get("problem")
    if not isinstance(problem, dict):
        raise NQMError(f"{file} has no table [problem]")
    if isinstance(problem.get("file"), str):
        problem["file"] = str(Path(file.parent, problem["file"]).resolve())
    return problem


def _notebook(problem: Mapping[str, Any] | None) -> dict[str, Any]:
    """A notebook of one cell that shows the controls."""
    source = f"import nqm\nnqm.explore({problem!r})"
    cell: dict[str, Any] = {
        "cell_type": "code", "id": "explore", "metadata": {}, "source": source, "outputs": [],
        "execution_count": None,
    }  # fmt: skip
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "title": "nqm explore"}
    return {"cells": [cell], "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
