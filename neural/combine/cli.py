"""Commands of ``nqm neural`` that combine trained models; only click loads at the top."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from neural.training.cli_options import (
    check_alone,
    data_option,
    device_option,
    make_runtime,
    progress_bar,
    scale_option,
    threads_option,
)
from nqm.cli import OutFolder

if TYPE_CHECKING:
    from neural.combine.sources import Opened

Command = TypeVar("Command", bound=Callable[..., Any])


_out = click.option("--out", type=OutFolder(), help="Folder for results.")


@dataclass(frozen=True)
class _Sources:
    """Where members and their data are, as options say it."""

    where: tuple[str, ...]
    like: str | None
    scale: str
    ancestor: str | None
    device: str | None
    root: Path | None
    threads: int | None

    def open(self) -> Opened:
        """Find the members."""
        from neural.combine.sources import open_members

        runtime = make_runtime(self.device, self.root, self.threads)
        return open_members(
            self.where,
            like=self.like,
            ancestor=self.ancestor,
            runtime=runtime,
            scale=self.scale,
        )

    def folder(self, kind: str) -> Path:
        """Where results are kept if nothing is said."""
        from nqm.names import folder_name

        parts = Path(self.where[0].partition("#")[0]).parts[-3:]
        return Path("out", kind, folder_name("-".join(parts), "members"))


#: Ends of names of files that are not written, and that no folder has.
OTHER_FILES = (".pt", ".pth", ".bin", ".ckpt", ".th", ".pt2", ".onnx", ".npz")


def _sources(command: Callable[..., None]) -> Callable[..., None]:
    """Arguments and options by which members and their data are found."""
    options = (
        click.argument("where", metavar="MEMBER...", nargs=-1, required=True),
        click.option(
            "--like",
            metavar="RUN|RECIPE",
            help="Run or recipe with the members' architecture and data, for files of weights.",
        ),
        scale_option,
        click.option(
            "--ancestor",
            metavar="RUN|FILE",
            help="Model from which all were fine-tuned; the recipe's checkpoint by default.",
        ),
        device_option,
        data_option,
        threads_option,
    )

    @wraps(command)
    def given(**values: Any) -> None:
        own = {field.name: values.pop(field.name) for field in fields(_Sources)}
        command(_Sources(**own), **values)

    made: Callable[..., None] = given
    for option in reversed(options):
        made = option(made)
    return made


def _settings(tables: str, example: str) -> Callable[[Command], Command]:
    """Options that read settings from a file and change them.

    Parameters
    ----------
    tables : str
        Tables of the file, for the help.
    example : str
        A change, for the help.

    Returns
    -------
    callable
        Decorator of a command.
    """

    def add(command: Command) -> Command:
        change = click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help=f"Change a setting, e.g. --set {example} (repeatable).",
        )
        file = click.option(
            "--config",
            type=click.Path(dir_okay=False, path_type=Path),
            help=f"TOML file with the table {tables}.",
        )
        return file(change(command))

    return add


@click.command()
@_sources
@click.option(
    "--barrier",
    type=click.Choice(["mean", "first"]),
    help="Measure the barrier on the line from each to the members' mean, or to the first.",
)
@click.option(
    "--repair",
    type=click.Choice(["statistics", "none"]),
    default="statistics",
    show_default=True,
    help="statistics: on these lines BatchNorm statistics are computed anew.",
)
@click.option("--out", metavar="TABLE", help="Write a .parquet or .csv table.")
def members(
    sources: _Sources,
    barrier: str | None,
    repair: str,
    out: str | None,
) -> None:
    """Show where members lie: norm, distance from their mean, cosine, and test metrics of each.

    A MEMBER is the folder of a finished run, RUN#members (its late-phase members), RUN#snapshots, a
    pattern of runs in quotes, a file of weights, or a folder with model.safetensors.

    \b
    nqm neural members "out/neural/digits_bn-full/base/seed*"
    """
    from neural.combine.survey import survey
    from nqm.table import write_table

    check_alone("nqm neural members")
    opened = sources.open()
    with progress_bar() as bar:
        table = survey(opened, barrier, repair=repair, progress=bar)
    if out is not None:
        write_table(out, table, {"members": [one.name for one in opened.members]})
    click.echo(table.to_string(index=False, float_format=lambda value: f"{value:.4f}"))


@click.command()
@_sources
@click.option("--rule", default="uniform", show_default=True, help="How weights are merged.")
@click.option("--weights", metavar="W,W,...", help="Weights of the members instead of a rule.")
@click.option(
    "--held-out",
    type=float,
    default=0.2,
    show_default=True,
    help="Share of the test images on which rules choose.",
)
@click.option(
    "--align",
    type=click.Choice(["none", "weights", "activations"]),
    default="none",
    show_default=True,
    help="Put hidden units into the first member's order.",
)
@click.option(
    "--repair",
    type=click.Choice(["statistics", "rescale", "none"]),
    default="statistics",
    show_default=True,
    help="statistics: BatchNorm statistics anew from training data; rescale: REPAIR.",
)
@click.option("--out", required=True, metavar="FILE.safetensors")
def merge(
    sources: _Sources,
    rule: str,
    weights: str | None,
    held_out: float,
    align: str,
    repair: str,
    out: str,
) -> None:
    """Merge members into one model and write it as safetensors.

    \b
    nqm neural merge "out/neural/digits_bn-full/base/seed*" --rule greedy --out soup.safetensors
    """
    from neural.combine.survey import write_merged

    check_alone("nqm neural merge")
    opened = sources.open()
    share = None if weights is None else _numbers(weights)
    for line in write_merged(
        opened, out, rule, share, held_out=held_out, align=align, repair=repair
    ):
        click.echo(line)


@click.command()
@_sources
@click.option(
    "--pool",
    type=click.Choice(["probabilities", "logits"]),
    default="probabilities",
    show_default=True,
    help="What is averaged.",
)
@click.option(
    "--weights",
    metavar="W,W,...|NAME",
    help="Weights of the members; or what they are chosen by: accuracy, inverse_loss, best.  "
    "[default: equal]",
)
@click.option(
    "--held-out",
    type=float,
    default=0.2,
    show_default=True,
    help="Share of the test images on which weights are chosen; the others are judged.",
)
def ensemble(
    sources: _Sources,
    pool: str,
    weights: str | None,
    held_out: float,
) -> None:
    """Test metrics of the members' pooled predictions.

    \b
    nqm neural ensemble "out/neural/digits_bn-full/base/seed*" --pool logits
    nqm neural ensemble "out/neural/digits_bn-full/base/seed*" --weights accuracy
    """
    from neural.combine.survey import pooled_metrics

    check_alone("nqm neural ensemble")
    opened = sources.open()
    share: tuple[float, ...] | str | None = weights
    if weights is not None and not weights.strip().isidentifier():
        share = _numbers(weights)
    for name, value in pooled_metrics(opened, pool, share, held_out=held_out).items():
        click.echo(f"{name:12s} {value:.4f}")


@click.command()
@_sources
@click.option(
    "--out",
    required=True,
    metavar="FOLDER|FILE",
    help="Folder to make; or a file that ends in .safetensors.",
)
@click.option(
    "--member", type=int, help="Write this member of a RUN, counted from 0, not its single model."
)
@click.option(
    "--license",
    metavar="NAME",
    help="Licence of the weights for the model card, e.g. apache-2.0.  [default: unknown]",
)
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["pt2", "onnx"]),
    help="Also write the model as a program: torch.export, or ONNX (repeatable).",
)
@click.option(
    "--for", "tool", type=click.Choice(["mergekit"]), help="Write files for this software."
)
@click.option("--method", help="Method of mergekit.  [default: linear]")
@click.option("--weights", metavar="W,W,...", help="Weights of the members; the method's own else.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change a parameter of the method, e.g. --set density=0.3 (repeatable).",
)
def export(
    sources: _Sources,
    out: str,
    member: int | None,
    license: str | None,
    formats: tuple[str, ...],
    tool: str | None,
    method: str | None,
    weights: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Write the single model of a finished run to be served, or MEMBERs for other software.

    The folder holds weights (safetensors), preprocessing, metrics and a model card, and
    neural.load_exported loads it. If --out ends in .safetensors, the weights alone are written.
    Names of weights are those of the architecture. With --for mergekit, members and ancestor are
    written into a folder with the file by which mergekit-pytorch merges them.

    \b
    nqm neural export out/neural/digits_bn-full/late_phase/seed0 --out digits --license mit
    nqm neural export out/neural/digits_bn-full/late_phase/seed0 --out digits.safetensors
    nqm neural export "out/x/base/seed*" --for mergekit --method ties --out out/mergekit
    """
    from nqm.errors import NQMError

    check_alone("nqm neural export")
    served = {"--license": license, "--format": formats or None}
    if tool is None:
        merging = {"--method": method, "--weights": weights, "--set": overrides or None}
        merging |= {"--like": sources.like, "--ancestor": sources.ancestor}
        if given := _given(merging):
            raise NQMError(
                f"{given} is for exporting with --for; add --for mergekit or leave it out"
            )
        if len(sources.where) != 1:
            raise NQMError(f"one RUN is exported at a time; got {len(sources.where)}; add --for")
        if Path(out).suffix in (".safetensors", *OTHER_FILES):
            if given := _given(served):
                raise NQMError(f"{given} is for a folder; got --out {out}")
            from neural.training.load_run import export as write

            click.echo(write(sources.where[0], out, member))
            return
        from neural.training.export import export_run

        path = export_run(
            sources.where[0],
            out,
            member=member,
            license=license or "unknown",
            formats=formats,
            root=sources.root,
        )
        click.echo(path)
        return
    if member is not None:
        raise NQMError("--member is for one RUN; members of a run are RUN#members")
    if given := _given(served):
        raise NQMError(f"{given} is for exporting one RUN; leave it or --for out")
    from neural.combine.export import for_mergekit

    share = None if weights is None else _numbers(weights)
    settings = dict(map(_setting, overrides))
    opened = sources.open()
    written = for_mergekit(
        opened.members, out, method or "linear", weights=share, settings=settings
    )
    for path in written:
        click.echo(path)


