"""Loops and callbacks of docs/examples, in several processes and under trainers of other libraries.

All against plain loops in torch that know nothing of the library.

Lightning, transformers and accelerate are installed in environments of their own; without one of
them its tests are skipped.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

from neural import LatePhase
from nqm import NQMError
from tests.literal_torch import LiteralLatePhase
from tests.tiny_nets import batches, net
from tests.tiny_runs import together
from tests.tolerances import IDENTITY, agree

#: Twenty steps of AdamW, which divides by roots of small numbers.
ADAM = 1e-10
EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"
pytestmark = pytest.mark.usefixtures("double")


def example(name: str) -> Any:
    """A file of docs/examples as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def data() -> TensorDataset:
    """Seven minibatches of four: two cycles of three members, and one minibatch more."""
    return TensorDataset(torch.randn(28, 4), torch.randint(3, (28,)))


def averaged(literal: LiteralLatePhase, own: list[str]) -> list[Tensor]:
    """Parameters of the base, and the mean over members of those in `own`."""
    return [
        torch.stack([one.get_parameter(n).detach() for one in literal.copies]).mean(0)
        if n in own
        else p.detach()
        for n, p in literal.model.named_parameters()
    ]


def by_hand(
    model: nn.Module, examples: TensorDataset, plain: int, late: int, scale: float = 1.0
) -> list[Tensor]:
    """Averaged weights after epochs of plain SGD and epochs of three members, all in plain torch.

    The rate is halved after every step of the base.
    """
    groups = list(DataLoader(examples, batch_size=4))
    base = optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    schedule = LambdaLR(base, lambda t: 0.5**t)
    for _ in range(plain):
        for x, y in groups:
            base.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            base.step()
            schedule.step()

    def make(one: nn.Module, names: Any) -> optim.Optimizer:
        own = [p for n, p in one.named_parameters() if n in names]
        return optim.SGD(own, lr=1.0, momentum=0.9)

    own = [name for name, _ in model.named_parameters() if not name.startswith("0.")]
    literal = LiteralLatePhase(model, 3, own, [], make, gamma=scale)
    for _ in range(late):
        for start in range(0, len(groups), 3):
            group = groups[start : start + 3]
            for one in literal.optimizers:
                one.param_groups[0]["lr"] = 0.5 * base.param_groups[0]["lr"]
            literal.step(group, functional.cross_entropy, base)
            schedule.step()  # trainers count the incomplete cycle as a step
    return averaged(literal, own)


def alike(model: nn.Module, expected: list[Tensor]) -> None:
    for p, q in zip(model.parameters(), expected, strict=True):
        agree(p.detach(), q, IDENTITY)


