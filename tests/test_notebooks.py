"""Notebooks run from top to bottom and are committed without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.figures.cells import CALLS, FIRST, public

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "strip the outputs"
    if any("import torch" in cell.source for cell in notebook.cells):
        pytest.importorskip("torch")
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert pictures, "nothing was drawn"


#: Sources of cells, each of which ends with an object that shows itself, and the kind of output.
SHOWN = {
    """
import pandas as pd
from figures.combine import predicted
row = {"rule": "uniform", "space": "weights", "predicted_from": "surrogate"}
predicted(pd.DataFrame([row | {"nll": 0.4, "predicted": 0.41}]))
""": "image/png",
    """
import nqm
from nqm.problems.spectra import harmonic
problem = nqm.Problem(harmonic(1000), harmonic(1000))
problem
""": "text/html",
    "program = nqm.constant(nqm.LatePhase(5), 0.1, 20)\nprogram": "text/html",
    "nqm.solve(problem, program)": "text/html",
}


def test_an_object_at_the_end_of_a_cell_shows_itself() -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in SHOWN]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    for cell, kind in zip(notebook.cells, SHOWN.values(), strict=True):
        (shown,) = [output.get("data", {}) for output in cell["outputs"]]
        assert kind in shown
        assert len(shown["text/plain"]) < 1000


def test_every_function_that_draws_has_a_cell() -> None:
    assert set(CALLS) == public()


@pytest.mark.slow
def test_every_function_that_draws_shows_its_picture() -> None:
    """In a kernel as a user has it; a cell that ends with the call holds a PNG."""
    sources = [f"{name}({arguments})" for name, arguments in CALLS.items()]
    cells = [nbformat.v4.new_code_cell(source) for source in [FIRST, *sources]]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    for cell in notebook.cells[1:]:
        kinds = {kind for output in cell["outputs"] for kind in output.get("data", {})}
        assert "image/png" in kinds, cell["source"]
