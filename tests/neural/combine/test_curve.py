"""Curves between models against the quadratic, and the geometry of planes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from scipy.stats import kstest
from torch import Tensor, nn

from neural.combine import curve as module
from neural.combine.config import load_section
from neural.combine.curve import (
    CURVE,
    KINDS,
    Curve,
    CurveConfig,
    axes_of_plane,
    barycentric,
    judge_curve,
    judge_plane,
    path_on_plane,
    straight,
    summarise,
    train_curve,
)
from neural.combine.data import Parts
from neural.combine.mean import weighted_mean
from neural.combine.members import Members
from nqm import NQMError
from nqm.cli import main
from nqm.table import read_table

Batch = tuple[Tensor, Tensor]


class Stream:
    """Batches that depend on epoch and index alone; may fail at a step."""

    def __init__(self, batches: list[Batch], fail: int | None = None):
        self.batches, self.fail, self.seen = batches, fail, 0

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0, /) -> Iterator[Batch]:
        for batch in self.batches[start:]:
            if self.seen == self.fail:
                raise KeyboardInterrupt
            self.seen += 1
            yield batch


class Point(nn.Module):
    """Weights that are their own output."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w + 0.0 * x


ENDS = torch.tensor([[1.0, 0.5, -0.2], [-0.4, 1.0, 0.9]], dtype=torch.float64)
MINIMUM = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)


def points() -> Members:
    return Members.of_states(Point(), [{"w": MINIMUM + end} for end in ENDS])


class Net(nn.Module):
    """Convolution, BatchNorm and dropout: statistics, counters, draws."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))
        return head


def images(seed: int = 0) -> list[Batch]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 1, 5, 5, generator=g), torch.randint(2, (8,), generator=g))
        for _ in range(3)
    ]


def nets(count: int = 2) -> Members:
    states = []
    for seed in range(count):
        torch.manual_seed(seed)
        net = Net()
        for x, _ in images(seed)[: seed + 1]:
            net(x)
        states.append(net.state_dict())
    return Members.of_states(Net(), states)


PARTS = Parts(test=lambda: images(7), train=lambda: images(8))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# --- the curve -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bends", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_control_points(kind: str, bends: int) -> None:
    for t in np.linspace(0.0, 1.0, 13):
        shares = KINDS[kind](float(t), bends)
        assert shares.sum() == pytest.approx(1.0, abs=1e-12)
        assert shares.min() >= 0.0
        # Control points at equal distances on a line make t the position on it.
        assert shares @ np.linspace(0, 1, bends + 2) == pytest.approx(t, abs=1e-12)


def test_weights_of_known_curves() -> None:
    np.testing.assert_allclose(KINDS["bezier"](0.25, 1), [0.5625, 0.375, 0.0625])
    np.testing.assert_allclose(KINDS["chain"](0.25, 1), [0.5, 0.5, 0.0])
    np.testing.assert_allclose(KINDS["chain"](0.5, 1), [0.0, 1.0, 0.0])


@pytest.mark.parametrize("kind", KINDS)
def test_ends_come_back_bit_for_bit(kind: str) -> None:
    """After training as well; statistics and counters included."""
    ends = nets()
    config = CurveConfig(kind, epochs=1)
    made = train_curve(ends, Stream(images()), nn.functional.cross_entropy, config)
    assert same(made.state(0.0), ends.state(0))
    assert same(made.state(1.0), ends.state(1))
    assert not torch.equal(
        made.state(0.5)["head.weight"], straight(ends, config).state(0.5)["head.weight"]
    )


@pytest.mark.parametrize("by", ["loss", "decay"])
@pytest.mark.parametrize(("kind", "share"), [("bezier", -0.75), ("chain", -0.25)])
def test_the_trained_bend_on_a_quadratic(
    kind: str, share: float, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It minimises the mean of |phi(t)|^2: -(3/4) (w1 + w2), or -(1/4) (w1 + w2) of a chain.

    Equidistributed t, multiples of the golden ratio, instead of random ones leave little scatter.
    """
    steps = iter(range(10**6))
    monkeypatch.setattr(module, "drawn_t", lambda _: next(steps) * (math.sqrt(5) - 1) / 2 % 1.0)
    around = MINIMUM if by == "loss" else torch.zeros(3, dtype=torch.float64)

    def loss(output: Tensor, _: Tensor) -> Tensor:
        distance = 0.5 * (output[0] - around).square().sum()
        return distance if by == "loss" else 0.0 * distance

    ends = Members.of_states(Point(), [{"w": around + end} for end in ENDS])
    config = CurveConfig(
        kind, epochs=500, lr=0.2, momentum=0.0, weight_decay=0.0 if by == "loss" else 1.0
    )
    stream = Stream([(torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1))])
    made = train_curve(ends, stream, loss, config)
    bend = made.controls.state(1)["w"] - around
    torch.testing.assert_close(bend, share * ENDS.sum(0), rtol=0.0, atol=0.02)
    # Before training: the middle of the line.
    begun = straight(ends, config).controls.state(1)["w"] - around
    torch.testing.assert_close(begun, 0.5 * ENDS.sum(0))


