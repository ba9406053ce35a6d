"""Page faults and time of gradients on a CPU, with and without `keep_freed_memory`.

Work: training steps (128 images, float32) and gradients of an empirical risk (500 images at once,
float64) of ResNet-8, one thread. Peer: the same with the defaults of glibc. Each runs in a process
of its own, three times in turn; the best of each is printed.
"""

from __future__ import annotations

import subprocess
import sys

STEPS = """
import resource, sys
from time import perf_counter
import torch
from torch.nn.functional import cross_entropy
from neural.training._malloc import keep_freed_memory
from neural.models import build

torch.set_num_threads(1)
if sys.argv[1] == "kept":
    assert keep_freed_memory(), "not glibc"
count, dtype = (128, torch.float) if sys.argv[2] == "steps" else (500, torch.double)
model = build("resnet8", classes=10).to(dtype)
x, y = torch.randn(count, 3, 32, 32).to(dtype), torch.randint(10, (count,))

def step():
    model.zero_grad()
    cross_entropy(model(x), y).backward()

step()
before, start = resource.getrusage(resource.RUSAGE_SELF), perf_counter()
for _ in range(5):
    step()
after = resource.getrusage(resource.RUSAGE_SELF)
print(perf_counter() - start, after.ru_minflt - before.ru_minflt)
"""


def measured(kept: str, work: str) -> tuple[float, float]:
    """Measure five gradients in a fresh process.

    Parameters
    ----------
    kept : {"kept", "default"}
        Whether the process keeps freed memory.
    work : {"steps", "risk"}
        Training steps, or gradients of an empirical risk.

    Returns
    -------
    seconds, faults : float
        Wall time, and number of minor page faults.
    """
    command = [sys.executable, "-c", STEPS, kept, work]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, faults = map(float, said.split())
    return seconds, faults


def main() -> None:
    """Print both."""
    for work in ("steps", "risk"):
        each = [(measured("default", work), measured("kept", work)) for _ in range(3)]
        default, kept = (min(rows) for rows in zip(*each, strict=True))
        for name, (seconds, faults) in (("default", default), ("kept", kept)):
            print(f"{work:10s} {name:8s} {seconds:6.2f} s {faults:12.0f} page faults")
        print(f"{work:10s} ratio    {default[0] / kept[0]:6.2f}")


if __name__ == "__main__":
    main()