def _given(options: dict[str, Any]) -> str | None:
    """The first option that has a value."""
    return next((name for name, value in options.items() if value is not None), None)


@click.command()
@_sources
@_settings("[combine] and, for options of rules, [rule.NAME]", "combine.held_out=0.1")
@click.option("--rules", metavar="R,R,...", help="Rules that merge weights.")
@click.option("--shift", "shifts", multiple=True, help="A corruption, or corruptions (repeatable).")
@click.option("--predict/--no-predict", default=None, help="Predict losses from derivatives.")
@click.option("--growth", is_flag=True, help="Judge the soups and ensembles of fewer members too.")
@_out
def compare(
    sources: _Sources,
    config: Path | None,
    overrides: tuple[str, ...],
    rules: str | None,
    shifts: tuple[str, ...],
    predict: bool | None,
    growth: bool,
    out: Path | None,
) -> None:
    """Compare every way of combining MEMBERs: soups, ensembles, single models, in one table.

    Predicted losses stand beside the measured ones. The command can be killed at any moment; the
    same command then continues where it stopped.

    \b
    nqm neural compare "out/neural/digits_bn-full/base/seed*" --rules uniform,greedy,fisher
    """
    from neural.combine.config import load_config
    from neural.combine.studies import run_compare, run_growth

    check_alone("nqm neural compare")
    asked = {
        "rules": _listed(rules),
        "shifts": list(shifts) or None,
        "predict": predict,
    }
    settings, chosen = load_config(config, [*overrides, *_own("combine", asked)])
    opened = sources.open()
    folder = out or sources.folder("combine")
    with progress_bar() as told:
        table, lines = run_compare(opened, settings, chosen, folder, progress=told)
        if growth:
            lines += run_growth(opened, settings, folder, progress=told)
    shown = [
        "rule",
        "space",
        "repair",
        "data",
        "members",
        "accuracy",
        "nll",
        "nll_tuned",
        "ambiguity",
        "passes",
        "predicted",
    ]
    text = table.loc[table["rule"] != "member", shown]
    click.echo(text.to_string(index=False, float_format=lambda v: f"{v:.4f}", na_rep=""))
    for line in lines:
        click.echo(line)


