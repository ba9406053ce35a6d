"""The paper's figures: claims hold at smoke scale, files explain themselves, misuse is one line."""

import importlib
import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from PIL import Image

from nqm.cli import main
from nqm.errors import NQMError
from nqm.table import read_metadata, read_table, write_table
from paper_repro import build as building
from paper_repro import cli
from paper_repro.control import paired_error
from paper_repro.least_squares import Data, exact
from paper_repro.report import report_name, symbols
from paper_repro.study import (
    GROUPS,
    STUDIES,
    Claim,
    Scale,
    agrees,
    between,
    close,
    estimate,
    find,
    identical,
    slope,
)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Everything at smoke scale, once."""
    folder = tmp_path_factory.mktemp("paper")
    result = CliRunner().invoke(cli.reproduce, ["all", "--scale", "smoke", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    assert f"report: {folder / 'report.html'}" in result.output
    assert re.search(r"\d+ claims passed, 0 failed", result.output)
    return folder


@pytest.mark.parametrize("name", STUDIES)
def test_every_study(out, name):
    study = find(name)
    assert len(re.findall(r"\.(?:\s|$)", study.SUMMARY)) == 2  # two sentences
    table = read_table(out / f"{name}.parquet")
    found = study.claims(table)
    assert len(found) >= 3
    assert all(claim.passed for claim in found)
    assert isinstance(study.draw(table), Figure)
    metadata = read_metadata(out / f"{name}.parquet")
    assert metadata["figure"] == name
    assert metadata["scale"] == "smoke"
    assert {"version", "seed", "settings", "key"} <= metadata.keys()
    with Image.open(out / f"{name}.png") as image:
        assert json.loads(image.text["Parameters"]) == metadata
        assert image.width == 1400
    assert b"/Keywords" in (out / f"{name}.pdf").read_bytes()


@pytest.mark.parametrize("name", STUDIES)
def test_claims_can_fail(out, name):
    """Losses that are off by a constant factor must be noticed."""
    study = find(name)
    table = read_table(out / f"{name}.parquet")
    sampled = table["kind"].str.startswith("sample")
    rows = sampled if sampled.any() else table["kind"] == "best"
    for column in ("loss", "member_loss"):
        if column in table:
            table.loc[rows, column] *= 2.0
    if name == "multiplicative":
        table.loc[table["panel"] == "error", "loss"] += 0.1
    if name == "closure":
        table["error"] += 0.1
    assert not all(claim.passed for claim in study.claims(table))


def test_report_is_one_self_contained_page(out):
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(STUDIES)
    assert not re.search(r'src="(?!data:)', page)
    beside = re.findall(r'href="([^#"]+)"', page)
    assert beside == [f"{name}.{kind}" for name in STUDIES for kind in ("pdf", "png", "parquet")]
    assert all((out / name).is_file() for name in beside)
    # Parameters are folded, pictures can be enlarged, and the page has a dark form.
    assert page.count("<details>") == page.count("</details>") == len(STUDIES)
    assert page.count('type="checkbox"') == len(STUDIES)
    assert "prefers-color-scheme: dark" in page
    assert "our own study" in page
    for name in STUDIES:
        study = find(name)
        assert f'id="{name}"' in page
        for claim in study.claims(read_table(out / f"{name}.parquet")):
            assert symbols(claim.text) in page


def test_symbols_of_a_report_are_shown_as_such():
    text = "lambda = eta_phi + gamma K eta_theta, eta <= 1 & T0; theta and eta2 stay"
    assert symbols(text) == (
        "&lambda; = &eta;<sub>&phi;</sub> + &gamma; K &eta;<sub>&theta;</sub>, &eta; &le; 1 &amp; "
        "T<sub>0</sub>; theta and eta2 stay"
    )


def test_no_report_takes_the_place_of_another():
    names = [report_name(list(group)) for group in GROUPS.values()]
    assert names == ["report", "zhang2019", "scaling", "ranking"]
    assert report_name(["switch"]) == "switch"
    assert report_name(["zhang2019_ema"]) == "zhang2019_ema"


def test_second_run_only_draws(out, monkeypatch):
    monkeypatch.setattr(find("switch"), "compute", lambda scale: pytest.fail("computed again"))
    before = (out / "switch.parquet").read_bytes()
    built = building.build("switch", Scale.SMOKE, out)
    assert built.reused
    assert (out / "switch.parquet").read_bytes() == before


def test_another_scale_has_another_key():
    smoke, full = (building.stamp("switch", scale) for scale in (Scale.SMOKE, Scale.FULL))
    assert smoke["key"] != full["key"]


def test_half_written_table_is_computed_anew(out, tmp_path):
    whole = (out / "switch.parquet").read_bytes()
    (tmp_path / "switch.parquet").write_bytes(whole[: len(whole) // 2])
    built = building.build("switch", Scale.SMOKE, tmp_path)
    assert not built.reused
    assert (tmp_path / "switch.parquet").read_bytes() == whole  # the same seed, the same bytes


def test_foreign_table_is_not_overwritten(out, tmp_path):
    path = tmp_path / "switch.parquet"
    write_table(path, read_table(out / "switch.parquet"), {})
    with pytest.raises(NQMError, match="not written by this command"):
        building.build("switch", Scale.SMOKE, tmp_path)


def test_figure_from_a_table(out, tmp_path):
    table = str(out / "rate_map.parquet")
    arguments = ["rate_map", "--table", table, "--out", str(tmp_path)]
    result = CliRunner().invoke(cli.figure, arguments)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rate_map.pdf", "rate_map.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["swich"], "did you mean 'switch'"),
        (["switch", "--table", "missing.parquet"], "no such file"),
        (["rate_map", "--table", "{out}/switch.parquet"], "table of figure 'switch'"),
        (["switch", "--scale", "smoke", "--out", "/proc/none"], "cannot write"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(out, arguments, message):
    arguments = ["figure", *(argument.format(out=out) for argument in arguments)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["switch.parquet", "switch.pdf", "switch.html"])
def test_what_is_in_the_way_is_told_before_any_work(tmp_path, monkeypatch, name):
    monkeypatch.setattr(find("switch"), "compute", None)
    (tmp_path / name).mkdir()
    result = CliRunner().invoke(main, ["reproduce", "switch", "--out", str(tmp_path)])
    assert (result.exit_code, result.output) == (
        2,
        f"error: {tmp_path / name} is a folder, not a file; name a file\n",
    )


def test_a_table_of_texts_is_not_drawn(tmp_path):
    path, study = tmp_path / "t.csv", find("collapse")
    names = study.compute(Scale.SMOKE).columns
    path.write_text(f"{','.join(names)}\n{','.join('x' for _ in names)}\n")
    arguments = ["figure", "collapse", "--table", str(path), "--out", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    told = result.output.splitlines()[-1]  # older Matplotlib says something before
    assert told.startswith(f"error: {path} is not a table of figure 'collapse': ")


def test_a_damaged_table_is_left_alone(tmp_path):
    (tmp_path / "switch.parquet").write_bytes(b"somebody's")
    with pytest.raises(NQMError, match="is not a complete table"):
        building.build("switch", Scale.SMOKE, tmp_path)
    assert (tmp_path / "switch.parquet").read_bytes() == b"somebody's"


def test_failed_claim_ends_with_exit_code_1(out, monkeypatch):
    failing = [Claim("never", 0.0, ">= 1", False)]
    monkeypatch.setattr(find("switch"), "claims", lambda table: failing)
    arguments = ["switch", "--scale", "smoke", "--out", str(out)]
    result = CliRunner().invoke(cli.reproduce, arguments)
    assert result.exit_code == 1
    assert "0 claims passed, 1 failed" in result.output
    assert "FAILED: never" in result.output


def test_cli_loads_nothing_heavy():
    code = (
        "import sys, paper_repro.cli;"
        "sys.exit(any(m in sys.modules for m in ('numpy', 'pandas', 'matplotlib', 'numba')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_study_is_registered():
    for name, module in STUDIES.items():
        loaded = importlib.import_module(module)
        for attribute in ("TITLE", "SUMMARY", "settings", "compute", "draw", "claims"):
            assert hasattr(loaded, attribute), f"{name} lacks {attribute}"


def test_rules_of_claims():
    assert agrees("", [1.0, 2.0], [1.1, 1.9], [0.1, 0.1]).passed
    assert not agrees("", [1.0], [2.0], [0.1]).passed
    assert not agrees("", [np.nan], [2.0], [0.1]).passed
    assert estimate("", 1.0, 1.1, 0.1).passed
    assert not estimate("", 1.0, 2.0, 0.1).passed
    assert close("", 1.01, 1.0, 0.02).passed
    assert not close("", 1.03, 1.0, 0.02).passed
    assert identical("", [1.0, 2.0], [1.0, 2.0]).passed
    assert not identical("", [1.0, 2.0], [1.0, 2.1]).passed
    assert between("", 0.5, 0.0, 1.0).passed
    assert not between("", np.nan, 0.0, np.inf).passed
    assert between("", 3.0, 1.0, np.inf).rule == ">= 1"
    assert slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)


def test_exact_moments_of_least_squares_equal_an_enumeration_of_every_run():
    """Two cycles of K = 2 members on three examples: all 81 runs, equally likely."""
    rng = np.random.default_rng(3)
    data = Data(rng.normal(size=(3, 2)), rng.normal(size=3))
    start, lr = np.array([0.7, -0.4]), 0.2
    lowest = data.loss(data.minimum())
    mean_losses, member_losses = [], []
    for draws in itertools.product(range(3), repeat=4):
        theta, phi = start.copy(), np.zeros((2, 2))
        for cycle in (draws[:2], draws[2:]):
            x, y = data.features[list(cycle)], data.target[list(cycle)]
            g = x * (np.sum(x * (theta + phi), axis=1) - y)[:, None]
            phi = phi - lr * g
            theta = theta - lr * g.mean(axis=0)
        mean_losses.append(data.loss(theta + phi.mean(axis=0)) - lowest)
        member_losses.append(data.loss(theta + phi).mean() - lowest)
    loss, member_loss = exact(data, start, members=2, lr=lr, batch_size=1, at=[0, 2])
    assert loss[0] == pytest.approx(data.loss(start) - lowest, rel=1e-12)
    assert loss[1] == pytest.approx(np.mean(mean_losses), rel=1e-12)
    assert member_loss[1] == pytest.approx(np.mean(member_losses), rel=1e-12)


def test_paired_error_vanishes_with_the_noise():
    found = paired_error(2, 0.2, 1e-8, settle=10, window=10, replicas=200, seed=(1,))
    for error, stderr in found.values():
        assert abs(error) < max(1e-6, 4.5 * stderr)
