"""Late-phase weights in a loop of accelerate, on one device or several.

::

    accelerate launch docs/examples/late_phase_accelerate.py
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 docs/examples/late_phase_accelerate.py

`accelerator.accumulate` is left out, as a cycle of K minibatches accumulates by itself.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from neural import LatePhase, recompute_statistics


def train(mixed_precision: str = "no", clip_norm: float | None = 1.0) -> list[Tensor]:
    """Train a small network, and return the weights of the averaged model.

    Parameters
    ----------
    mixed_precision : {"no", "bf16", "fp16"}
        As `Accelerator` takes it.
    clip_norm : float, optional
        Largest norm of each minibatch's gradient.

    Returns
    -------
    list of Tensor
        Parameters and buffers.
    """
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision=mixed_precision)
    model = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = TensorDataset(torch.randn(96, 4), torch.randint(3, (96,)))
    loader = DataLoader(data, batch_size=8)
    cycles = 5 * 12 // 3 // accelerator.num_processes  # each process has its share of an epoch
    schedule = CosineAnnealingLR(base, T_max=cycles)
    wrapped, base, loader = accelerator.prepare(model, base, loader)

    late = LatePhase(wrapped, members=3, select="layernorm+head")
    own = late.optimizer_like(base, follow=True)
    for _ in range(5):
        for batches in late.cycles(loader):
            with accelerator.autocast():
                late.step(
                    batches,
                    cross_entropy,
                    base,
                    own,
                    clip_norm=clip_norm,
                    scaler=accelerator.scaler,
                )
            schedule.step()
    single = late.averaged()
    recompute_statistics(single, loader)  # nothing to do here: there is no BatchNorm
    return [value.detach().cpu() for value in single.state_dict().values()]


if __name__ == "__main__":
    weights = train()
    print(float(sum(value.double().square().sum() for value in weights)))
