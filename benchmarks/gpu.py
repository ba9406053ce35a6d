"""What a GPU does with this package, in under ten minutes: ``make bench-gpu``.

0. The LSTM of enwik8 with rank-1 factors, some hundred steps of random text: cuDNN's gradient
   beside that of the CPU, and symbols/s of base steps, members one by one, and fused.
1. Training of ResNet-20 and WRN-28-10 on random images, minibatches of 128, K = 10 members of
   BatchNorm and head: images/s, memory, and share of the card's measured rate of a large matrix
   product, in bfloat16 and TF32, for base steps, members one by one, members fused, and compiled.
2. Monte Carlo of a noisy quadratic: coordinate-steps/s, and share of the rate of the mere draws.
3. The fast net on CIFAR-10 (JPEG q75): base, SWA and late-phase weights with as many seeds as time
   allows. They are kept under ``--out``; the same command goes on with further seeds.

Without a GPU everything runs once on small sizes, and numbers are printed as "not measured".
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.late_phase import Timer, flops_per_example, matrix_rate
from neural import LatePhase
from neural.late_phase.reparametrize import add_rank1
from neural.models import build

MODELS = ("resnet20", "wrn-28-10")
KINDS = ("base", "sequential", "fused", "base, compiled", "sequential, compiled")
NOT_MEASURED = "not measured"


@dataclass
class Bench:
    """One run of the benchmark.

    Attributes
    ----------
    device : device
        Device of all work.
    minutes : float
        Time after which no further work begins.
    out : Path
        Folder of the table and of the trained runs.
    root : Path, optional
        Folder of data files.
    """

    device: torch.device
    minutes: float
    out: Path
    root: Path | None = None
    rows: list[dict[str, str]] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    @property
    def measured(self) -> bool:
        """Whether numbers mean anything: on a GPU."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds left."""
        return 60.0 * self.minutes - (time.monotonic() - self.begun)

    def tell(self, part: str, what: str, **numbers: str) -> None:
        """Print a row, and keep it."""
        shown = numbers if self.measured else dict.fromkeys(numbers, NOT_MEASURED)
        self.rows.append({"part": part, "what": what} | shown)
        print(
            f"{part:12s} {what:42s} " + "  ".join(f"{k} {v}" for k, v in shown.items()), flush=True
        )

    def skip(self, part: str, what: str, reason: str) -> None:
        """Print that something was not measured."""
        self.rows.append({"part": part, "what": what, "note": f"{NOT_MEASURED}: {reason}"})
        print(f"{part:12s} {what:42s} {NOT_MEASURED}: {reason}", flush=True)

    def write(self) -> None:
        """Write all rows to ``gpu.csv``."""
        self.out.mkdir(parents=True, exist_ok=True)
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with (self.out / "gpu.csv").open("w", newline="") as stream:
            table = csv.DictWriter(stream, names)
            table.writeheader()
            table.writerows(self.rows)


