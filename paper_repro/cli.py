"""``nqm figure``, ``reproduce``, ``tables`` and ``plot``: only click is loaded at the top."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import click

from nqm.cli import OutFolder


class _Command(click.Command):
    """Draw into files only; the calling group reports a user's mistake."""

    needs: tuple[str, ...] = ("jinja2", "matplotlib", "sklearn")

    def invoke(self, ctx: click.Context) -> Any:
        from nqm.errors import check_installed

        check_installed(f"nqm {self.name}", "figures", *self.needs)
        import matplotlib as mpl

        mpl.use("Agg")  # the command line opens no window
        return super().invoke(ctx)


_out = click.option(
    "--out",
    type=OutFolder(),
    default=Path("out/paper"),
    show_default=True,
    help="Folder for tables, pictures and the report.",
)
_scale = click.option(
    "--scale",
    type=click.Choice(["full", "smoke"]),
    default="full",
    show_default=True,
    help="smoke: a small version of every figure, in seconds.",
)


@click.command(cls=_Command)
@click.argument("name")
@_out
@_scale
@click.option(
    "--table",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw this table (.parquet or .csv) and compute nothing.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="problem.KEY=VALUE",
    help="Draw the figure of another problem, e.g. --set problem.file=my.csv (repeatable).",
)
def figure(
    name: str, out: Path, scale: str, table: Path | None, overrides: tuple[str, ...]
) -> None:
    """Compute and draw the figure NAME, or only draw it with --table.

    `nqm list` shows the names. With --set the figure is drawn of another problem, stated as in the
    [problem] table of a configuration file; its files are called NAME-KEY.

    \b
    nqm figure switch
    nqm figure ranking --set problem.file=my.csv
    nqm figure rate_map --set 'problem.curvature=[1, 0.1]' --set problem.noise_variance=0.5
    """
    from paper_repro.build import build, redraw
    from paper_repro.study import Scale, find, on_problem

    find(name)
    problem = _problem(overrides)
    if problem is not None:
        on_problem(name, problem)
    _alone(out)
    if table is not None:
        paths = redraw(name, table, out)
    else:
        built = build(name, Scale(scale), out, problem)
        paths = (built.png, built.pdf)
        _verdict(built)
    for path in paths:
        click.echo(path)


def _problem(overrides: tuple[str, ...]) -> Any:
    """Problem that ``--set problem.KEY=VALUE`` states; None without any."""
    if not overrides:
        return None
    from nqm.errors import NQMError
    from nqm.runs import config, toml

    strange = [one for one in overrides if not one.startswith("problem.")]
    if strange:
        raise NQMError(f"--set changes the problem only, as problem.file=FILE; got {strange[0]}")
    mapping: dict[str, Any] = {"problem": {}}
    toml.override(mapping, overrides)
    return config.build_problem(mapping["problem"])


@click.command(cls=_Command)
@click.argument("name")
@_out
@_scale
def reproduce(name: str, out: Path, scale: str) -> None:
    """Draw the figure NAME, or a group of them, and write one page with every claim checked.

    Groups are `all`, the six figures of the paper on late-phase weights, `zhang2019`, `scaling` and
    `ranking`; `nqm list` shows the figures.

    A table of an earlier run in the folder is used again if its settings, version and code are the
    same. The exit code is 1 if a claim does not hold.
    """
    from nqm.files import check_replaceable
    from paper_repro.build import build_all, check_outputs
    from paper_repro.report import report_name, write_report
    from paper_repro.study import GROUPS, Scale, find, passed

    names = list(GROUPS.get(name, [name]))
    for one in names:
        find(one)
    check_outputs(names, out)
    check_replaceable(out / f"{report_name(names)}.html")
    _alone(out)
    click.echo(f"computing and drawing {', '.join(names)} ({scale})", err=True)
    done = {}
    with closing(build_all(names, Scale(scale), out)) as figures:  # an error ends its workers
        for built in figures:
            done[built.name] = built
            click.echo(f"[{len(done)}/{len(names)}] ", err=True, nl=False)
            _verdict(built)
    results = [done[one] for one in names]
    page = write_report(results, out)
    claims = [claim for result in results for claim in result.claims]
    held = passed(claims)
    click.echo(f"{held} claims passed, {len(claims) - held} failed")
    click.echo(f"report: {page}")
    if name == "all":
        others = {group: len(held) for group, held in GROUPS.items() if group != "all"}
        counted = ", ".join(f"{group} ({count})" for group, count in others.items())
        click.echo(f"not in this group: {counted}; nqm reproduce GROUP draws one", err=True)
    if held < len(claims):
        raise click.exceptions.Exit(1)