def test_positions_are_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = np.array([module.drawn_t(generator) for _ in range(2000)])
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    assert kstest(drawn, "uniform").pvalue > 1e-3


def test_the_rate_is_flat_falls_and_is_flat() -> None:
    config = CurveConfig(lr=2.0)
    shares = [0.0, 0.5, 0.7, 0.9, 1.0]
    assert [config.lr_at(s) for s in shares] == pytest.approx([2.0, 2.0, 1.01, 0.02, 0.02])


@pytest.mark.parametrize("step", [0, 1, 4, 6, 8])
def test_a_killed_training_goes_on_bit_for_bit(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECKPOINT_EVERY", -1.0)
    config = CurveConfig(bends=2, epochs=3)
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    whole = train_curve(nets(), Stream(images()), loss, config)
    file = tmp_path / "curve.pt"
    with pytest.raises(KeyboardInterrupt):
        train_curve(nets(), Stream(images(), fail=step), loss, config, file=file)
    assert file.exists() == (step > 0)
    torch.rand(3)  # the state of the process does not matter
    stream = Stream(images())
    again = train_curve(nets(), stream, loss, config, file=file)
    assert stream.seen == 9 - step
    for one, other in zip(whole.controls.states(), again.controls.states(), strict=True):
        assert same(one, other)
    done = Stream(images(), fail=0)
    train_curve(nets(), done, loss, config, file=file)  # a finished one takes no step


def test_training_leaves_the_random_state_and_the_members_alone() -> None:
    ends = nets()
    before = [ends.state(0), torch.random.get_rng_state()]
    train_curve(ends, Stream(images()), nn.functional.cross_entropy, CurveConfig(epochs=1))
    assert same(before[0], ends.state(0))  # type: ignore[arg-type]
    assert torch.equal(before[1], torch.random.get_rng_state())  # type: ignore[arg-type]


def test_free_ends_turn_away_from_each_other() -> None:
    """The penalty alone makes the ends orthogonal, and does not shorten them."""
    config = CurveConfig(
        "chain", bends=0, epochs=400, lr=0.2, weight_decay=0.0, ends="free", cosine_penalty=1.0
    )
    stream = Stream([(torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1))])
    start, end = ENDS[0], ENDS[0] + 0.5 * ENDS[1]
    assert float(nn.functional.cosine_similarity(start, end, 0)) > 0.8
    ends = Members.of_states(Point(), [{"w": start}, {"w": end}])
    made = train_curve(ends, stream, lambda output, _: 0.0 * output.sum(), config)
    one, other = (state["w"] for state in made.controls.states())
    assert abs(float(nn.functional.cosine_similarity(one, other, 0))) < 1e-3
    assert float(one.norm()) >= float(start.norm())  # gradients are orthogonal to the weights


# --- judging -------------------------------------------------------------------------------------


