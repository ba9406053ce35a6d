"""Late-phase training against training the base alone: time and memory per example.

Work: SGD steps on random images, minibatches of 128, K = 10 members of BatchNorm and head,
sequential (a member per minibatch) and fused (ten minibatches in one pass). Peer: the base model's
own step, in the same process, rounds taken in turn. On a GPU in bfloat16, with the share of the
card's rate on a large matrix product; on a CPU in float32 on one thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

from neural import LatePhase
from neural.models import build

MEMBERS, BATCH, ROUNDS = 10, 128, 7


class Timer:
    """Wall-clock seconds of a call, after the device has finished.

    Parameters
    ----------
    device : device
        Device on which the call works.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, work: Callable[[], object]) -> float:
        """Time one call."""
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the rate of a large matrix product.

    Parameters
    ----------
    device : device
    dtype : dtype

    Returns
    -------
    float
        FLOP/s, best of five.
    """
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    timer = Timer(device)
    return 2.0 * n**3 / min(timer(lambda: a @ b) for _ in range(5))


def flops_per_example(model: torch.nn.Module, device: torch.device) -> float:
    """Count the operations of forward and backward pass for one image.

    Parameters
    ----------
    model : Module
        Takes images of 3 x 32 x 32.
    device : device
        Device of the model.

    Returns
    -------
    float
        FLOP, as torch counts them.
    """
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(2, 3, 32, 32, device=device)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops() / 2


def compare(name: str, device: torch.device, *, compiled: bool) -> None:
    """Print the speed of base and late-phase training of one network.

    Parameters
    ----------
    name : str
        Name of the model, as `neural.models.build` takes it.
    device : device
    compiled : bool
        Whether the forward passes are compiled.
    """
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else None
    model = build(name, classes=10).to(device).to(memory_format=torch.channels_last)
    flops = flops_per_example(model, device)
    steps = MEMBERS if cuda or name == "resnet20" else 2
    batches = [
        (
            torch.randn(BATCH, 3, 32, 32, device=device).to(memory_format=torch.channels_last),
            torch.randint(10, (BATCH,), device=device),
        )
        for _ in range(MEMBERS)
    ]
    base = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    late = LatePhase(model, MEMBERS)
    own = late.optimizer_like(base)
    forward = torch.compile(model) if compiled else model
    if compiled:
        late.compile()

    def plain() -> None:
        for x, y in batches[:steps]:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss = cross_entropy(forward(x), y)
            base.zero_grad(set_to_none=True)
            loss.backward()
            base.step()

    def sequential() -> None:
        late.step(batches, cross_entropy, base, own, autocast=dtype)

    def fused() -> None:
        late.step(batches, cross_entropy, base, own, autocast=dtype, fused=True)

    work = {"base": (plain, steps), "sequential": (sequential, MEMBERS), "fused": (fused, MEMBERS)}
    timer = Timer(device)
    seconds: dict[str, list[float]] = {kind: [] for kind in work}
    memory: dict[str, float] = {}
    for kind, (run, _) in work.items():
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        run()  # warm, and compiled
        memory[kind] = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else 0.0
    for _ in range(ROUNDS):
        for kind, (run, count) in work.items():
            seconds[kind].append(timer(run) / (count * BATCH))
    rate = matrix_rate(device, dtype or torch.float32)
    reference = statistics.median(seconds["base"])
    for kind, values in seconds.items():
        middle = statistics.median(values)
        # A round's own ratio: what disturbs the machine disturbs both.
        ratio = statistics.median(
            one / other for one, other in zip(values, seconds["base"], strict=True)
        )
        print(
            f"{name:10s} {kind:10s} {1.0 / middle:10.0f} images/s  {ratio:5.3f} of the base's time"
            f"  {flops / middle / rate:5.1%} of the matrix rate"
            + (f"  {memory[kind]:6.2f} GiB" if cuda else "")
        )
    print(f"{name}: base {reference * 1e3:.3f} ms per image, matrix rate {rate / 1e12:.2f} TFLOP/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="torch.compile base and members")
    parser.add_argument("models", nargs="*", help="resnet20, wrn-28-10, ...")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    names = arguments.models or (
        ["resnet20", "wrn-28-10"] if device.type == "cuda" else ["resnet20"]
    )
    print(f"load average {os.getloadavg()[0]:.1f}, {device}, torch {torch.__version__}")
    for name in names:
        compare(name, device, compiled=arguments.compile)


if __name__ == "__main__":
    main()