@click.command("low-precision")
@_sources
@_settings("[low_precision]", "low_precision.held_out=0.1")
@click.option("--bits", metavar="B,B,...", help="Bits of a weight, each studied.")
@click.option("--draws", type=int, help="Most members of an ensemble.")
@click.option("--rounding", metavar="R,R,...", help="Of stochastic, nearest, antithetic, gaussian.")
@click.option(
    "--granularity", type=click.Choice(["channel", "tensor"]), help="What has a pitch of its own."
)
@click.option("--predict/--no-predict", default=None, help="Predict losses from derivatives.")
@_out
def low_precision(
    sources: _Sources,
    config: Path | None,
    overrides: tuple[str, ...],
    bits: str | None,
    draws: int | None,
    rounding: str | None,
    granularity: str | None,
    predict: bool | None,
    out: Path | None,
) -> None:
    """Pool low-precision draws of one MEMBER: its weights rounded at random, many times.

    The table has the model itself, its rounding to nearest, ensembles and the mean of the draws,
    with bits and passes that each costs, and losses that derivatives at the model predict. The
    command can be killed at any moment; the same command then continues where it stopped.

    \b
    nqm neural low-precision out/neural/digits_bn-full/base/seed0 --bits 6,5,4 --draws 8
    """
    from neural.combine.config import load_section
    from neural.combine.low_precision import LowPrecisionConfig
    from neural.combine.studies import run_low_precision

    check_alone("nqm neural low-precision")
    asked = {
        "bits": None if bits is None else [_whole("--bits", one) for one in bits.split(",")],
        "draws": draws,
        "rounding": _listed(rounding),
        "granularity": granularity,
        "predict": predict,
    }
    settings = load_section(
        LowPrecisionConfig, "low_precision", config, [*overrides, *_own("low_precision", asked)]
    )
    opened = sources.open()
    folder = out or sources.folder("low_precision")
    with progress_bar() as told:
        table, lines = run_low_precision(opened, settings, folder, progress=told)
    shown = [
        "rule",
        "rounding",
        "grid_bits",
        "members",
        "bits",
        "accuracy",
        "nll",
        "nll_tuned",
        "ambiguity",
        "predicted",
        "predicted_ambiguity",
    ]
    text = table[shown]
    click.echo(text.to_string(index=False, float_format=lambda v: f"{v:.4f}", na_rep=""))
    for line in lines:
        click.echo(line)