def test_a_curve_is_judged_beside_the_line() -> None:
    ends = nets()
    config = CurveConfig(epochs=1, points=5, repair="none", weight_decay=0.1)
    made = train_curve(ends, Stream(images()), nn.functional.cross_entropy, config)
    table = judge_curve(ends, made, PARTS, config)
    assert tuple(table.columns) == CURVE
    assert len(table) == 2 * 5 * 2
    rows = table[(table["data"] == "test") & (table["path"] == "line")].set_index("t")
    for t in (0.0, 0.5):
        state = weighted_mean(ends, [1 - t, t])
        model = ends.with_state(state)
        x, y = torch.cat([x for x, _ in images(7)]), torch.cat([y for _, y in images(7)])
        loss = float(nn.functional.cross_entropy(model(x), y).detach())
        assert rows.loc[t, "nll"] == pytest.approx(loss, rel=1e-5)
        norm = float(ends.flat(state).double().square().sum())
        assert rows.loc[t, "penalty"] == pytest.approx(0.05 * norm, rel=1e-6)
    apart = float((ends.flat(ends.state(0)) - ends.flat(ends.state(1))).norm())
    assert rows.loc[1.0, "length"] == pytest.approx(apart, rel=1e-5)
    curve = table[(table["data"] == "test") & (table["path"] == "curve")].set_index("t")
    for t in (0.0, 1.0):
        assert curve.loc[t, "nll"] == rows.loc[t, "nll"]
    assert curve.loc[1.0, "length"] > apart


def test_statistics_are_computed_anew_at_every_point() -> None:
    ends = nets()
    config = CurveConfig(epochs=0, points=3)
    table = judge_curve(ends, straight(ends, config), PARTS, config)
    rows = table[(table["data"] == "test") & (table["path"] == "curve")].set_index("t")
    for t in (0.0, 0.5, 1.0):
        model = ends.with_state(weighted_mean(ends, [1 - t, t]))
        with torch.no_grad():
            seen = [model.conv(x).transpose(0, 1).flatten(1) for x, _ in images(8)]
            assert isinstance(model.norm, nn.BatchNorm2d)
            model.norm.running_mean = torch.stack([one.mean(1) for one in seen]).mean(0)
            model.norm.running_var = torch.stack([one.var(1) for one in seen]).mean(0)
            x, y = torch.cat([x for x, _ in images(7)]), torch.cat([y for _, y in images(7)])
            loss = float(nn.functional.cross_entropy(model(x), y))
        assert rows.loc[t, "nll"] == pytest.approx(loss, rel=1e-5)


def test_the_summary_of_a_path() -> None:
    """Losses 1, 3, 2 at lengths 0, 1, 4: integral (2 * 1 + 2.5 * 3) / 4."""
    table = pd.DataFrame(
        {"path": "curve", "t": [0.0, 0.5, 1.0], "length": [0.0, 1.0, 4.0], "data": "test",
         "accuracy": [0.9, 0.7, 0.8], "nll": [1.0, 3.0, 2.0]}
    )  # fmt: skip
    row = summarise(table).set_index("metric").loc["nll"]
    expected = {"start": 1.0, "end": 2.0, "middle": 3.0, "min": 1.0, "max": 3.0, "mean": 2.0,
                "integral": 9.5 / 4.0, "length": 4.0}  # fmt: skip
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    errors = summarise(table).set_index("metric").loc["error"]
    assert errors["max"] == pytest.approx(0.3)


# --- planes --------------------------------------------------------------------------------------


def corners() -> Members:
    g = torch.Generator().manual_seed(3)
    made = torch.randn(3, 3, generator=g, dtype=torch.float64)
    return Members.of_states(Point(), {n: {"w": w} for n, w in zip("abc", made, strict=True)})


def test_distances_on_a_plane_are_those_of_the_weights() -> None:
    three = corners()
    placed = axes_of_plane(three)
    spots = [*zip(*placed, strict=True), (0.7, -0.4), (2.0, 1.0)]
    states = [weighted_mean(three, barycentric(placed, float(x), float(y)))["w"] for x, y in spots]
    for index in range(3):
        torch.testing.assert_close(states[index], three.state(index)["w"])
    for (x1, y1), one in zip(spots, states, strict=True):
        for (x2, y2), other in zip(spots, states, strict=True):
            distance = math.hypot(x1 - x2, y1 - y2)
            assert float((one - other).norm()) == pytest.approx(distance, abs=1e-9)


def test_a_curve_of_one_bend_runs_on_the_plane_of_its_points() -> None:
    three = corners()
    made = Curve("bezier", three.chosen([0, 2, 1]))
    path = path_on_plane(made, three, points=5)
    placed = axes_of_plane(three)
    np.testing.assert_allclose(path[[0, -1]], np.array(placed).T[:2], atol=1e-12)
    for (x, y), t in zip(path, np.linspace(0.0, 1.0, 5), strict=True):
        state = weighted_mean(three, barycentric(placed, float(x), float(y)))["w"]
        torch.testing.assert_close(state, made.state(float(t))["w"])