@pytest.mark.parametrize("gamma", ["sum", "mean"])
def test_lightning_is_the_plain_loop(gamma: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    callback = example("late_phase_lightning").LatePhaseCallback

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return functional.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            seen.append(self.model[2].weight.detach().clone())

        def configure_optimizers(self) -> Any:
            base = optim.SGD(self.model.parameters(), lr=0.2, momentum=0.9)
            rates = {"scheduler": LambdaLR(base, lambda t: 0.5**t), "interval": "step"}
            return {"optimizer": base, "lr_scheduler": rates}

    def trainer(**options: Any) -> Any:
        late = callback(3, 1, select="norm+head", gamma=gamma, member_settings={"lr": rate})
        return late, lightning.Trainer(
            max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
            callbacks=[late], **options,
        )  # fmt: skip

    seen: list[Tensor] = []
    examples, model = data(), net()
    twin = copy.deepcopy(model)
    rate = 0.5 * 0.2 * 0.5**7  # half of the base's rate after the plain epoch
    late, run = trainer()
    module = Module(model).double()
    run.fit(module, DataLoader(examples, batch_size=4), DataLoader(examples, batch_size=28))
    assert seen
    assert torch.equal(seen[-1], model[2].weight)
    assert late.late.spread() > 0
    alike(model, by_hand(twin, examples, 1, 2, 1.0 if gamma == "sum" else 1 / 3))
    for options, told in (
        ({"gradient_clip_val": 1.0}, "gradient_clip_val"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches"),
    ):
        _, run = trainer(**options)
        with pytest.raises(NQMError, match=f"LatePhaseCallback does not handle {told}"):
            run.fit(Module(net()).double(), DataLoader(examples, batch_size=4))


class Dicts(Dataset[dict[str, Tensor]]):
    """Examples as a Trainer wants them."""

    def __init__(self, examples: TensorDataset) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = self.examples[index]
        return {"pixels": x, "labels": y}


class Classifier(nn.Module):
    """Computes its own loss, as models of transformers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.inner(pixels)
        loss = {} if labels is None else {"loss": functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


class Counting(Classifier):
    """As models of transformers, it takes whatever the Trainer gives, and may not use it."""

    accepts_loss_kwargs: bool

    def forward(self, pixels: Tensor, labels: Tensor, **others: Any) -> dict[str, Tensor]:
        return super().forward(pixels, labels)


@pytest.mark.parametrize("gamma", ["sum", "mean"])
def test_a_trainer_of_transformers_is_the_plain_loop(gamma: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    callback = example("late_phase_trainer").LatePhaseCallback
    seen: list[Tensor] = []

    class InOrder(transformers.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *_: Any) -> Iterator[int]:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[return-value]

        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            seen.append(self.model.inner[2].weight.detach().clone())
            return {}

    def trainer(model: nn.Module, **options: Any) -> Any:
        settings: dict[str, Any] = {
            "gradient_accumulation_steps": 3, "max_grad_norm": 0.0, "num_train_epochs": 2,
            "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": [],
            "use_cpu": True, "disable_tqdm": True, "eval_strategy": "epoch", **options,
        }  # fmt: skip
        base = optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        late = callback(select="norm+head", gamma=gamma, member_settings={"lr": 0.1})
        return late, InOrder(
            model, transformers.TrainingArguments(tmp_path, **settings), callbacks=[late],
            train_dataset=Dicts(examples), eval_dataset=Dicts(examples),
            optimizers=(base, LambdaLR(base, lambda t: 0.5**t)),
        )  # fmt: skip

    examples, model = data(), net()
    twin = copy.deepcopy(model)
    late, run = trainer(Classifier(model))
    run.train()
    assert seen
    assert torch.equal(seen[-1], model[2].weight)
    assert late.late.spread() > 0
    alike(model, by_hand(twin, examples, 0, 2, 1.0 if gamma == "sum" else 1 / 3))
    for options, told in (
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps=1"),
    ):
        with pytest.raises(NQMError, match=f"LatePhaseCallback does not handle {told}"):
            trainer(Classifier(net()), **options)
    counted = Counting(net())
    with pytest.raises(
        NQMError, match=r"set model\.accepts_loss_kwargs = False before the Trainer"
    ):
        trainer(counted)
    counted.accepts_loss_kwargs = False
    trainer(counted)


def ddp_run(rank: int, world: int) -> list[Any]:
    torch.set_default_dtype(torch.float64)
    return [p.tolist() for p in example("late_phase_ddp").train().parameters()]


@pytest.mark.slow
def test_data_parallel_processes_are_the_plain_loop_on_all_examples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
    examples = TensorDataset(torch.randn(96, 4), torch.randint(3, (96,)))
    groups = list(DataLoader(examples, batch_size=16))
    base = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in 2 * groups:
        base.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        base.step()

    def make(one: nn.Module, names: Any) -> optim.Optimizer:
        return optim.SGD([p for n, p in one.named_parameters() if n in names], lr=0.1, momentum=0.9)

    own = [name for name, _ in model.named_parameters() if not name.startswith("0.")]
    literal = LiteralLatePhase(model, 3, own, [], make, clip=0.5)
    for start in (0, 3, 0, 3):
        literal.step(groups[start : start + 3], functional.cross_entropy, base)
    assert min(literal.norms) < 0.5 < max(literal.norms)
    expected = averaged(literal, own)
    for found in together(2, ddp_run):
        for p, q in zip(found, expected, strict=True):
            agree(p, q, IDENTITY)


def accelerated(clip: float | None, processes: int = 1) -> list[Tensor]:
    """What the example of accelerate trains, in plain torch: all minibatches, in one process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
    examples = TensorDataset(torch.randn(96, 4), torch.randint(3, (96,)))
    # Processes have a minibatch of eight each, which together are one.
    groups = list(DataLoader(examples, batch_size=8 * processes))
    base = optim.AdamW(model.parameters(), lr=0.01)
    schedule = CosineAnnealingLR(base, 20 // processes)

    def make(one: nn.Module, names: Any) -> optim.Optimizer:
        return optim.AdamW([p for n, p in one.named_parameters() if n in names], lr=0.01)

    own = [name for name, _ in model.named_parameters() if not name.startswith("0.")]
    literal = LiteralLatePhase(model, 3, own, [], make, clip=clip)
    for _ in range(5):
        for start in range(0, len(groups), 3):
            for one in literal.optimizers:
                one.param_groups[0]["lr"] = base.param_groups[0]["lr"]
            literal.step(groups[start : start + 3], functional.cross_entropy, base)
            schedule.step()
    return averaged(literal, own)


def accelerate_run(rank: int, world: int, precision: str, clip: float | None) -> list[Any]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    if world > 1:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_default_dtype(torch.float64)
    return [w.tolist() for w in example("late_phase_accelerate").train(precision, clip)]


@pytest.mark.parametrize("clip", [None, 0.5])
def test_accelerate_is_the_plain_loop(clip: float | None) -> None:
    pytest.importorskip("accelerate")
    found = accelerate_run(0, 1, "no", clip)
    for p, q in zip(found, accelerated(clip), strict=True):
        agree(p, q, ADAM)


def test_a_base_that_would_skip_its_step_is_told() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = net()
    model, base = accelerator.prepare(model, optim.SGD(model.parameters(), lr=0.1))
    late = LatePhase(model, 2, "norm")
    own = late.optimizer_like(base)
    with (
        pytest.raises(NQMError, match=r"base_optimizer would skip this step; leave accelerator\."),
        accelerator.accumulate(model),
    ):
        late.step(batches(), functional.cross_entropy, base, own)


@pytest.mark.slow
def test_accelerate_in_two_processes_is_the_plain_loop_on_all_examples() -> None:
    pytest.importorskip("accelerate")
    for found in together(2, accelerate_run, "no", 0.5):
        for p, q in zip(found, accelerated(0.5, processes=2), strict=True):
            agree(p, q, ADAM)
