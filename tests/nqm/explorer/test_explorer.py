"""The controls: what they state is what is computed, and mistakes are said in one line."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from click.testing import CliRunner
from nbclient import NotebookClient

from nqm import SGD, NQMError, Phase, Problem, Program, explore, solve
from nqm.cli import main
from nqm.explorer.cli import _notebook, _problem
from nqm.explorer.settings import METHODS, Exploration, problem_table
from nqm.explorer.widgets import _Controls
from nqm.runs import config
from tests.tolerances import JUMP, agree

ONE = {"curvature": [2.0], "noise_variance": 3.0}
HARMONIC = {
    "spectrum": {"name": "harmonic", "directions": 20},
    "noise": {"scale": 1.0, "exponent": 1.0},
}


def plain_loss(lr: float, steps: int, batch: int, start: float) -> float:
    """Loss of SGD on h = 2, v = 3 from a second moment: a geometric series."""
    h, v, q = 2.0, 3.0, (1 - 2.0 * lr) ** 2
    return 0.5 * h * (q**steps * start + lr**2 * v / batch * (1 - q**steps) / (1 - q))


def test_losses_are_those_of_the_closed_form() -> None:
    one = Exploration(ONE, "sgd", first_lr=0.3, later_lr=0.1, batch_size=4, switch=7, later=5)
    before = 2 * plain_loss(0.3, 7, 4, 1.0) / 2.0
    end = plain_loss(0.1, 5, 4, before)
    curves = one.curves()
    agree(curves[curves["series"] == "before"]["loss"].iloc[[0, -1]], [1.0, before], JUMP)
    agree(curves[curves["series"] == "mean model"]["loss"].iloc[-1], end, JUMP)
    assert f"{end:.4g}." in one.words()[0]
    rates = one.rates()
    agree(rates["loss"], [plain_loss(lr, 5, 4, before) for lr in rates["lr"]], JUMP)


def test_late_phase_has_the_losses_of_sgd_at_the_stated_rate_and_batch() -> None:
    settings = Exploration(HARMONIC, members=5, later_lr=0.05, later=40)
    found = re.search(r"rate ([\d.]+) on minibatches of (\d+)", settings.words()[1])
    assert found is not None
    rate, batch = float(found[1]), int(found[2])
    run = settings.built()
    first = run.program.phases[0]
    same = Program((first, Phase(SGD(), lr=rate, batch_size=batch, steps=40 // 5)))
    curves = settings.curves()
    end = curves[curves["series"] == "mean model"]["loss"].iloc[-1]
    agree(end, solve(run.problem, same).loss[-1], JUMP)


@pytest.mark.parametrize("method", METHODS)
def test_the_file_says_what_is_computed(method: str) -> None:
    settings = Exploration(HARMONIC, method, members=3, later=30, switch=20)
    text = settings.toml()
    assert tomllib.loads(text) == settings.configuration()
    run = config.build(tomllib.loads(text))
    curves = settings.curves()
    end = curves[curves["series"] == "mean model"]
    agree(end["loss"].iloc[-1], run.solve().loss[-1], JUMP)
    # All methods see as many examples as plain SGD, up to a part of a step.
    last = (20 + 30) * settings.batch_size
    assert last - settings.size * settings.batch_size < end["examples"].iloc[-1] <= last


def test_instability_is_said_in_words() -> None:
    calm = Exploration(ONE, "sgd", first_lr=0.99, later_lr=0.99)
    assert "Unstable" not in " ".join(calm.words())
    wild = Exploration(ONE, "sgd", first_lr=1.01, later_lr=1.01)
    before, after = wild.words()
    assert before.startswith("Unstable before T0: the rate 1.01 is not below 1,")
    assert after.startswith("Unstable after T0")
    # gamma = 1 / K doubles the rate of the mean model, and halves its edge.
    (late,) = Exploration(ONE, "late_phase", first_lr=0.5, later_lr=0.51).words()
    assert "0.51 is not below 0.5" in late


def test_too_few_examples_are_refused_and_left_out() -> None:
    with pytest.raises(NQMError, match="not enough for one step of K = 10"):
        Exploration(ONE, members=10, later=9).configuration()
    assert set(Exploration(ONE, members=2, later=9, first_lr=0.1).rates()["members"]) == {1, 2, 4}


@pytest.mark.parametrize(
    ("change", "told"),
    [({"method": "swaa"}, "swa"), ({"members": 0}, "members"), ({"later_lr": -1.0}, "later_lr")],
)
def test_wrong_values_are_named(change: dict[str, Any], told: str) -> None:
    with pytest.raises(NQMError, match=told):
        Exploration(ONE, **change)


def test_a_problem_of_ones_own_comes_back_from_its_table() -> None:
    problem = Problem([3.0, 1.0], [2.0, 0.5], [1.0, 7.0], initial_mean=[0.1, 0.2], minimum=1.5)
    again = config.build({"problem": problem_table(problem), "phase": [
        {"algorithm": "sgd", "lr": 0.1, "steps": 1}]}).problem  # fmt: skip
    for name in ("curvature", "noise_variance", "multiplicity", "initial_mean", "minimum"):
        np.testing.assert_array_equal(getattr(again, name), getattr(problem, name))
    correlated = Problem([1.0, 2.0], 1.0, noise_correlation=[[1.0, 0.5], [0.5, 1.0]])
    with pytest.raises(NQMError, match="correlated"):
        problem_table(correlated)


def test_controls_compute_when_one_of_them_changes(tmp_path: Path) -> None:
    controls = _Controls(None)
    first = bytes(controls.picture.value)
    assert first.startswith(b"\x89PNG")
    controls.members.value = 3
    assert controls.box.settings.members == 3
    assert bytes(controls.picture.value) != first
    controls.method.value = "sgd"
    assert controls.members.disabled
    controls.first_lr.value = 3.0
    assert "Unstable before T0" in controls.text.value

    content = b"eigenvalue\n50\n10\n1\n"
    file = {"name": "own.csv", "type": "text/csv", "size": len(content), "content": content,
            "last_modified": datetime.now(UTC)}  # fmt: skip
    controls.upload.value = (file,)
    assert controls.spectrum.value == "file own.csv"
    assert controls.first_lr.value == pytest.approx(0.5 / 50)
    assert "Unstable" not in controls.text.value
    noisy = b"curvature,noise_variance\n50,7\n1,3\n"
    controls.upload.value = (file | {"name": "noisy.csv", "content": noisy, "size": len(noisy)},)
    built = controls.box.settings.built()
    assert built.problem.noise_variance.tolist() == [7.0, 3.0]
    bad = b"eigenvalues\n50\n"
    controls.upload.value = (file | {"name": "bad.csv", "content": bad, "size": len(bad)},)
    assert "curvature" in controls.text.value
    assert controls.box.settings is None


@pytest.mark.parametrize(
    ("text", "noise"),
    [
        ("curvature\n50\n4\n", [50.0, 4.0]),  # C = H
        ("eigenvalue,noise_variance\n50,7\n4,3\n", [7.0, 3.0]),
    ],
)
def test_a_spectrum_comes_with_its_noise_or_with_its_curvature_as_noise(
    tmp_path: Path, text: str, noise: list[float]
) -> None:
    file = tmp_path / "own.CSV"
    file.write_text(text)
    phase = {"algorithm": "sgd", "lr": 0.01, "steps": 1}
    built = config.build({"problem": _problem(file), "phase": [phase]})
    assert built.problem.noise_variance.tolist() == noise


def test_a_problem_from_python() -> None:
    box = explore(Problem([5.0, 1.0], 1.0))
    assert box.settings.problem["curvature"] == [5.0, 1.0]
    assert box.words[0].startswith("Loss at the end")


def test_the_notebook_of_the_command_shows_the_controls() -> None:
    notebook = nbformat.from_dict(_notebook(ONE))
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [output.get("data", {}) for output in notebook.cells[0]["outputs"]]
    assert any("application/vnd.jupyter.widget-view+json" in data for data in shown)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", r"no table \[problem\]"),
        ("[problem]\ncurvature = [-1.0]\nnoise_variance = 1.0", "curvature"),
        ("[problem]\ninputs = 'gaussian'\ncurvature = [1.0]", "least squares"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "a.toml"
    file.write_text(text)
    done = CliRunner().invoke(main, ["explore", str(file)])
    assert done.exit_code == 2
    assert re.search(told, done.output)
    assert len(done.output.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_controls_in_a_browser() -> None:
    pytest.importorskip("voila")
    playwright = pytest.importorskip("playwright.sync_api")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("no chromium")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-c",
        "from nqm.cli import main; main()",
        "explore",
        "--no-browser",
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        while "is running at" not in server.stderr.readline():
            assert server.poll() is None
        with playwright.sync_playwright() as running:
            browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 390, "height": 844})
            page.goto(f"http://127.0.0.1:{port}")
            page.wait_for_selector("text=Loss at the end", timeout=120_000)
            assert page.evaluate("document.documentElement.scrollWidth") == 390  # a phone's width
            assert page.eval_on_selector("img", "image => image.naturalWidth") > 1000
            browser.close()
    finally:
        server.terminate()
        server.wait()