@click.command()
@_sources
@_settings("[curve]", "curve.lr=0.1")
@click.option("--kind", type=click.Choice(["bezier", "chain"]), help="Form of the curve.")
@click.option("--bends", type=int, help="Control points between the ends.")
@click.option("--epochs", type=int, help="Of training the bends.")
@click.option("--points", type=int, help="Values of t at which the curve is judged.")
@click.option("--plane", type=int, help="Points along a side of the plane through the bend.")
@_out
def curve(
    sources: _Sources,
    config: Path | None,
    overrides: tuple[str, ...],
    kind: str | None,
    bends: int | None,
    epochs: int | None,
    points: int | None,
    plane: int | None,
    out: Path | None,
) -> None:
    """Train a curve of low loss between two MEMBERs, and judge it beside the straight line.

    The command can be killed at any moment; the same command then continues bit for bit.

    \b
    nqm neural curve out/A out/B --kind bezier --bends 1 --epochs 30 --points 61 --out curve
    """
    from neural.combine.config import load_section
    from neural.combine.curve import CurveConfig
    from neural.combine.studies import run_curve

    check_alone("nqm neural curve")
    asked = {"kind": kind, "bends": bends, "epochs": epochs, "points": points, "plane": plane}
    settings = load_section(CurveConfig, "curve", config, [*overrides, *_own("curve", asked)])
    opened = sources.open()
    with progress_bar() as told:
        table, lines = run_curve(opened, settings, out or sources.folder("curve"), progress=told)
    click.echo(table.to_string(index=False, float_format=lambda v: f"{v:.4f}"))
    for line in lines:
        click.echo(line)