@click.command(cls=_Command)
@click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out/neural"),
    show_default=True,
    help="Folder of the experiments that `nqm neural train` has run.",
)
@click.option(
    "--saved",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out"),
    show_default=True,
    help="Folder below which tables of `nqm neural compare`, curve, clients, modules and the like "
    "are looked for.",
)
@_out
def tables(runs: Path, saved: Path, out: Path) -> None:
    """Compare tables of papers with the runs on disk, and write one page.

    Rows without a run at full scale are marked "not run". Combined models have no full scale here:
    what was saved stands beside a paper's number under the name of its folder.
    """
    from paper_repro.tables import load_tables
    from paper_repro.tables.collect import collect
    from paper_repro.tables.page import as_text, write_tables

    filled = collect(runs, load_tables(), saved)
    _alone(out)
    paths = write_tables(filled, out)
    click.echo(as_text(filled))
    for path in paths:
        click.echo(path)


class _Plot(_Command):
    needs = ("matplotlib", "seaborn")


@click.command(cls=_Plot)
@click.argument("table", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--x", metavar="COLUMN", help="Column of the x axis.")
@click.option("--y", metavar="COLUMN", help="Column of the y axis.")
@click.option("--hue", metavar="COLUMN", help="Column shown by colour; of a heatmap its value.")
@click.option("--col", metavar="COLUMN", help="Column with one panel for each value.")
@click.option("--style", metavar="COLUMN", help="Column shown by line style and marker.")
@click.option("--kind", metavar="KIND", help="line, scatter or heatmap.")
@click.option("--logx/--no-logx", default=None, help="Logarithmic x axis.")
@click.option("--logy/--no-logy", default=None, help="Logarithmic y axis.")
@click.option(
    "--where",
    "conditions",
    multiple=True,
    metavar="COLUMN=VALUE",
    help="Draw the rows with this value, or with one of several between commas (repeatable).",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Picture to write: .png, .pdf or .svg.  [default: the table's name with .png]",
)
def plot(table: Path, conditions: tuple[str, ...], out: Path | None, **stated: Any) -> None:
    """Draw columns of a TABLE of a run, a sweep or an experiment (.parquet or .csv).

    What is not stated follows from the table: time or the swept value on the x axis, the loss or
    another measured column on the y axis, and colours, panels and line styles for what else tells
    rows apart. Rows that differ by their seed alone are averaged, with a 95 % interval by Student's
    t, the members of one run before its seeds; rows that differ otherwise never are.

    \b
    nqm plot out/sweep.parquet
    nqm plot out/sweep.parquet --x lr --hue members --logx
    nqm plot out/sweep.parquet --kind heatmap
    nqm plot out/neural/digits_bn-full/results.parquet --where metric=nll,accuracy
    """
    from figures.columns import Choice, swept, where
    from figures.plot import check_picture, save
    from figures.plot import plot as draw
    from nqm.errors import NQMError
    from nqm.table import read_metadata, read_table

    pairs = [(name, value) for name, _, value in (one.partition("=") for one in conditions)]
    if not all("=" in one for one in conditions):
        raise NQMError(f"--where must be COLUMN=VALUE; got {', '.join(conditions)}")
    choice = Choice(**stated)
    out = table.with_suffix(".png") if out is None else out
    check_picture(out)
    frame, axes = read_table(table), read_metadata(table).get("axes", {})
    kept = where(frame, pairs)
    save(draw(kept, choice, swept(frame, axes)), out, table.name, choice)
    click.echo(out)


def _alone(out: Path) -> None:
    """Lock the folder until this command ends."""
    from nqm.files import locked

    click.get_current_context().with_resource(locked(out, folder=True))


def _verdict(built: Any) -> None:
    """Progress line of one figure, and the claims that failed."""
    from paper_repro.study import passed

    how = "drawn again" if built.reused else "computed"
    held, total = passed(built.claims), len(built.claims)
    claims = f"{held} of {total} claims hold" if total else "its claims are not of this problem"
    click.echo(f"{built.name}: {how} in {built.seconds:.1f} s, {claims}", err=True)
    for claim in built.claims:
        if not claim.passed:
            failed = f"  FAILED: {claim.text}: {claim.measured:.4g}, must be {claim.rule}"
            click.echo(failed, err=True)