def test_a_plane_is_judged_on_its_grid() -> None:
    three = nets(3)
    table = judge_plane(three, PARTS, 3)
    assert list(table["corner"]) == ["0", "1", "2", *[""] * 9]
    grid = table[table["corner"] == ""]
    x, _ = axes_of_plane(three)
    reach = float(x.max() - x.min())
    assert grid["x"].max() - grid["x"].min() == pytest.approx(1.4 * reach)
    assert np.isfinite(grid["nll"]).all()


def test_mistakes() -> None:
    three = corners()
    with pytest.raises(NQMError, match="a curve has two ends; got 3 models"):
        straight(three, CurveConfig())
    with pytest.raises(NQMError, match="through three models; got 2"):
        axes_of_plane(points())
    line = [three.state(0)["w"] * f for f in (1.0, 2.0, 3.0)]
    for values in (line, [line[0], line[0], line[1]]):
        with pytest.raises(NQMError, match="lie on one line"):
            axes_of_plane(Members.of_states(Point(), [{"w": w} for w in values]))
    with pytest.raises(NQMError, match="negative; use repair"):
        judge_plane(nets(3), PARTS, 3, repair="none")
    with pytest.raises(NQMError, match="judging a curve needs training data"):
        judge_curve(nets(), straight(nets(), CurveConfig()), Parts(test=lambda: images()))
    loss, steep = nn.functional.cross_entropy, CurveConfig(lr=1e30, epochs=2)
    with pytest.raises(NQMError, match=r"curve.lr = 1e\+30 is too large"):
        train_curve(nets(), Stream(images()), loss, steep)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["kind='spline'"], r"curve.kind 'spline' is unknown"),
        (["bends=0"], r"curve.bends must be 1 at least"),
        (["cosine_penalty=1.0"], r"curve.cosine_penalty needs ends"),
        (["points=1"], r"curve.points must be an integer >= 2"),
        (["plane=1"], r"curve.plane must be an integer >= 2"),
        (["bends=0", "epochs=0", "plane=3"], r"curve.plane needs a bend"),
        (["epochs=0", "plane=3"], r"curve.plane needs a bend that is trained"),
        (["repair='none'", "plane=3"], r"curve.plane needs repair"),
        (["lr=0"], r"curve.lr must lie in"),
        (["momentum=1.0"], r"curve.momentum must lie in"),
    ],
)
def test_settings_are_refused_by_their_key(settings: list[str], words: str) -> None:
    with pytest.raises(NQMError, match=words):
        load_section(CurveConfig, "curve", None, [f"curve.{one}" for one in settings])


def test_the_commands(tmp_path: Path) -> None:
    from neural.training.train import train
    from tests.tiny_runs import tiny

    runs = [str(tmp_path / f"run{seed}") for seed in (0, 1)]
    for seed, folder in enumerate(runs):
        train(tiny(seed=seed), folder)
    out = tmp_path / "out"
    plain = ["neural", "curve", *runs, "--device", "cpu", "--epochs", "1", "--points", "3",
             "--set", "curve.train_examples=40", "--out", str(out)]  # fmt: skip
    assert CliRunner().invoke(main, plain).exit_code == 0
    args = [*plain, "--plane", "2"]  # a finished curve may be asked for a plane
    first = CliRunner().invoke(main, args)
    assert first.exit_code == 0, first.output
    for name in ("curve.png", "plane.png", "bend1.safetensors"):
        assert (out / name).exists()
    held = (out / "curve.parquet").read_bytes()
    (out / "curve.parquet").unlink()  # as if it had been killed before the end
    assert CliRunner().invoke(main, args).stdout == first.stdout
    assert (out / "curve.parquet").read_bytes() == held
    other = CliRunner().invoke(main, [*args, "--set", "curve.lr=0.1"])
    assert "was computed with curve.lr = 0.03, you ask for 0.1" in other.output
    plane = ["neural", "plane", *runs, str(out / "bend1.safetensors"), "--device", "cpu",
             "--points", "2", "--out", str(tmp_path / "plane")]  # fmt: skip
    drawn = CliRunner().invoke(main, plane)
    assert drawn.exit_code == 0, drawn.output
    one, two = (read_table(tmp_path / folder / "plane.parquet") for folder in ("plane", "out"))
    pd.testing.assert_frame_equal(one.drop(columns="corner"), two.drop(columns="corner"))
