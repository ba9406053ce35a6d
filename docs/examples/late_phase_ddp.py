"""Late-phase weights beside torch's DistributedDataParallel.

::

    torchrun --nproc-per-node 2 docs/examples/late_phase_ddp.py

Every process has its share of each minibatch. `LatePhase` of the wrapped model averages gradients
over the processes, of base and members, before they are clipped.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from neural import LatePhase


def train() -> nn.Module:
    """Train in all processes of the group, and return the averaged model, the same in each.

    Returns
    -------
    Module
        A plain module.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
    data = TensorDataset(torch.randn(96, 4), torch.randint(3, (96,)))
    sampler: DistributedSampler[int] = DistributedSampler(data, shuffle=False)
    loader = DataLoader(data, batch_size=16 // dist.get_world_size(), sampler=sampler)
    wrapped = DistributedDataParallel(model)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    for epoch in range(2):  # as ever, until T0
        sampler.set_epoch(epoch)
        for x, y in loader:
            base.zero_grad()
            cross_entropy(wrapped(x), y).backward()
            base.step()

    base.zero_grad()
    late = LatePhase(wrapped, members=3, select="layernorm+head")
    own = late.optimizer_like(base)
    for epoch in range(2, 4):
        sampler.set_epoch(epoch)
        for batches in late.cycles(loader):
            late.step(batches, cross_entropy, base, own, clip_norm=0.5)
    return late.averaged()


if __name__ == "__main__":
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    single = train()
    if dist.get_rank() == 0:
        print(single)
    dist.destroy_process_group()
