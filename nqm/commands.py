"""Commands on what is best and possible, of single runs too: edge, optimize, soup, versus, fit ...

They read the same files as ``nqm run``. This module imports only click at the top.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nqm.cli import deliver, numbers, options, progress_bar

if TYPE_CHECKING:
    import pandas as pd

    from nqm.problems.quadratic import Problem
    from nqm.program import Phase
    from nqm.runs.config import Run
    from nqm.soups import Soup
    from nqm.table import Stamp
    from nqm.versus import Versus


def _opened(file: str, overrides: tuple[str, ...], command: dict[str, Any]) -> tuple[Run, Stamp]:
    """The run that a file describes, and the stamp of a table of this command."""
    from nqm.runs import config, toml

    mapping = toml.load_one(file, overrides)
    folder = Path(file).parent
    job = config.build(mapping, folder)
    return job, config.stamp({**mapping, "command": command}, folder)


def _one_phase(job: Run, command: str) -> Phase:
    from nqm.errors import NQMError

    if len(job.program.phases) != 1:
        raise NQMError(f"{command} needs a program of one phase; got {len(job.program.phases)}")
    return job.program.phases[0]


@click.command("edge")
@options("file", "set", "out", "json")
def edge(file: str, overrides: tuple[str, ...], out: str | None, as_json: bool) -> None:
    """Compute the stability edge of every phase.

    It is the least constant learning rate at which some direction is unstable. Late-phase weights
    keep their ratio of member_lr to lr.

    \b
    nqm edge late.toml
    nqm edge late.toml --set phase.0.algorithm=heavy_ball --json
    """
    job, stamp = _opened(file, overrides, {"name": "edge"})
    deliver(lambda: _edges(job), stamp, as_json, out)


def _edges(job: Run) -> pd.DataFrame:
    import numpy as np
    import pandas as pd

    from nqm.algorithms import ROSTER
    from nqm.errors import NQMError
    from nqm.limits import check_memory
    from nqm.tuning.stability import stability_edge

    names = {kind: name for name, kind in ROSTER.items()}
    rows = []
    for index, phase in enumerate(job.program.phases):
        if not phase.constant:
            check_memory(f"phase.{index}.steps", phase.steps, 4.0 * phase.steps)
        rates = phase.settings(0, 1 if phase.constant else phase.steps)
        ratio = 1.0
        if phase.algorithm.rate_count == 2:
            ratios = rates[:, 1][rates[:, 0] > 0] / rates[:, 0][rates[:, 0] > 0]
            ratio = float(ratios[0])
            if not np.allclose(ratios, ratio, rtol=1e-9):
                raise NQMError(
                    f"phase.{index}: the edge needs member_lr in proportion to lr; their ratio "
                    f"ranges from {ratios.min():g} to {ratios.max():g}"
                )
        found = stability_edge(
            job.problem,
            phase.algorithm,  # type: ignore[arg-type]  # others are refused there
            batch_size=float(rates[:, -1].min()),
            member_lr_ratio=ratio,
        )
        name = names[type(phase.algorithm)]
        rows.append((index, name, found, float(rates[:, 0].max())))
    return pd.DataFrame(rows, columns=["phase", "algorithm", "edge", "peak_lr"])


@click.command("critical-batch")
@options("file", "set")
@click.option("--target", type=float, required=True, help="Expected loss to reach.")
@click.option(
    "--batch-sizes",
    metavar="B,B,...",
    default="1,4,16,64,256,1024,4096",
    show_default=True,
    help="Batch sizes to fit; at least three must reach the target.",
)
@options("out", "json")
def critical_batch(
    file: str,
    overrides: tuple[str, ...],
    target: float,
    batch_sizes: str,
    out: str | None,
    as_json: bool,
) -> None:
    """Find the batch size beyond which larger batches save few steps.

    For every batch size the constant rate that reaches the target in the fewest steps; then the fit
    steps = least_steps (1 + critical / B). The phase's algorithm counts, and its steps are the
    largest number considered.

    \b
    nqm critical-batch sgd.toml --target 0.01
    nqm critical-batch sgd.toml --target 0.01 --batch-sizes 8,32,128 --out steps.csv
    """
    from nqm.tuning.critical_batch import critical_batch_size

    sizes = numbers("--batch-sizes", batch_sizes)
    stated = {"name": "critical-batch", "target": target, "batch_sizes": sizes}
    job, stamp = _opened(file, overrides, stated)
    phase = _one_phase(job, "critical-batch")

    def compute() -> pd.DataFrame:
        found = critical_batch_size(
            job.problem,
            phase.algorithm,  # type: ignore[arg-type]  # others are refused there
            target,
            sizes,
            max_steps=phase.steps,
        )
        return found.table.assign(
            critical=found.critical,
            least_steps=found.least_steps,
            least_examples=found.least_examples,
        )

    deliver(compute, stamp, as_json, out)


@click.command("optimize")
@options("file", "set")
@click.option(
    "--pieces", type=int, default=10, show_default=True, help="Pieces of equal length, a rate each."
)
@click.option(
    "--highest-lr",
    type=float,
    help="Upper bound of the rates, e.g. the stability edge; free by default.",
)
@click.option(
    "--within",
    type=float,
    default=0.01,
    show_default=True,
    help="Relative rise of the loss that the interval of each rate allows.",
)
@click.option(
    "--free",
    metavar="NAME,NAME,...",
    default="lr",
    show_default=True,
    help="What is optimised: lr, momentum, decay (of an average) and batch_size, or all.",
)
@options("out", "json")
def optimize(
    file: str,
    overrides: tuple[str, ...],
    pieces: int,
    highest_lr: float | None,
    within: float,
    free: str,
    out: str | None,
    as_json: bool,
) -> None:
    """Find the piecewise-constant learning rates of SGD with the least final loss.

    The file has one phase of SGD, whose steps and batch size count; its rate does not. The regret
    is the loss above what no linear method could beat. With --free the momentum of heavy ball, the
    decay of an exponential average and the batch sizes, of the same examples in all, are optimised
    as well.

    \b
    nqm optimize sgd.toml --pieces 5
    nqm optimize sgd.toml --pieces 5 --highest-lr 2 --out schedule.csv
    nqm optimize sgd.toml --pieces 5 --free all
    """
    from nqm.algorithms.optimizers import SGD
    from nqm.errors import NQMError
    from nqm.schedule import Constant
    from nqm.tuning.schedule import best_piecewise

    stated = {"name": "optimize", "pieces": pieces, "highest_lr": highest_lr, "within": within}
    names = tuple(name.strip() for name in free.split(","))
    if names != ("lr",):
        stated["free"] = free
    job, stamp = _opened(file, overrides, {k: v for k, v in stated.items() if v is not None})
    problem, phase = job.additive("optimize"), _one_phase(job, "optimize")
    if phase.algorithm != SGD():
        name = type(phase.algorithm).__name__
        raise NQMError(f"optimize knows schedules of sgd only; got phase.0.algorithm = {name}")
    if not isinstance(phase.batch_size, Constant):
        raise NQMError("optimize needs a constant phase.0.batch_size; give a number")
    batch_size = float(phase.batch_size(0))

    def compute() -> pd.DataFrame:
        import numpy as np
        import pandas as pd

        from nqm.tuning.information import information_bound

        if names != ("lr",):
            return _joint(problem, phase, pieces, names, highest_lr, within)
        best = best_piecewise(
            problem, pieces, phase.steps, batch_size, highest_lr=highest_lr, within=within
        )
        bound = information_bound(problem, batch_size, phase.steps, methods="linear")
        ends, flat = np.cumsum(best.lengths), best.flat["lr"]
        table = pd.DataFrame(
            {"first": ends - best.lengths, "last": ends - 1, "lr": best.lr, "lr_low": flat.low,
             "lr_high": flat.high, "loss": best.loss, "bound": bound, "regret": best.loss - bound}
        )  # fmt: skip
        return table[best.lengths > 0].reset_index(drop=True)

    deliver(compute, stamp, as_json, out)


def _joint(
    problem: Problem,
    phase: Phase,
    pieces: int,
    names: tuple[str, ...],
    highest_lr: float | None,
    within: float,
) -> pd.DataFrame:
    """Settings of averaged heavy ball by piece."""
    import numpy as np
    import pandas as pd

    from nqm.tuning.joint import SETTINGS, best_linear

    free = SETTINGS if names == ("all",) else names
    size = float(phase.batch_size(0))  # type: ignore[operator]  # a schedule since it was built
    best = best_linear(
        problem, pieces, phase.steps, size, free=free, highest_lr=highest_lr, within=within
    )
    ends = np.cumsum(best.lengths)
    intervals = {
        f"{name}_{side}": getattr(flat, side)
        for name, flat in best.flat.items()
        for side in ("low", "high")
    }
    table = pd.DataFrame(
        {"first": ends - best.lengths, "last": ends - 1, "lr": best.lr, "momentum": best.momentum,
         "decay": best.decay, "batch_size": best.batch_size, "loss": best.loss,
         "bound": best.bound, "regret": best.regret}
    )  # fmt: skip
    return table.assign(**intervals)


@click.command("bound")
@options("file", "set", "out", "workers", "json")
def bound(
    file: str, overrides: tuple[str, ...], out: str | None, workers: int, as_json: bool
) -> None:
    """Compare a program with what no method could beat.

    At every record: the loss, the least loss of any linear method with the same examples, the loss
    above it (regret), and the least loss of any method at all.

    \b
    nqm bound late.toml
    nqm bound late.toml --set record.at=[300] --json
    """
    job, stamp = _opened(file, overrides, {"name": "bound"})
    problem = job.additive("bound")

    def compute() -> pd.DataFrame:
        from nqm.tuning.information import program_bound

        with progress_bar(job.work, "replicas" if job.method == "sample" else "steps") as progress:
            losses = job.solve(workers, progress).table()
        table = losses[["step", "examples", "loss"]].copy()
        least = program_bound(problem, job.program, job.at)
        table["bound"], table["regret"] = least, table["loss"] - least
        table["bound_any"] = program_bound(problem, job.program, job.at, methods="any")
        return table

    deliver(compute, stamp, as_json, out)


@click.command("soup")
@options("file", "set")
@click.option(
    "--runs",
    type=click.IntRange(min=1),
    help="Independent runs of the program, or of every cell of [sweep] (1).",
)
@click.option(
    "--snapshots", type=int, metavar="N", help="Ends of N cycles of the program, one after another."
)
@click.option(
    "--star", type=int, metavar="N", help="End of one cycle, and of N - 1 more that start there."
)
@click.option("--weights", is_flag=True, help="Show each ingredient's loss and weights instead.")
@options("out", "json")
def soup(
    file: str,
    overrides: tuple[str, ...],
    runs: int | None,
    snapshots: int | None,
    star: int | None,
    weights: bool,
    out: str | None,
    as_json: bool,
) -> None:
    """Average the ends of several runs: the uniform, greedy and best soup.

    Ingredients are the cells of the file's [sweep] table, e.g. over phase.0.lr, or --runs
    independent runs of its program. All start from the same weights.

    \b
    nqm soup rates.toml
    nqm soup late.toml --runs 8
    nqm soup cycle.toml --snapshots 6 --out soup.csv
    """
    from nqm.errors import NQMError
    from nqm.runs import config, toml
    from nqm.runs.sweep import Sweep
    from nqm.soups import check_ingredients

    if sum(one is not None for one in (runs, snapshots, star)) > 1:
        raise NQMError("--runs, --snapshots and --star exclude each other; give one")
    mapping = toml.load(file, overrides)
    folder = Path(file).parent
    labels = [""]
    if "sweep" in mapping:
        if snapshots is not None or star is not None:
            raise NQMError("--snapshots and --star are of one program; drop them or [sweep]")
        cells = Sweep.from_file(file, overrides)
        if any(
            part.strip().startswith("problem") for name in cells.axes for part in name.split(",")
        ):
            raise NQMError("the ingredients of a soup have one problem; sweep over phases only")
        cases = list(cells.cases())
        jobs = [config.build(case.mapping, folder) for case in cases]
        labels = [", ".join(f"{k}={v}" for k, v in case.values.items()) for case in cases]
    else:
        if runs is None and snapshots is None and star is None:
            raise NQMError(f"{file} has no [sweep] table; give --runs, --snapshots or --star")
        jobs = [config.build(mapping, folder)]
    problem, programs = jobs[0].additive("soup"), [job.program for job in jobs]
    copies, n = runs or 1, len(programs) * (runs or 1)
    check_ingredients("--runs", copies, problem, n)

    def compute() -> pd.DataFrame:
        from nqm.soups import Soup

        if snapshots is not None:
            made = Soup.of_snapshots(problem, programs[0], snapshots)
        elif star is not None:
            made = Soup.of_star(problem, programs[0], star)
        else:
            made = Soup.of_runs(problem, [one for one in programs for _ in range(copies)])
        named = [label for label in labels for _ in range(made.ingredients // len(labels))]
        return _ingredients(made, named) if weights else _recipes(made)

    options = {"runs": copies, "snapshots": snapshots, "star": star, "weights": weights}
    stated = {"name": "soup"} | {k: v for k, v in options.items() if v is not None}
    deliver(compute, config.stamp({**mapping, "command": stated}, folder), as_json, out)


def _rules(made: Soup) -> dict[str, Any]:
    """Weights of each rule, shape (N,); of one ingredient there is no choice."""
    found = {"uniform": made.uniform(), "greedy": made.greedy()}
    if made.ingredients == 1:
        return found
    return found | {"nonnegative": made.optimal(nonnegative=True), "optimal": made.optimal()}


def _recipes(made: Soup) -> pd.DataFrame:
    import numpy as np
    import pandas as pd

    own = np.diag(made.moment)
    rows = [("mean_ingredient", 1, own.mean()), ("best_ingredient", 1, own.min())]
    for rule, share in _rules(made).items():
        rows.append((rule, int(np.count_nonzero(share)), made.loss(share)))
    return pd.DataFrame(rows, columns=["rule", "ingredients", "loss"])


def _ingredients(made: Soup, names: list[str]) -> pd.DataFrame:
    import numpy as np
    import pandas as pd

    numbered = [f"{i}: {name}" if name else str(i) for i, name in enumerate(names)]
    return pd.DataFrame({"ingredient": numbered, "loss": np.diag(made.moment), **_rules(made)})


@click.command("versus")
@options("file")
@click.argument("other", type=click.Path(dir_okay=False), metavar="OTHER.toml")
@options("set")
@click.option(
    "--level", type=float, default=0.05, show_default=True, help="Two-sided level of the test."
)
@click.option(
    "--power", type=float, default=0.9, show_default=True, help="Probability that it succeeds."
)
@click.option(
    "--streams",
    type=click.Choice(["own", "common"]),
    default="own",
    show_default=True,
    help="Independent runs, or pairs of one start and the same minibatches.",
)
@click.option(
    "--replicas",
    type=click.IntRange(min=1),
    help="Draw so many runs, for the probability of a lower loss at every record of FILE.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of those.")
@options("out", "json")
def versus(
    file: str,
    other: str,
    overrides: tuple[str, ...],
    level: float,
    power: float,
    streams: str,
    replicas: int | None,
    seed: int,
    out: str | None,
    as_json: bool,
) -> None:
    """Compute which of two programs has the lower loss in one run, and the runs that show it.

    At the end of both: the probability that a run of FILE has a lower loss than one of OTHER, the
    difference of their means, and the number of runs of each with which Welch's test tells the
    means apart; with common streams the number of pairs for a paired test. --set changes FILE.

    \b
    nqm versus cosine.toml wsd.toml
    nqm versus sgd.toml sgd.toml --set phase.0.lr=0.2 --json
    nqm versus cosine.toml wsd.toml --streams common --replicas 10000
    """
    second, theirs = _opened(other, (), {})
    stated = {"name": "versus", "level": level, "power": power, "other": theirs.config}
    stated |= {"streams": streams} if streams != "own" else {}
    stated |= {"replicas": replicas, "seed": seed} if replicas else {}
    job, stamp = _opened(file, overrides, stated)

    def compute() -> pd.DataFrame:
        import pandas as pd

        from nqm.errors import NQMError
        from nqm.versus import compare_runs

        if streams == "common" or replicas:
            return _joint_versus(job, second, (level, power), streams, replicas, seed)
        laws = []
        for name, one in ((file, job), (other, second)):
            end = replace(one, at=[one.program.steps], quantiles=(), bound=False)
            result = end.solve()
            law = next(result.distributions())
            if law is None or result.status[0] != "finished":
                raise NQMError(f"{name}: the program diverges, so that its loss has no mean")
            laws.append(law)
        found = compare_runs(*laws, level=level, power=power)
        return pd.DataFrame(_versus_row(laws[0].mean, laws[1].mean, found), index=[0])

    deliver(compute, stamp, as_json, out)


def _versus_row(loss: float, other_loss: float, found: Versus) -> dict[str, float]:
    runs, ordered = (float("nan") if n is None else n for n in (found.runs, found.ordered_runs))
    return {
        "loss": loss,
        "other_loss": other_loss,
        "probability": found.probability,
        "difference": found.difference,
        "difference_sd": found.difference_sd,
        "runs": runs,
        "ordered_runs": ordered,
    }


def _joint_versus(
    job: Run,
    second: Run,
    test: tuple[float, float],
    streams: str,
    replicas: int | None,
    seed: int,
) -> pd.DataFrame:
    """Row of `versus` by the joint law of both programs."""
    import numpy as np
    import pandas as pd

    from nqm.errors import NQMError
    from nqm.joint_law import joint_losses

    problem, other = (one.additive("versus") for one in (job, second))
    names = ("curvature", "noise_variance", "multiplicity", "initial_mean", "initial_variance",
             "minimum")  # fmt: skip
    if not all(np.array_equal(getattr(problem, name), getattr(other, name)) for name in names):
        raise NQMError("--streams common and --replicas need one problem in both files")
    programs = job.program, second.program
    end = max(program.steps for program in programs)
    at = job.program.recorded(job.at)
    joint = joint_losses(problem, programs, sorted({*at, end}), streams=streams)
    level, power = test
    found = joint.compare(level=level, power=power)
    row = _versus_row(float(joint.loss[0, -1]), float(joint.loss[1, -1]), found)
    if replicas:
        always = joint.draw(replicas, seed=seed).always_below()
        row |= {"always_below": always.probability, "always_low": always.low,
                "always_high": always.high}  # fmt: skip
    return pd.DataFrame(row, index=[0])


@click.command("time-to-target")
@options("file", "set")
@click.option("--target", type=float, required=True, help="Loss that a run is to reach.")
@click.option(
    "--replicas",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Runs that are drawn.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of those.")
@options("out", "json")
def time_to_target(
    file: str,
    overrides: tuple[str, ...],
    target: float,
    replicas: int,
    seed: int,
    out: str | None,
    as_json: bool,
) -> None:
    """Estimate when single runs of a program reach a loss.

    At every record: the expected loss, and the probability that a run was at the target at this
    record or an earlier one, with its 95 % interval. Runs are drawn at the records only.

    \b
    nqm time-to-target sgd.toml --target 0.05
    nqm time-to-target late.toml --target 0.05 --set record.at=[100,200,300]
    """
    stated = {"name": "time-to-target", "target": target, "replicas": replicas, "seed": seed}
    job, stamp = _opened(file, overrides, stated)
    problem = job.additive("time-to-target")

    def compute() -> pd.DataFrame:
        from nqm.joint_law import joint_losses

        joint = joint_losses(problem, job.program, job.at)
        table = joint.draw(replicas, seed=seed).time_to_target(target)
        table.insert(1, "examples", job.program.examples(table["step"].tolist()))
        table.insert(2, "loss", joint.loss[0])
        return table

    deliver(compute, stamp, as_json, out)


@click.command("fit")
@click.argument("logs", nargs=-1, required=True, metavar="LOG.csv PROGRAM.toml ...")
@click.option(
    "--forecast",
    "other",
    type=click.Path(dir_okay=False),
    metavar="PROGRAM.toml",
    help="Forecast the loss of this program from the same start.",
)
@click.option("--column", default="loss", show_default=True, help="Column of the logged losses.")
@click.option(
    "--averaged",
    is_flag=True,
    help="Each loss is a mean over the steps since the record before; it counts in their middle.",
)
@click.option(
    "--first",
    type=int,
    default=0,
    show_default=True,
    help="Step before which records are left out.",
)
@click.option("--level", type=float, default=0.95, show_default=True, help="Of the band.")
@click.option("--problem", metavar="TABLE", help="Write the problem for `problem.file`.")
@options("out", "json")
def fit(
    logs: tuple[str, ...],
    other: str | None,
    column: str,
    averaged: bool,
    first: int,
    level: float,
    problem: str | None,
    out: str | None,
    as_json: bool,
) -> None:
    """Fit a noisy quadratic problem to logged loss curves, and forecast another program.

    Each LOG has a column step and one of losses, and is followed by the file whose phases it ran.
    Logs of one start under two schedules say more than one log: the band shows what they leave
    open. Without --forecast the records stand beside the fit.

    \b
    nqm fit constant.csv constant.toml cosine.csv cosine.toml --forecast wsd.toml
    nqm fit RUN/log.csv constant.toml --column train_loss --averaged --first 100
    """
    from nqm.errors import NQMError
    from nqm.loss_curves import Log, fit_loss_curves
    from nqm.table import write_table

    if len(logs) % 2:
        raise NQMError(f"each LOG is followed by its PROGRAM.toml; got {len(logs)} files")
    read = []
    stated: dict[str, Any] = {"name": "fit", "level": level, "logs": [], "forecast": None}
    for table, file in zip(logs[::2], logs[1::2], strict=True):
        steps, losses = logged(table, column, averaged=averaged, first=first)
        program, mapping = program_of(file)
        read.append(Log(steps, losses, program.program))
        records = [list(map(float, steps)), list(map(float, losses))]
        stated["logs"].append({"program": mapping, "records": records})
    target = None
    if other is not None:
        target, stated["forecast"] = program_of(other)
    from nqm import __version__, keys
    from nqm.table import Stamp

    found = fit_loss_curves(*read)
    click.echo(
        f"a record's relative error {found.error:.2g}, floor {found.floor:.4g}, sharpest direction "
        f"with noise {found.sharpest_noise:.3g}",
        err=True,
    )
    if problem is not None:
        write_table(problem, found.problem_table(), {"floor": found.floor})
    stamp = Stamp(keys.key(stated), __version__, stated)

    def compute() -> pd.DataFrame:
        if target is None:
            return found.table()
        return found.forecast(target.program, target.at, level=level)

    deliver(compute, stamp, as_json, out)


def logged(
    path: str, column: str = "loss", *, averaged: bool = False, first: int = 0
) -> tuple[Any, Any]:
    """Read steps and losses of a log.

    Parameters
    ----------
    path : str
        A .csv or .parquet table.
    column : str
        Column of the losses; rows without one are left out.
    averaged : bool
        Whether a loss is a mean over the steps since the record before, to whose middle it then
        belongs. Means over less than half the usual number of steps are left out.
    first : int
        Step before which records are left out.

    Returns
    -------
    steps, losses : ndarray, shape (n,)

    Raises
    ------
    NQMError
        If a column is missing.
    """
    import numpy as np

    from nqm.errors import NQMError
    from nqm.table import read_table

    frame = read_table(path)
    for name in ("step", column):
        if name not in frame:
            raise NQMError(f"{path} has no column {name!r}; it has {', '.join(frame.columns)}")
    rows = frame[["step", column]].dropna()
    steps, losses = rows["step"].to_numpy(), rows[column].to_numpy()
    if averaged:
        before = np.concatenate(([0], steps[:-1]))
        lengths = steps - before
        kept = 2 * lengths >= np.median(lengths)
        steps, losses = (before + steps + 1)[kept] // 2, losses[kept]
    return steps[steps >= first], losses[steps >= first]


def program_of(file: str) -> tuple[Run, dict[str, Any]]:
    """Read a file's phases and records; its problem, if it has one, does not count.

    Parameters
    ----------
    file : str
        A TOML file.

    Returns
    -------
    run : Run
        With a problem of no meaning.
    mapping : dict of str to Any
        What it was built from.
    """
    from nqm.runs import config, toml

    mapping = toml.load_one(file) | {"problem": {"curvature": [1.0], "noise_variance": 1.0}}
    return config.build(mapping), mapping