@click.command()
@_sources
@click.option(
    "--points",
    type=click.IntRange(2),
    default=21,
    show_default=True,
    help="Points along either side.",
)
@click.option(
    "--repair",
    type=click.Choice(["statistics", "none"]),
    default="statistics",
    show_default=True,
    help="statistics: BatchNorm statistics anew at every point.",
)
@_out
def plane(
    sources: _Sources,
    points: int,
    repair: str,
    out: Path | None,
) -> None:
    """Test loss and error on the plane through three MEMBERs.

    \b
    nqm neural plane out/A out/B curve/bend1.safetensors --out plane
    """
    from neural.combine.studies import run_plane

    check_alone("nqm neural plane")
    opened = sources.open()
    with progress_bar() as told:
        lines = run_plane(opened, points, repair, out or sources.folder("plane"), progress=told)
    for line in lines:
        click.echo(line)


@click.command()
@_settings("[gates]", "gates.domain=tweets")
@click.option("--members", metavar="M,M,...", help="Classifiers that are weighed.")
@click.option("--texts", type=int, help="Texts in use; 0: all.")
@data_option
@threads_option
@_out
def gates(
    config: Path | None,
    overrides: tuple[str, ...],
    members: str | None,
    texts: int | None,
    root: Path | None,
    threads: int | None,
    out: Path | None,
) -> None:
    """Weigh text classifiers: equally, by accuracy, and by gates that see the text.

    Sentences with the sentiment that people hear in them are the data. The table has shallow, semi
    and deep ensembles (Tyagi et al. 2023) beside equal weights, with paired intervals, and what
    people achieve. The command can be killed at any moment; the same command then continues where
    it stopped.

    \b
    nqm neural gates --set gates.domain=tweets --out out/gates
    """
    from neural.combine.config import load_section
    from neural.combine.text_ensembles import GatesConfig, run_gates

    check_alone("nqm neural gates")
    asked = {
        "members": _listed(members),
        "texts": texts,
    }
    settings = load_section(GatesConfig, "gates", config, [*overrides, *_own("gates", asked)])
    runtime = make_runtime(None, root, threads)
    folder = out or Path("out", "gates", settings.domain)
    with progress_bar() as told:
        table, lines = run_gates(settings, folder, root=runtime.root, progress=told)
    shown = [
        "rule",
        "member",
        "accuracy",
        "macro_f1",
        "kappa",
        "nll",
        "nll_tuned",
        "passes",
        "accuracy_gain",
        "mcnemar_p",
    ]
    text = table[shown]
    click.echo(text.to_string(index=False, float_format=lambda v: f"{v:.4f}", na_rep=""))
    for line in lines:
        click.echo(line)


def _listed(text: str | None) -> list[str] | None:
    """Names that a comma divides."""
    return None if text is None else [one.strip() for one in text.split(",")]


def _own(section: str, asked: Mapping[str, Any]) -> list[str]:
    """Options of the command as changes of settings."""
    return [f"{section}.{n}={json.dumps(v)}" for n, v in asked.items() if v is not None]


def _whole(option: str, text: str) -> int:
    from nqm.errors import NQMError, shown

    try:
        return int(text)
    except ValueError:
        raise NQMError(
            f"{option} must be whole numbers between commas, as 6,5,4; got {shown(text)}"
        ) from None


def _numbers(text: str) -> tuple[float, ...]:
    from nqm.errors import NQMError, shown

    try:
        return tuple(float(one) for one in text.split(","))
    except ValueError:
        raise NQMError(
            f"--weights must be numbers between commas, as 0.5,0.5; got {shown(text)}"
        ) from None


def _setting(text: str) -> tuple[str, float]:
    from nqm.errors import NQMError, shown

    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise NQMError(f"--set must be NAME=NUMBER, as density=0.3; got {shown(text)}") from None


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="COMPARISON...")
@_out
def ranking(folders: tuple[str, ...], out: Path | None) -> None:
    """How often theory has the right order of ways, over finished COMPARISONs.

    A COMPARISON is the folder of `nqm neural compare`.

    \b
    nqm neural ranking out/combined out/snapshots --out out/ranking
    """
    from neural.combine.studies import run_ranking

    check_alone("nqm neural ranking")
    table, lines = run_ranking(folders, out)
    click.echo(table.to_string(index=False, float_format=lambda x: f"{x:.4f}"))
    for line in lines:
        click.echo(line)
