"""One step at a time: gradients, clipping, smoothing, what is frozen, and the state of a run."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from neural.training import report
from neural.training.build import make_model
from neural.training.config import RunConfig
from neural.training.state import TrainState
from neural.training.task import Runtime, Task, open_task
from neural.training.train import train
from nqm.errors import NQMError
from tests.tiny_runs import CNN, LATE, assert_equal, tiny, weights

#: SGD in which one step is w <- w - lr g.
BARE = {"momentum": 0.0, "weight_decay": 0.0, "precision": "float64"}


def opened(**sections: Any) -> tuple[TrainState, list[tuple[Tensor, Tensor]]]:
    """A state and the batches of its first epoch."""
    run = tiny(**sections)
    task = open_task(run, Runtime())
    return TrainState(run, task, Runtime()), list(task.stream.epoch(0))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """By autograd, outside of the train_state."""
    named = dict(model.named_parameters())
    loss = nn.functional.cross_entropy(model(x), y)
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


def norm(gradient: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))


@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_base_gradient_is_clipped_as_a_whole(clip: float) -> None:
    train_state, [(x, y), *_] = opened(train=BARE | {"clip_norm": clip})
    before = state_of(train_state.model)
    gradient = gradients(train_state.model, x, y)
    assert 0.1 < norm(gradient) < 1e5
    train_state.step([(x, y)])
    factor = min(1.0, clip / norm(gradient))
    for name, value in train_state.model.state_dict().items():
        expected = before[name] - 0.05 * factor * gradient[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-9)


def test_each_minibatch_is_clipped_over_the_base_and_its_member() -> None:
    """By `clip_grad_norm_` on each member's network, before the base's gradients are summed."""
    clip = 0.2
    train_state, batches = opened(train=BARE | {"clip_norm": clip}, late_phase=LATE)
    train_state.spawn()
    late = train_state.late
    assert late is not None
    # One member sees a batch it is sure of: its gradient is the only one below the norm.
    with torch.no_grad():
        for name, value in late.named_parameters():
            if name.endswith("bias") and "stacked" in name:
                value[1, 0] += 100.0
    batches[1] = (batches[1][0], torch.zeros_like(batches[1][1]))
    head = ("linear.weight", "linear.bias")
    nets = [late.member(k) for k in range(3)]
    clipped = []
    for net, (x, y) in zip(nets, batches, strict=False):
        net.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        clipped.append(float(nn.utils.clip_grad_norm_(net.parameters(), clip)) > clip)
    assert clipped == [True, False, True]
    before = [state_of(net) for net in nets]
    train_state.step(batches[:3])
    for k in range(3):
        for name, value in late.member(k).named_parameters():
            ones = [nets[k]] if name in head else nets
            gradient = sum(net.get_parameter(name).grad for net in ones)  # type: ignore[misc]
            expected = before[k][name] - 0.05 * gradient  # type: ignore[operator]
            torch.testing.assert_close(value.detach(), expected, rtol=1e-10, atol=1e-13)


def test_clipped_members_on_one_minibatch_are_a_plain_loop_with_clip_grad_norm() -> None:
    """Equal members on the same minibatch are one network, so that gamma = "mean" is K = 1.

    From T0 on, as members begin with empty momentum; so does the loop here.
    """
    settings = BARE | {"momentum": 0.9, "clip_norm": 0.5}
    late_phase = {"start_epoch": 0, "members": 2, "select": "batchnorm+head", "gamma": "mean"}
    train_state, batches = opened(model=CNN, train=settings, late_phase=late_phase)
    net = copy.deepcopy(train_state.model).train()
    loop = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    train_state.spawn()
    norms = []
    for x, y in batches[:3] * 3:
        train_state.step([(x, y), (x, y)])
        loop.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), 0.5)))
        loop.step()
    assert min(norms) < 0.5 < max(norms)
    assert train_state.late is not None
    for name, value in train_state.late.averaged().named_parameters():
        torch.testing.assert_close(value, net.get_parameter(name), rtol=1e-9, atol=1e-12)


def test_smoothed_loss_is_the_mean_with_the_uniform_distribution() -> None:
    train_state, [(x, y), *_] = opened(train=BARE | {"label_smoothing": 0.3})
    log_probs = train_state.model(x).log_softmax(-1)
    right = log_probs[torch.arange(len(y)), y]
    expected = -(0.7 * right + 0.3 * log_probs.mean(-1)).mean()
    torch.testing.assert_close(train_state.step([(x, y)])[0], expected.detach(), rtol=1e-12, atol=0)


def test_spared_weights_do_not_decay() -> None:
    settings = BARE | {"weight_decay": 0.5, "no_decay": "bias"}
    train_state, [(x, y), *_] = opened(train=settings)
    with torch.no_grad():
        for p in train_state.model.parameters():
            p.add_(0.1)
    before, gradient = state_of(train_state.model), gradients(train_state.model, x, y)
    train_state.step([(x, y)])
    for name, value in train_state.model.state_dict().items():
        decay = 0.0 if "bias" in name else 0.5
        expected = before[name] - 0.05 * (gradient[name] + decay * before[name])
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)


def test_members_keep_the_groups_of_the_base_unless_told() -> None:
    # What `no_decay` spares has none, whatever the others have.
    for own, expected in ((None, {0.0, 0.5}), (0.25, {0.0, 0.25})):
        late = LATE if own is None else LATE | {"weight_decay": own}
        train_state, _ = opened(train={"weight_decay": 0.5, "no_decay": "bias"}, late_phase=late)
        train_state.spawn()
        assert train_state.member_optimizer is not None
        assert {g["weight_decay"] for g in train_state.member_optimizer.param_groups} == expected


def test_base_keeps_its_momentum_when_members_are_made() -> None:
    train_state, batches = opened(late_phase=LATE)
    for batch in batches:
        train_state.step([batch])
    weight = train_state.model.get_parameter("features.1.weight")
    before = train_state.optimizer.state[weight]["momentum_buffer"].clone()
    assert before.abs().sum() > 0
    train_state.spawn()
    assert torch.equal(train_state.optimizer.state[weight]["momentum_buffer"], before)
    assert train_state.member_optimizer is not None
    assert not train_state.member_optimizer.state


def test_loss_of_the_history_is_a_mean_over_minibatches() -> None:
    train_state, batches = opened(late_phase=LATE)
    plain = [float(train_state.step([batch])[0]) for batch in batches]
    assert train_state.take_mean_loss() == pytest.approx(sum(plain) / 4, rel=1e-12)
    train_state.spawn()
    members = train_state.step(batches[:3]).double()
    assert train_state.finite()
    assert train_state.take_mean_loss() == pytest.approx(float(members.mean()), rel=1e-6)
    assert train_state.take_mean_loss() != train_state.take_mean_loss()  # there is none: NaN
    assert train_state.done == 7
    assert train_state.epoch == 7 / 4


# --- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["swa", "ema"])
@pytest.mark.parametrize("steps", [3, 6], ids=["before T0", "after T0"])
def test_state_goes_on_in_another_session(method: str, steps: int) -> None:
    sections = {
        "model": CNN | {"dropout": 0.4},
        "late_phase": LATE | {"noise": 0.5},
        "average": {"method": method, "start_epoch": 1},
    }
    one, batches = opened(**sections)
    other, _ = opened(**sections)

    def go(train_state: TrainState, done: range) -> None:
        for step in done:
            if step == 4:
                train_state.spawn()
            late = train_state.late is not None
            train_state.step(batches[:3] if late else [batches[step % 4]])
            if late:
                train_state.end_epoch(step)

    go(one, range(steps))
    state = copy.deepcopy(one.state_dict())
    go(one, range(steps, 8))
    torch.rand(17)  # what happens in between must not matter
    other.load_state_dict(state)
    go(other, range(steps, 8))
    assert_equal(state_of(other.trained), state_of(one.trained))
    assert one.average is not None
    assert other.average is not None
    assert_equal(state_of(other.average), state_of(one.average))


# --- what is put on a model ----------------------------------------------------------------------


def task_of(run: RunConfig) -> Task:
    return open_task(run, Runtime())


def test_lora_trains_factors_and_head_alone(tmp_path: Path) -> None:
    run = tiny(model={"name": "mlp", "hidden": [8, 6], "lora": 2}, train={"lr": 0.1})
    task = task_of(run)
    torch.manual_seed(run.seed)
    before = state_of(make_model(run.model, task))
    train_state = TrainState(run, task, Runtime())
    assert_equal(state_of(train_state.model), before)
    for epoch in range(2):
        for batch in task.stream.epoch(epoch):
            train_state.step([batch])
    moved = {n for n, v in train_state.model.state_dict().items() if not torch.equal(v, before[n])}
    factors = {n for n in before if n.endswith((".A", ".B"))}
    assert len(factors) == 6
    assert moved == factors | {
        "linear.bias", "linear.parametrizations.weight.original"
    }  # fmt: skip
    held = {id(p) for group in train_state.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in train_state.model.parameters() if p.requires_grad}


def test_members_may_be_low_rank_updates(tmp_path: Path) -> None:
    late = LATE | {"select": "lora"}
    run = tiny(model={"name": "mlp", "hidden": [8], "lora": 2}, late_phase=late)
    outcome = train(run, tmp_path / "run")
    assert outcome.status == "finished"
    assert outcome.history["spread"].iloc[-1] > 0


def test_rank1_factors_are_trained_from_the_start(tmp_path: Path) -> None:
    model = {"name": "mlp", "hidden": [8], "rank1": "features.*"}
    run = tiny(model=model, late_phase=LATE | {"select": "rank1"})
    task = task_of(run)
    train_state = TrainState(run, task, Runtime())
    factors = {n for n, _ in train_state.model.named_parameters() if n.endswith((".s", ".r"))}
    assert len(factors) == 2
    before = state_of(train_state.model)
    assert all(bool((before[n] == 1).all()) for n in factors)
    train_state.step([next(task.stream.epoch(0))])
    after = train_state.model.state_dict()
    assert all(not torch.equal(after[n], before[n]) for n in before)
    result = train(run, tmp_path / "run").result
    assert {"averaged", "averaged_product"} <= set(result["weights"])
    # The single model is a plain one.
    plain = {"features.1.weight", "features.1.bias", "linear.weight", "linear.bias"}
    assert set(weights(tmp_path / "run")) == plain


@pytest.mark.parametrize("late", [None, LATE | {"select": "rank1"}])
def test_single_model_of_a_run_is_plain(tmp_path: Path, late: dict[str, Any] | None) -> None:
    model = {"name": "mlp", "hidden": [8], "rank1": "*"}
    extra: dict[str, Any] = {} if late is None else {"late_phase": late}
    for average in ({}, {"average": {"method": "swa", "start_epoch": 1}}):
        folder = tmp_path / f"run{len(average)}"
        train(tiny(model=model, **extra, **average), folder)
        assert all("parametrizations" not in name for name in weights(folder))


def test_weights_to_start_from(tmp_path: Path) -> None:
    train(tiny(), tmp_path / "run")
    trained = weights(tmp_path / "run")
    torch.save({"state_dict": {f"module.{n}": v for n, v in trained.items()}}, tmp_path / "x.pt")
    for path in (tmp_path / "run/model.pt", tmp_path / "x.pt"):
        run = tiny(model={"name": "mlp", "hidden": [8], "checkpoint": str(path)})
        assert_equal(state_of(make_model(run.model, task_of(run))), trained)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    torch.save({"linear.weight": torch.zeros(2)}, tmp_path / "small.pt")
    torch.save({"state_dict": 3}, tmp_path / "number.pt")
    torch.save({"state_dict": {"linear.weight": "text"}}, tmp_path / "text.pt")
    torch.save({3: torch.zeros(2)}, tmp_path / "keys.pt")
    (tmp_path / "short.pt").write_bytes(b"PK")
    names = ("small", "number", "text", "keys", "short", "missing")
    for path in (tmp_path / f"{name}.pt" for name in names):
        run = tiny(model={"name": "mlp", "hidden": [8], "checkpoint": str(path)})
        with pytest.raises(NQMError) as caught:
            make_model(run.model, task_of(run))
        message = str(caught.value)
        assert message.startswith("model.checkpoint"), message
        assert str(path) in message
        assert "\n" not in message


# --- found out before training, not at T0 or at the end ------------------------------------------


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"late_phase": LATE | {"select": "batchnorm"}}, ("'batchnorm'", "matches nothing")),
        ({"late_phase": LATE | {"select": "haed"}}, ("'haed'", "'head'")),
        ({"late_phase": LATE | {"select": "lora"}}, ("add_lora",)),
        ({"train": {"no_decay": "layernorm"}}, ("'layernorm'", "matches nothing")),
        ({"evaluate": {"ood": ["svnh"]}}, ("'svnh'", "'svhn'")),
        ({"evaluate": {"ood": ["python_docs"]}}, ("python_docs", "text")),
        ({"evaluate": {"mc_dropout": 3}}, ("evaluate.mc_dropout", "dropout")),
        ({"data": {"train_examples": 10**6}}, ("data.train_examples", "at most")),
        ({"data": {"name": "digit"}}, ("'digit'", "'digits'")),
        ({"data": {"sampling": "stream"}}, ("'stream'",)),
        ({"model": {"name": "mpl"}}, ("'mpl'", "'mlp'")),
        ({"model": {"name": "mlp", "hiden": [3]}}, ("'hiden'", "'hidden'")),
        ({"model": {"name": "digits_cnn", "width": 2.5}}, ("width", "2.5")),
    ],
    ids=str,
)
def test_mistakes_are_told_before_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sections: dict[str, Any],
    words: tuple[str, ...],
) -> None:
    def step(*_: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(TrainState, "step", step)
    with pytest.raises(NQMError) as caught:
        train(tiny(**sections), tmp_path / "run")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_images_of_another_shape_are_no_ood_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neural.data import ImageData, Images

    other = Images(torch.zeros(4, 3, 9, 9, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    made = ImageData("svhn", "SVHN", None, other, 10, (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setattr(report, "load_images", lambda *_: made)
    with pytest.raises(NQMError, match=r"'svhn' holds images of \(3, 9, 9\).*\(1, 8, 8\)"):
        train(tiny(evaluate={"ood": ["svhn"]}), tmp_path / "run")


def test_text_has_no_images_to_damage(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "data": {"name": "python_docs", "train_examples": 2000, "test_examples": 500},
        "model": {"name": "lstm_lm", "embedding": 4, "hidden": 4},
    }
    for extra in ({"corruptions": True}, {"ood": ["digits"]}):
        with pytest.raises(NQMError, match="needs images in memory"):
            train(tiny(**sections, evaluate=extra), tmp_path / "run")
    # Nothing was trained: the folder is still anyone's.
    assert train(tiny(**sections), tmp_path / "run").status == "finished"


def test_flatness_and_line_of_a_text_model_carry_its_state() -> None:
    """As its likelihood does: the line ends at the averaged model's."""
    from neural import LatePhase, evaluate
    from neural.models import build
    from neural.training import report
    from neural.training.config import EvaluateConfig

    torch.manual_seed(0)
    model = build("lstm_lm", classes=5, hidden=6, embedding=3)
    late = LatePhase(model, 2, "head", noise=0.5)
    text = torch.randint(5, (2, 31))
    windows = [(text[:, i : i + 6], text[:, i + 1 : i + 7]) for i in range(0, 30, 6)]
    task = Task("text", 5, 0, cast(Any, None), lambda: iter(windows), 0.0)
    single = late.averaged()
    settings = EvaluateConfig(line=True, flatness=True)
    rows = {row["data"]: row["value"] for row in report.beyond(single, late, task, settings, {})}
    carried = evaluate.score_text(single, windows).loss
    assert rows["line 1"] == pytest.approx(carried, rel=1e-6)
    assert rows["line 1"] != pytest.approx(evaluate.score(single, windows).loss, rel=1e-6)
    rise = evaluate.loss_rise(single, lambda m: evaluate.score_text(m, windows).loss, [0.1])[0]
    assert rows["noise 0.1"] == pytest.approx(rise.mean, rel=1e-6)


def test_sets_to_tell_apart_are_loaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neural.training import report

    loaded, load = [], report.load_images
    monkeypatch.setattr(
        report, "load_images", lambda name, root: loaded.append(name) or load(name, root)
    )
    outcome = train(tiny(evaluate={"ood": ["digits"]}), tmp_path / "run")
    assert loaded == ["digits"]
    assert set(outcome.result.query("data == 'digits'").metric) == {"auroc", "aupr", "fpr95"}
