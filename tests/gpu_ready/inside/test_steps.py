"""Training steps of full size: what they wait for, launch, lay out and hold in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from full_size import RECIPES, state
from meter import CUDA, gpu
from torch import Tensor
from torch.utils import _pytree as pytree

from neural.late_phase.averaging import recompute_statistics
from neural.late_phase.pieces import mean_over_rows
from neural.training import checkpoint
from neural.training.config import RunConfig
from neural.training.run_folder import RunFolder

#: Kernels of a late-phase minibatch over those of a base minibatch. Rank-1 factors and BatchNorm
#: take up to 1.15; members that are picked by an index, instead of viewed, would take 2.8.
MOST_KERNELS = 1.3
#: The same where members are fused: layers of shared weights run once for all of them.
MOST_KERNELS_FUSED = 0.8
#: Enough members for a cycle; with all of them in the slow tests.
FEW = "late_phase.members=3"
SMALL = 'model.name="wrn-10-1"'
#: A recipe for each kind of layers, and changes; all recipes at full size in the slow tests.
KINDS = {
    "cifar10_bn": (FEW, SMALL),
    "enwik8_lstm_rank1": (FEW,),
    "transformer_python_docs": (FEW,),
}


def steps_wait_for_nothing(recipe: str, *changes: str, scale: str = "full") -> None:
    with gpu() as meter:
        train_state = state(recipe, *changes, scale=scale)
        stream = train_state.task.stream.epoch(0)
        batch = next(stream)
        train_state.step([batch])  # makes the optimizer's state, and checks the pieces
        meter.clear()
        train_state.step([next(stream)])
        assert not meter.waits
        base = meter.launched
        train_state.spawn()
        assert train_state.late is not None
        group = [batch] * train_state.late.members
        train_state.step(group)
        meter.clear()
        train_state.step(group)
        assert not meter.waits
        assert not meter.layouts
        assert meter.launched < MOST_KERNELS * base * len(group)
        if train_state.run.late_phase is not None and train_state.run.late_phase.fused:
            assert meter.launched < MOST_KERNELS_FUSED * base * len(group)


@pytest.mark.parametrize("recipe", KINDS)
def test_steps_wait_for_nothing(recipe: str) -> None:
    steps_wait_for_nothing(recipe, *KINDS[recipe])


#: Compiled steps are in `test_compile`; a compiler for a GPU that is not there makes no kernels.
ON_GPU = {
    "cifar10_bn": (FEW, SMALL, "train.compile=false"),
    "enwik8_lstm_rank1": (FEW,),
    "transformer_python_docs": (FEW, "train.compile=false"),
}


@pytest.mark.parametrize("recipe", ON_GPU)
def test_steps_at_scale_gpu_wait_for_nothing(recipe: str) -> None:
    steps_wait_for_nothing(recipe, *ON_GPU[recipe], scale="gpu")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_of_all_members_wait_for_nothing(recipe: str) -> None:
    steps_wait_for_nothing(recipe)


@pytest.mark.parametrize("recipe", ["enwik8_lstm_rank1", "transformer_python_docs", "cifar10_bn"])
def test_a_resumed_run_waits_for_nothing(
    recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Adam reads its counts of steps: on the GPU every weight would be waited for."""
    changes = (FEW, SMALL) if recipe == "cifar10_bn" else (FEW,)

    def load(path: Path, device: Any = "cpu") -> dict[str, Any]:
        def put(value: Any) -> Any:
            return value.to(device, copy=True) if isinstance(value, Tensor) else value

        moved: dict[str, Any] = pytree.tree_map(put, saved)
        return moved

    monkeypatch.setattr(checkpoint, "load", load)
    (tmp_path / "checkpoint.pt").touch()
    monkeypatch.setattr(RunFolder, "__init__", _bare)
    with gpu() as meter:
        train_state = state(recipe, *changes)
        group = [next(train_state.task.stream.epoch(0))] * 3
        train_state.step(group[:1])
        train_state.spawn()
        train_state.step(group)
        saved = train_state.state_dict()
        again = state(recipe, *changes)
        loaded = RunFolder(tmp_path, again.run).checkpoint(None)
        assert loaded is not None
        again.load_state_dict(loaded)
        again.step(group)  # the rehearsal of the new members' optimizer
        meter.clear()
        again.step(group)
        assert not meter.waits


def _bare(self: RunFolder, path: Path, run: RunConfig) -> None:
    self.path, self.run = path, run


#: Upper bounds in GiB; a lower bound of half of each shows that memory is counted at all.
MEMORY = [
    ("late_phase.members=10", 3.2),
    ("late_phase.fused=true", 8.5),
    ('late_phase.fused=true train.precision="bfloat16"', 4.5),
]