@contextmanager
def tf32() -> Iterator[None]:
    """Let float32 products be TF32 inside the block, as `nqm neural train` does on a GPU."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def work(
    name: str, kind: str, dtype: torch.dtype | None, bench: Bench
) -> tuple[Callable[[], Any], int]:
    """Make a function that trains on some minibatches, and count their images.

    Parameters
    ----------
    name, kind : str
        Entries of `MODELS` and `KINDS`.
    dtype : dtype or None
        Type of autocast, if any.
    bench : Bench

    Returns
    -------
    callable, int
    """
    members, rows = (10, 128) if bench.measured else (2, 4)
    device = bench.device
    model = build(name, classes=10).to(device).to(memory_format=torch.channels_last)
    batches = [
        (
            torch.randn(rows, 3, 32, 32, device=device).to(memory_format=torch.channels_last),
            torch.randint(10, (rows,), device=device),
        )
        for _ in range(members)
    ]
    base = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    compiled = kind.endswith("compiled")
    options: dict[str, Any] = {} if bench.measured else {"backend": "eager"}
    if kind.startswith("base"):
        forward = torch.compile(model, **options) if compiled else model

        def plain() -> None:
            for x, y in batches:
                base.zero_grad(set_to_none=True)
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    loss = cross_entropy(forward(x), y)
                loss.backward()
                base.step()

        return plain, members * rows
    late = LatePhase(model, members)
    own = late.optimizer_like(base)
    if compiled:
        late.compile(**options)
    fused = kind == "fused"
    return (
        lambda: late.step(batches, cross_entropy, base, own, autocast=dtype, fused=fused),
        members * rows,
    )


def training(bench: Bench) -> None:
    """Print speed and memory of training steps.

    Parameters
    ----------
    bench : Bench
    """
    models = MODELS if bench.measured else ("wrn-10-1",)
    precisions = {"bfloat16": torch.bfloat16, "TF32": torch.float32}
    rates = {}
    with tf32():
        for precision, dtype in precisions.items():
            if not bench.measured:
                dtype = torch.float32
            rates[precision] = matrix_rate(bench.device, dtype)
            bench.tell("matrix", precision, rate=f"{rates[precision] / 1e12:.1f} TFLOP/s")
        # What is compiled last takes the longest before it is measured.
        for kind in KINDS:
            for name in models:
                for precision, dtype in precisions.items():
                    what = f"{name}, {precision}, {kind}"
                    if bench.left < (240.0 if kind.endswith("compiled") else 60.0):
                        bench.skip("training", what, "no time was left")
                        continue
                    try:
                        _train(bench, name, kind, precision, dtype, rates[precision])
                    except torch.OutOfMemoryError:
                        bench.skip("training", what, "the memory of the card is too small")


def _train(
    bench: Bench, name: str, kind: str, precision: str, dtype: torch.dtype, rate: float
) -> None:
    cuda, device = bench.measured, bench.device
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    torch._dynamo.reset()
    run, images = work(name, kind, None if dtype is torch.float32 else dtype, bench)
    for _ in range(3 if cuda else 1):
        run()  # makes the optimizer's state, chooses kernels, compiles
    timer = Timer(device)
    seconds = statistics.median(timer(run) for _ in range(5 if cuda else 1)) / images
    share = flops_per_example(build(name, classes=10).to(device), device) / seconds / rate
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else 0.0
    bench.tell(
        "training",
        f"{name}, {precision}, {kind}",
        speed=f"{1.0 / seconds:.0f} images/s",
        share=f"{share:.1%} of the matrix rate",
        memory=f"{memory:.2f} GiB",
    )


def recurrent(bench: Bench) -> None:
    """Print cuDNN's gradient of weights with rank-1 factors beside the CPU's, and speeds.

    Parameters
    ----------
    bench : Bench
    """
    hidden, rows, length, members = (500, 64, 200, 10) if bench.measured else (8, 2, 5, 2)
    torch.manual_seed(0)
    model = build("lstm_lm", classes=205, hidden=hidden)
    add_rank1(model, "lstm.*")
    text = torch.randint(205, (members, 2, rows, length))

    def loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(output.flatten(0, 1), targets.flatten())

    def gradient(net: torch.nn.Module, part: torch.Tensor) -> torch.Tensor:
        net.zero_grad()
        loss(net(part[0]), part[1]).backward()
        found = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        return found.cpu()

    few = text[0, :, :4]
    expected = gradient(model, few)
    model.to(bench.device)
    text = text.to(bench.device)
    gap = float((gradient(model, text[0, :, :4]) - expected).norm() / expected.norm())
    bench.tell("LSTM", "gradient on the card", gap=f"{gap:.1e} of the CPU's")
    batches = [(part[0], part[1]) for part in text]
    base = torch.optim.Adam(model.parameters(), lr=1e-3)

    def plain() -> None:
        for x, y in batches:
            base.zero_grad(set_to_none=True)
            loss(model(x), y).backward()
            base.step()

    timer, rounds = Timer(bench.device), 10 if bench.measured else 1

    def tell(what: str, run: Callable[[], Any]) -> None:
        run()
        seconds = statistics.median(timer(run) for _ in range(rounds))
        bench.tell("LSTM", what, speed=f"{members * rows * length / seconds:.3g} symbols/s")

    tell("base", plain)
    late = LatePhase(model, members, "rank1", gamma="mean")
    own = late.optimizer_like(base)
    for kind in ("sequential", "fused"):
        fused = kind == "fused"
        tell(kind, lambda fused=fused: late.step(batches, loss, base, own, fused=fused))


def monte_carlo(bench: Bench) -> None:
    """Print the speed of Monte Carlo beside that of the generator alone.

    Parameters
    ----------
    bench : Bench
    """
    from neural.quadratic.sample import sample
    from nqm import SGD, Problem, constant
    from nqm.problems.spectra import harmonic

    d, replicas, steps = (1000, 32_000, 100) if bench.measured else (10, 4, 5)
    problem = Problem(harmonic(d), harmonic(d))
    program = constant(SGD(), 0.5, steps, batch_size=8)
    timer = Timer(bench.device)
    rounds = 3 if bench.measured else 1
    for precision, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        size = min(d * replicas, 2**23)

        def draw(dtype: torch.dtype = dtype, size: int = size) -> None:
            for _ in range(steps * d * replicas // size):
                torch.randn(size, device=bench.device, dtype=dtype)

        def run(precision: str = precision) -> None:
            sample(
                problem, program, [steps], replicas=replicas, device=str(bench.device),
                precision=precision,
            )  # fmt: skip

        draw()
        run()
        draws = min(timer(draw) for _ in range(rounds))
        walk = min(timer(run) for _ in range(rounds))
        count = d * replicas * steps
        bench.tell(
            "Monte Carlo",
            f"SGD, {d} directions, {precision}",
            speed=f"{count / walk / 1e9:.2f} G coordinate-steps/s",
            share=f"{draws / walk:.2f} of the generator's {count / draws / 1e9:.2f} G/s",
        )


def many_seeds(bench: Bench) -> None:
    """Print the comparison of base, SWA and late-phase weights over seeds.

    Parameters
    ----------
    bench : Bench
    """
    from neural.training.cli_options import make_runtime
    from neural.training.experiment import run_experiment
    from neural.training.recipe import load_recipe
    from nqm.errors import NQMError

    changes = ["evaluate.ood=[]", 'arm.swa.average.method="swa"']
    changes.append(f"arm.swa.average.start_epoch={12 if bench.measured else 2}")
    recipe = load_recipe("cifar10_q75_fast", "full" if bench.measured else "smoke", changes)
    arms = ("base", "swa", "late_phase")
    folder = bench.out / "fast"
    longest, table = 0.0, None
    try:
        runtime = make_runtime(str(bench.device), bench.root, None, trains=True)
        for seed in range(100 if bench.measured else 2):
            start = time.monotonic()
            if bench.left < 1.5 * longest + 5.0:
                break
            table = run_experiment(recipe, folder, runtime, arms=arms, seeds=[seed])
            longest = max(longest, time.monotonic() - start)
    except NQMError as error:  # no data
        bench.skip("seeds", "fast net", str(error))
    if table is None:
        return
    accuracy = table[(table["metric"] == "accuracy") & (table["data"] == "test")]
    accuracy = accuracy[(accuracy["member"] == -1) & (accuracy["seed"] >= 0)]
    wanted = {"base": "iterate", "swa": "swa", "late_phase": "averaged"}
    values = {
        arm: accuracy[(accuracy["arm"] == arm) & (accuracy["weights"] == wanted[arm])]
        .set_index("seed")["value"]
        for arm in arms
    }  # fmt: skip
    for arm, of_arm in values.items():
        gain = 100.0 * (of_arm - values["base"]).dropna()
        spread = gain.std() / max(len(gain), 1) ** 0.5
        bench.tell(
            "seeds",
            f"fast net, {arm}",
            seeds=f"{len(of_arm)}",
            accuracy=f"{100 * of_arm.mean():.3f} %",
            gain=f"{gain.mean():+.3f} +- {spread:.3f} points over base",
            longest=f"{longest:.1f} s a seed of three arms",
        )


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark.

    Parameters
    ----------
    arguments : list of str, optional
        Of the command line, by default.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--out", type=Path, default=Path("out/bench-gpu"))
    parser.add_argument("--data", type=Path, help="folder of data files")
    asked = parser.parse_args(arguments)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, asked.minutes, asked.out, asked.data)
    if bench.measured:
        torch.backends.cudnn.benchmark = True
        name = torch.cuda.get_device_name(device)
        print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    else:
        print("no GPU: everything runs once on small sizes, and nothing is measured")
    for part in (recurrent, training, monte_carlo, many_seeds):
        try:
            part(bench)
        except Exception as error:  # the other parts are worth their time on the card
            bench.skip(part.__name__, "", f"{type(error).__name__}: {error!s:.200}")
            if not bench.measured:
                raise
        finally:
            bench.write()
    print(f"{time.monotonic() - bench.begun:.0f} s; {asked.out / 'gpu.csv'}", file=sys.stderr)


if __name__ == "__main__":
    main()
