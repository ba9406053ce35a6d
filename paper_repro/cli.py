"""``nqm figure``, ``nqm reproduce`` and ``nqm tables``: only click is loaded at the top."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import click


class _Command(click.Command):
    """Draw into files only; the calling group reports a user's mistake."""

    def invoke(self, ctx: click.Context) -> Any:
        from nqm.errors import check_installed

        check_installed(f"nqm {self.name}", "figures", "jinja2", "matplotlib", "sklearn")
        import matplotlib as mpl

        mpl.use("Agg")  # the command line opens no window
        return super().invoke(ctx)


_out = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
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
def figure(name: str, out: Path, scale: str, table: Path | None) -> None:
    """Compute and draw the figure NAME, or only draw it with --table."""
    from paper_repro.build import build, redraw
    from paper_repro.study import Scale, find

    find(name)
    _alone(out)
    if table is not None:
        paths = redraw(name, table, out)
    else:
        built = build(name, Scale(scale), out)
        paths = (built.png, built.pdf)
        _verdict(built)
    for path in paths:
        click.echo(path)


@click.command(cls=_Command)
@click.argument("name")
@_out
@_scale
def reproduce(name: str, out: Path, scale: str) -> None:
    """Draw the figure NAME, or a group of them, and write one page with every claim checked.

    Groups are `all`, the figures of the paper on late-phase weights, and `zhang2019`.

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
@_out
def tables(runs: Path, out: Path) -> None:
    """Compare tables of papers with the runs on disk, and write one page.

    Rows without a run at full scale are marked "not run".
    """
    from paper_repro.tables import load_tables
    from paper_repro.tables.collect import collect
    from paper_repro.tables.page import as_text, write_tables

    filled = collect(runs, load_tables())
    _alone(out)
    paths = write_tables(filled, out)
    click.echo(as_text(filled))
    for path in paths:
        click.echo(path)


def _alone(out: Path) -> None:
    """Lock the folder until this command ends."""
    from nqm.files import locked

    click.get_current_context().with_resource(locked(out, folder=True))


def _verdict(built: Any) -> None:
    """Progress line of one figure, and the claims that failed."""
    from paper_repro.study import passed

    how = "drawn again" if built.reused else "computed"
    held, total = passed(built.claims), len(built.claims)
    click.echo(
        f"{built.name}: {how} in {built.seconds:.1f} s, {held} of {total} claims hold", err=True
    )
    for claim in built.claims:
        if not claim.passed:
            failed = f"  FAILED: {claim.text}: {claim.measured:.4g}, must be {claim.rule}"
            click.echo(failed, err=True)