@pytest.mark.parametrize(
    ("changes", "bound"),
    [MEMORY[0], *(pytest.param(*one, marks=pytest.mark.slow) for one in MEMORY[1:])],
)
def test_memory_of_wrn_28_10(changes: str, bound: float) -> None:
    """Weights, gradients and momentum of 36.5M weights, and the activations of 128 images a member.

    Members share the base's activations one after another, or all have theirs if fused.
    """
    fused = "fused" in changes
    few = ("late_phase.members=3",) if fused else ()
    with gpu() as meter:
        train_state = state("cifar10_bn", *changes.split(" "), *few)
        batch = next(train_state.task.stream.epoch(0))
        train_state.spawn()
        assert train_state.late is not None
        group = [batch] * (train_state.late.members if fused else 2)
        train_state.step(group)
        train_state.step(group)
        assert bound / 2 < meter.peak / 2**30 < bound


#: Recipe, arm, changes. Where all weights are replicated, kernels are rows of stacked weights.
LAYOUTS = [
    ("cifar10_bn", "late_phase", ""),
    ("cifar10_baselines", "late_phase_all", ""),
    ("cifar10_baselines", "late_phase_all", "late_phase.fused=true"),
    ("cifar10_baselines", "late_phase_all", 'train.precision="bfloat16"'),
    ("cifar10_hypernet", "late_phase", ""),
    pytest.param("cifar10_baselines", "batchensemble", "", marks=pytest.mark.slow),
    pytest.param("cifar10_pyramidnet", "late_phase", "", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("recipe", "arm", "changes"), LAYOUTS)
def test_convolutions_keep_channels_last(recipe: str, arm: str, changes: str) -> None:
    others = {"cifar10_pyramidnet": (), "cifar10_hypernet": ('model.name="hyper_wrn-10-1"',)}
    small = others.get(recipe, (SMALL,))
    with gpu() as meter:
        train_state = state(recipe, FEW, *small, *changes.split(), arm=arm)
        batch = next(train_state.task.stream.epoch(0))
        train_state.step([batch])
        train_state.spawn()
        assert train_state.late is not None
        train_state.step([batch] * train_state.late.members)
        for member in range(2):  # the public pass, which picks a member by an index
            train_state.late(batch[0], member=member).sum().backward()
        train_state.late.averaged().eval()(batch[0])
        train_state.late.member(1).eval()(batch[0])
        assert not meter.layouts


def test_minibatches_of_an_incomplete_cycle_go_back_to_the_gpu() -> None:
    with gpu():
        train_state = state("cifar10_bn", FEW, SMALL)
        batch = next(train_state.task.stream.epoch(0))
        train_state.spawn()
        assert train_state.late is not None
        late = train_state.late
        assert list(late.cycles([batch] * 2, "carry")) == []
        on_host = pytree.tree_map_only(Tensor, Tensor.cpu, late.state_dict())
        late.load_state_dict(on_host)
        (group,) = late.cycles([batch], "carry")
        train_state.step(group)


@pytest.mark.parametrize("members", [False, True])
def test_recomputed_statistics_wait_for_nothing(members: bool) -> None:
    """Torch's cumulative mean would read one number for every layer and minibatch."""
    with gpu() as meter:
        train_state = state("cifar10_bn", FEW, SMALL)
        if members:
            train_state.spawn()
        data = [next(train_state.task.stream.epoch(0))] * 2
        meter.clear()
        recompute_statistics(train_state.trained, data)
        assert not meter.waits


@pytest.mark.parametrize(
    "options",
    [{}, {"clip_norm": 1.0}, {"fused": True},
     {"micro_batches": 2, "loss_weight": mean_over_rows}],
    ids=str,
)  # fmt: skip
def test_a_scaled_step_waits_once(options: dict[str, Any]) -> None:
    """For whether all gradients are finite. With clipping each member's norm is of its own."""
    with gpu() as meter:
        scaler = torch.amp.GradScaler("cuda")
        train_state = state("cifar10_bn", FEW, SMALL)
        batches = [next(train_state.task.stream.epoch(0))] * 3
        train_state.spawn()
        late, own = train_state.late, train_state.member_optimizer
        assert late is not None
        assert own is not None
        for _ in range(2):
            meter.clear()
            losses = late.step(
                batches, train_state.task.loss, train_state.optimizer, own,
                autocast=torch.float16, scaler=scaler, **options,
            )  # fmt: skip
        assert losses.device == CUDA
        assert meter.waits == {"a number is read": 1}
        if "clip_norm" in options:  # a norm of all tensors for each member, and their factor
            norms = sum(n for name, n in meter.kernels.items() if "linalg_vector_norm" in name)
            assert norms >= 3
