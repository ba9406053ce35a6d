"""Configuration: what each way of stating a thing means, and one clear line for each mistake."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nqm
from nqm.algorithms import EMA, HeavyBall, LatePhase, Lookahead, Nesterov
from nqm.errors import NQMError
from nqm.problems import spectra
from nqm.problems.quadratic import Problem
from nqm.runs import config
from nqm.runs import toml as declare
from nqm.schedule import Constant, Cosine, Joined, Linear, Warmup
from tests.nqm.contract import CONTRACT, built


@pytest.fixture
def contract(tmp_path: Path) -> Path:
    path = tmp_path / "contract.toml"
    path.write_text(CONTRACT)
    return path


def problem(**table: Any) -> Problem:
    return config.build_problem(table)


def same(a: Problem, b: Problem) -> None:
    assert a.key() == b.key()


def test_the_contract_file(contract: Path) -> None:
    run = built(contract)
    same(run.problem, Problem([1.0, 0.5, 0.25], [1.0, 0.5, 0.25]))
    first, second = run.program.phases
    assert (first.lr, first.batch_size, first.steps) == (Constant(0.1), Constant(8.0), 200)
    assert second.algorithm == LatePhase(members=10, gamma=0.1)
    assert second.member_lr == Constant(0.05)
    assert run.at == [0, 100, 200, 300]
    assert (run.method, run.replicas, run.seed) == ("jump", 1000, 0)


def test_ways_to_state_a_problem(tmp_path: Path) -> None:
    h = 1.0 / np.arange(1, 6)
    same(
        problem(spectrum={"name": "harmonic", "directions": 5}, noise_variance=2.0),
        Problem(h, 2.0),
    )
    same(problem(spectrum={"name": "harmonic", "directions": 5}, noise={}), Problem(h, h))
    same(
        problem(curvature=[1.0, 0.25], noise={"scale": 3.0, "exponent": 0.5}),
        Problem([1.0, 0.25], [3.0, 1.5]),
    )
    same(
        problem(curvature=[1.0, 0.5], minimum_variance=2.0, initial_mean=[1.0, 2.0], minimum=3),
        Problem.from_minimum_noise([1.0, 0.5], 2.0, initial_mean=[1.0, 2.0], minimum=3.0),
    )
    same(
        problem(spectrum={"name": "two_cluster", "outliers": 3, "bulk": 97}, noise_variance=1),
        Problem([1.0, 0.01], 1.0, multiplicity=[3.0, 97.0]),
    )
    for name in ("power_law", "log_uniform", "marchenko_pastur"):
        made = problem(spectrum={"name": name, "directions": 7}, noise_variance=1.0)
        same(made, Problem(getattr(spectra, name)(7), 1.0))
    same(
        problem(spectrum={"name": "harmonic", "directions": 50}, noise={}, bins=4),
        Problem(spectra.harmonic(50), spectra.harmonic(50)).binned(4),
    )
    same(problem(curvature=2.0, noise_variance=1.0, multiplicity=5), Problem([2.0], 1.0, 5.0))
    (tmp_path / "measured.csv").write_text("curvature,noise_variance\n1.0,0.5\n0.5,0.25\n")
    same(
        config.build_problem({"file": "measured.csv", "initial_mean": 1.0}, tmp_path),
        Problem([1.0, 0.5], [0.5, 0.25], initial_mean=1.0),
    )


def test_schedules_and_inner_algorithms(contract: Path) -> None:
    run = built(
        contract,
        "phase.0.lr={schedule='cosine', start=0.1, end=0.001, over=200}",
        "phase.0.batch_size={schedule='linear', start=8, end=64, over=100}",
        "phase.0.algorithm='ema'",
        "phase.0.decay=0.9",
        "phase.0.inner={algorithm='lookahead', k=3, inner='nesterov'}",
        "phase.1.inner={algorithm='heavy_ball', momentum=0.5}",
        "phase.1.lr={schedule='warmup', steps=5, "
        "then={schedule='joined', parts=[0.1, {schedule='linear', start=0.1, end=0.01, over=9}], "
        "lengths=[20]}}",
    )
    first, second = run.program.phases
    assert first.lr == Cosine(0.1, 0.001, 200)
    assert first.batch_size == Linear(8.0, 64.0, 100)
    assert first.algorithm == EMA(Lookahead(Nesterov(0.9), k=3), decay=0.9)
    assert second.algorithm == LatePhase(10, 0.1, inner=HeavyBall(0.5))
    assert second.lr == Warmup(5, Joined((Constant(0.1), Linear(0.1, 0.01, 9)), (20,)))


def test_overrides_are_toml_or_text(contract: Path) -> None:
    mapping = declare.load(
        contract, ["phase.-1.members=3", "problem.curvature.1=7", "method=sample", "record.at=[1]"]
    )
    assert mapping["phase"][1]["members"] == 3
    assert mapping["problem"]["curvature"] == [1.0, 7, 0.25]
    assert mapping["method"] == "sample"
    assert mapping["record"] == {"at": [1]}


def test_the_key_is_of_the_content(contract: Path, tmp_path: Path) -> None:
    key = config.key(declare.load(contract))
    assert key == config.key(declare.load(contract, ["problem.initial_mean=0"]))
    assert key != config.key(declare.load(contract, ["phase.0.lr=0.2"]))
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("curvature,noise_variance\n1.0,0.5\n")
    second.write_text(first.read_text())
    one = config.key({"problem": {"file": "a.csv"}}, tmp_path)
    assert one == config.key({"problem": {"file": "b.csv"}}, tmp_path)
    second.write_text("curvature,noise_variance\n1.0,0.6\n")
    assert one != config.key({"problem": {"file": "b.csv"}}, tmp_path)


MISTAKES = [
    ("problem.curvature=[1.0, -0.5, 0.25]", "problem.curvature must be >= 0; got -0.5 at index 1"),
    ("problem.noise_variance=-1", "problem.noise_variance must be >= 0; got -1"),
    ("problem.noise_variance=[1.0, 2.0]", "problem.noise_variance has 2 entries but curvature has"),
    ("problem.initial_mean=nan", "problem.initial_mean must be finite; got nan"),
    ("problem.curvature=[1.0, 'a']", "problem.curvature.1 must be a number; got 'a'"),
    ("problem.curvture=1", "problem.curvture is not a known key; did you mean 'curvature'?"),
    ("problem.spectrum={name='harmonic', directions=3}", "exactly one of curvature, spectrum"),
    ("problem.noise={}", "state noise by exactly one of"),
    ("problem={curvature=[1.0], noise=0.5}", "in all directions is noise_variance = 0.5"),
    ("problem.bins=0", "problem.bins must be an integer >= 1; got 0"),
    ("problem=3", "problem must be a table; got 3"),
    ("phase=3", "phase must be a list of tables"),
    ("phase=[]", "at least one phase"),
    ("phase.0.lr=0", "phase.0.lr must lie in (0, inf); got 0"),
    ("phase.0.lr=-0.1", "phase.0.lr must lie in (0, inf); got -0.1"),
    ("phase.0.lr=inf", "phase.0.lr must lie in (0, inf); got inf"),
    ("phase.0.lr=fast", "phase.0.lr must be a number; got 'fast'"),
    ("phase.0.lr=true", "phase.0.lr must be a number; got True"),
    ("phase.0.lr={schedule='cosin'}", "phase.0.lr.schedule 'cosin' is unknown; did you mean 'cos"),
    ("phase.0.lr={start=1}", "phase.0.lr.schedule is missing"),
    (
        "phase.0.lr={schedule='cosine', start=-1, end=1, over=2}",
        "phase.0.lr.start must lie in [0, inf); got -1",
    ),
    ("phase.0.lr={schedule='cosine', start=1}", "phase.0.lr.end is missing"),
    ("phase.0.lr={schedule='joined', parts=1, lengths=[]}", "phase.0.lr.parts must be a list"),
    ("phase.0.batch_size=0", "phase.0.batch_size must lie in (0, inf); got 0"),
    ("phase.0.steps=1.5", "phase.0.steps must be a whole number; got 1.5"),
    ("phase.0.steps=-1", "phase.0.steps must be an integer >= 0; got -1"),
    ("phase.0.steps=99999999999999999999", "phase.0.steps must lie within +-2^53"),
    ("phase.0.algorithm='sdg'", "phase.0.algorithm 'sdg' is unknown; did you mean 'sgd'?"),
    ("phase.0.momentum=0.9", "phase.0.momentum is not a known key"),
    ("phase.0.member_lr=0.1", "phase.0.member_lr is for late-phase weights; SGD has none"),
    ("phase.1.members=0", "phase.1.members must be an integer >= 1; got 0"),
    ("phase.1.K=3", "phase.1.K is not a known key; K is phase.1.members"),
    ("phase.1.sigma=1", "phase.1.sigma is not a known key; sigma is phase.1.spread"),
    ("phase.0.B=3", "phase.0.B is not a known key; B is phase.0.batch_size"),
    ("phase.0.eta=3", "phase.0.eta is not a known key; eta is phase.0.lr"),
    ("problem.h=[1]", "problem.h is not a known key; h is problem.curvature"),
    ("phase.1.gama=1", "phase.1.gama is not a known key; did you mean 'gamma'?"),
    (
        "phase.1.minibatch='one'",
        "phase.1.minibatch must be 'own', 'shared' or a number in [0, 1]; got 'one'",
    ),
    (
        "phase.1.inner={algorithm='heavy_ball', momentum=1.2}",
        "phase.1.inner.momentum must lie in [0, 1); got 1.2",
    ),
    ("phase.1.inner='late_phase'", "phase.1.inner must be an Optimizer; got LatePhase"),
    ("phase.1.inner=3", "phase.1.inner must be a table; got 3"),
    ("phase.2.lr=0.1", "phase.2: expected an index from 0 to 1; got '2'"),
    ("phase.0.lr.start=0.1", "phase.0.lr is 0.1, not a table"),
    ("record.at=[301]", "record.at must lie in 0..300, the program's steps; got 301"),
    ("record.at=[-1]", "record.at must lie in 0..300, the program's steps; got -1"),
    ("record.at=[0.5]", "record.at.0 must be a whole number; got 0.5"),
    ("record.quantiles=[1.5]", "record.quantiles must lie in [1e-12, 1]; got 1.5"),
    ("method=jmp", "method 'jmp' is unknown; did you mean 'jump'?"),
    ("replicas=1", "replicas must be an integer >= 2; got 1"),
    ("seed=-1", "seed must be an integer >= 0; got -1"),
    ("sede=1", "sede is not a known key; did you mean 'seed'?"),
    ("lr", "an override must read key=value; got 'lr'"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_named_in_one_line(contract: Path, override: str, message: str) -> None:
    with pytest.raises(NQMError) as caught:
        built(contract, override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "problem is missing"),
        ({"problem": {"curvature": 1.0, "noise_variance": 1.0}}, "phase is missing"),
        ({"problem": {"noise_variance": 1.0}, "phase": []}, "state curvature by exactly one of"),
    ],
)
def test_what_is_missing(table: dict[str, Any], message: str) -> None:
    with pytest.raises(NQMError, match=message):
        config.build(table)


def test_spectra_and_files_are_checked(tmp_path: Path) -> None:
    def fails(message: str, **table: Any) -> None:
        with pytest.raises(NQMError, match=message):
            config.build_problem(table, tmp_path)

    harmonic = {"name": "harmonic", "directions": 3}
    fails("problem.spectrum.directions must", spectrum=harmonic | {"directions": 0}, noise={})
    fails("did you mean 'harmonic'", spectrum=harmonic | {"name": "harmonc"}, noise={})
    fails("problem.spectrum.directions is missing", spectrum="harmonic", noise={})
    fails("problem.noise.scale must", spectrum=harmonic, noise={"scale": -1.0})
    fails("problem.curvature must be >= 0", curvature=-1.0, noise={"exponent": 0.5})
    two = {"name": "two_cluster", "outliers": 1, "bulk": 2}
    fails("drop problem.multiplicity", spectrum=two, noise={}, multiplicity=2.0)
    fails("no such file", file="none.csv")
    (tmp_path / "p.csv").write_text("curvature\n1.0\n")
    fails("'noise_variance' is missing", file="p.csv")
    (tmp_path / "n.csv").write_text("curvature,noise_variance\n1.0,2.0\n")
    fails("exclude each other", file="n.csv", noise_variance=1.0)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NQMError, match="no such file"):
        declare.load(tmp_path / "none.toml")
    with pytest.raises(NQMError, match="is a folder, not a file"):
        declare.load(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("[problem]\ncurvature = [1.0,\n[[phase]]\n")
    with pytest.raises(NQMError, match=r"not valid TOML: .*line 3"):
        declare.load(broken)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("x = " + "[" * 9999 + "]" * 9999, "more than 64 deep"),
        ("x" + ".x" * 99 + " = 1", "more than 64 deep"),
        ("x = " + "1" * 5000, "not valid TOML"),
        ("x = 0x" + "f" * 5000, "beyond all numbers"),
        ("x = " + "9" * 400, "beyond all numbers"),
        ("x = [" + "1," * 2**23 + "]", "more than 16 MiB"),
    ],
)
def test_files_without_measure(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "f.toml"
    path.write_text(content)
    with pytest.raises(NQMError, match=words) as caught:
        declare.load(path)
    assert len(str(caught.value)) < 300


def test_files_without_an_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(NQMError, match="is a pipe or a device"):
            declare.load(name)
        with pytest.raises(NQMError, match=r"problem\.file: .* is a pipe or a device"):
            config.key({"problem": {"file": str(name)}})


def test_overrides_that_are_more_than_one_value() -> None:
    mapping: dict[str, Any] = {"record": {}}
    declare.override(mapping, ["record.at=[1]\nseed = 3"])
    assert mapping == {"record": {"at": "[1]\nseed = 3"}}  # a text, which no field takes
    for setting in ("x=" + "[" * 9999, "x." * 99 + "x=1", "x=" + "9" * 400):
        with pytest.raises(NQMError, match=r"deep|parts|beyond"):
            declare.override({}, [setting])
    with pytest.raises(NQMError, match="must be a text; got an integer of thousands of digits"):
        declare.leaf("name", -(10**5000), str)


def equal_data(**phase):
    return {
        "problem": {"curvature": [1.0], "noise_variance": 0.5},
        "phase": [{"algorithm": "sgd", "lr": 0.1} | phase],
        "record": {"at": [0, "end"]},
    }


@pytest.mark.parametrize(
    ("phase", "steps"),
    [
        ({"examples": 25, "batch_size": 4}, 6),
        ({"examples": 0}, 0),
        # 1 + 2 + 3 + 4 = 10 examples, and 15 with the next step.
        ({"examples": 14, "batch_size": [1, 2, 3, 4, 5]}, 4),
        ({"examples": 15, "batch_size": [1, 2, 3, 4, 5]}, 5),
        # 2 and 4 by turns: 3 a step.
        ({"examples": 3 * 10**9, "batch_size": {"schedule": "cyclic", "high": 4, "low": 2,
                                                "period": 2}}, 10**9),
        ({"examples": 60, "algorithm": "ensemble", "members": 3, "batch_size": 2}, 10),
    ],
)  # fmt: skip
def test_examples_in_place_of_steps(phase, steps):
    run = config.build(equal_data(**phase))
    assert run.program.steps == steps
    assert run.at == [0, steps]
    assert run.program.examples([steps])[0] <= phase["examples"]


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ({"examples": 10, "steps": 3}, "exclude each other"),
        ({"examples": -1}, r"phase\.0\.examples"),
        ({"examples": "x"}, r"phase\.0\.examples must be a number"),
        ({"examples": 99, "batch_size": [1, 2]}, "used up before"),
        ({"examples": 10, "batch_size": 0}, r"phase\.0\.batch_size"),
        ({}, r"phase\.0\.steps is missing"),
    ],
)
def test_mistakes_of_examples(phase, words):
    with pytest.raises(NQMError, match=words):
        config.build(equal_data(**phase))


@pytest.mark.parametrize("at", ["end", ["last"], [0, "End"]])
def test_only_end_is_a_named_step(at):
    with pytest.raises(NQMError, match=r"record\.at"):
        config.build(equal_data(steps=3) | {"record": {"at": at}})


def test_a_bare_spectrum_takes_its_noise_from_the_table(tmp_path: Path) -> None:
    np.save(tmp_path / "h.npy", [0.5, 1.0])
    (tmp_path / "h.csv").write_text("eigenvalue,weight,minimum\n1.0,3,1\n0.5,2,-1\n")
    h = np.array([1.0, 0.5])

    def read(**table: Any) -> Problem:
        return config.build_problem(table, tmp_path)

    same(read(file="h.npy", noise={"scale": 2.0}, initial_mean=[1, 2]),
         Problem(h, 2 * h, initial_mean=[1.0, 2.0]))  # fmt: skip
    counted = {"multiplicity": [3.0, 2.0], "minimum": [1.0, -1.0]}
    same(read(file="h.csv", noise_variance=[0.1, 0.2]), Problem(h, [0.1, 0.2], **counted))
    same(read(file="h.csv", minimum_variance=0.4),
         Problem.from_minimum_noise(h, 0.4, **counted))  # fmt: skip
    same(read(file="h.npy", noise={}, multiplicity=7), Problem(h, h, multiplicity=7.0))
    for table, words in (
        ({"file": "h.npy"}, r"noise_variance' is missing.*problem\.noise"),
        ({"file": "h.npy", "noise": {}, "noise_variance": 1}, "exactly one of"),
        (
            {"file": "h.csv", "noise": {}, "multiplicity": 2},
            r"problem\.multiplicity and the column",
        ),
    ):
        with pytest.raises(NQMError, match=words):
            read(**table)


def test_a_preconditioned_problem(tmp_path: Path) -> None:
    """SGD on it is SGD with gradients p g: by the recursion in each direction."""
    h, v, p, lr = np.array([1.0, 0.25]), np.array([0.5, 2.0]), np.array([0.5, 3.0]), 0.2
    for stated, factors in ((p.tolist(), p), (2.0, 2.0), ({"exponent": -0.5}, h**-0.5)):
        table = {"curvature": h.tolist(), "noise_variance": v.tolist(), "precondition": stated}
        problem = config.build_problem(table)
        gain = 1 - lr * factors * h
        second = gain**2 * (gain**2 + (lr * factors) ** 2 * v) + (lr * factors) ** 2 * v
        loss = nqm.solve(problem, nqm.constant(nqm.SGD(), lr, 2), [2]).loss[0]
        assert loss == pytest.approx(0.5 * h @ second, rel=1e-12)
    for stated, words in (
        (0.0, r"precondition.*must be > 0"),
        ([1.0], "precondition|entries"),
        ({"power": 1}, r"problem\.precondition\.power is not a known key"),
        ({}, r"problem\.precondition\.exponent is missing"),
        ("x", r"problem\.precondition must be"),
    ):
        with pytest.raises(NQMError, match=words):
            config.build_problem(table | {"precondition": stated})
    with pytest.raises(NQMError, match="some curvature is 0"):
        config.build_problem(
            {"curvature": [1.0, 0.0], "noise_variance": 1, "precondition": {"exponent": -1}}
        )
    with pytest.raises(NQMError, match="exclude each other"):
        config.build_problem({"inputs": "gaussian", "curvature": [1.0], "precondition": 2})
