"""The paper's tables: every number once, ours only from full runs as stated, gaps said as gaps."""

import csv
import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from nqm import keys
from nqm.errors import NQMError
from nqm.table import read_metadata, read_table, write_table
from paper_repro import cli
from paper_repro.tables import NAMES, load_tables
from paper_repro.tables.collect import collect
from paper_repro.tables.page import as_text, write_tables
from paper_repro.tables.rows import UNKNOWN, Published, Row, Saved, Source, Table
from paper_repro.tables.saved import KINDS
from tests.tolerances import IDENTITY

#: Every number of the paper that could be established, by table, as printed: mean and sd.
PRINTED = {
    "cifar10": [
        "96.16 ± 0.12", "96.02 ± 0.06", "96.19 ± 0.18", "96.46 ± 0.15", "96.48 ± 0.04",
        "96.81 ± 0.07", "96.91",
    ],
    "cifar100": [
        "81.35 ± 0.16", "82.46 ± 0.09", "81.55", "82.01", "82.87 ± 0.22", "83.06 ± 0.08", "84.09",
    ],
    "other_networks": ["97.45 ± 0.10", "85.00 ± 0.25"],
    "imagenet": [
        "76.62", "76.87 ± 0.03", "78.37", "78.77 ± 0.01", "78.17", "78.31 ± 0.01",
    ],
    "enwik8": ["1.695", "1.626", "1.663", "1.616", "1.633", "1.615"],
    "ood": [],
    "ablations": [],
    "fge": ["80.8", "82.3", "83.0"],
    "snapshots": [],
    "curves": ["18.9", "19.2", "18.3", "19.0", "18.4"],
    "soups": [
        "80.39", "77.93", "79.97", "81.03", "81.38", "47.97", "46.69", "50.67", "51.58", "50.86",
    ],
    "ame": [],
    "low_precision": [],
    "clients": [],
    "modules": ["26.40", "22.38", "23.34", "22.19", "23.01"],
    "module_pairs": ["79.0"],
    "gates": [],
    "git_rebasin": [],
    "repair": ["20.0", "5.0"],
}  # fmt: skip


def test_every_number_of_the_paper_appears_once():
    tables = {table.name: table for table in load_tables()}
    assert list(tables) == list(NAMES) == list(PRINTED)
    for name, table in tables.items():
        shown = []
        for row in table.rows:
            if row.paper.mean is not None:
                text = f"{row.paper.mean:.{table.digits}f}"
                text += "" if row.paper.sd is None else f" ± {row.paper.sd:.{table.digits}f}"
                shown.append(text)
        assert sorted(shown) == sorted(PRINTED[name])
        assert len({row.method for row in table.rows}) == len(table.rows)


def test_every_source_can_be_produced():
    """Recipe and arm exist, and the arm yields these weights and this metric."""
    pytest.importorskip("torch")
    from neural.training.recipe import load_recipe

    for table in load_tables():
        for row in table.rows:
            for source in (row.source, *row.related):
                if isinstance(source, Saved):
                    continue
                run = load_recipe(source.recipe).arms[source.arm]
                weights = source.weights.removeprefix("deep_ensemble_")
                late, settings = run.late_phase is not None, run.evaluate
                possible = {
                    "iterate": not late,
                    "snapshot_ensemble": run.snapshots is not None,
                    "snapshot_soup": run.snapshots is not None,
                    "averaged": late,
                    "ensemble": late,
                    "swa": run.average is not None and run.average.method == "swa",
                    "mc_dropout": settings.mc_dropout > 0 and run.model.options["dropout"] > 0,
                }
                assert possible[weights], source
                if source.metric == "auroc":
                    assert set(source.data) <= set(settings.ood), source
                else:
                    text = run.model.name == "lstm_lm"
                    assert source.metric == ("bpc" if text else "accuracy"), source
                    assert source.data == ("test",)


BASE = Source("cifar10_q75_resnet8", "base", "iterate")
OOD = Source("cifar10_bn", "base", "iterate", "auroc", ("svhn", "cifar100"))


def table_of(*rows, **changes):
    return Table("made", "Made up", "test accuracy, %", tuple(rows), **changes)


@pytest.fixture
def experiment(tmp_path):
    """Writes an experiment as `nqm neural train` leaves it, without training."""
    pytest.importorskip("torch")
    from neural.training.config import describe
    from neural.training.recipe import load_recipe

    def write(name, scale, arm, values, weights="iterate", metric="accuracy", data="test", to=()):
        """`values` by seed; seed -1 is the deep ensemble, NaN a diverged run."""
        recipe = load_recipe(name, scale)
        folder = tmp_path / f"{name}-{scale}"
        for seed in values:
            if seed < 0:
                continue
            run = replace(recipe.arms[arm], seed=seed)
            run = replace(run, **{k: replace(getattr(run, k), **v) for k, v in dict(to).items()})
            home = folder / arm / f"seed{seed}"
            home.mkdir(parents=True, exist_ok=True)
            config = describe(run)
            stated = {
                "key": keys.key(config), "config": config, "status": "finished",
                "versions": {"hardware": "H9", "torch": "2.99"},
            }  # fmt: skip
            (home / "run.json").write_text(json.dumps(stated))
        rows = [
            {"arm": arm, "seed": seed, "status": "finished", "weights": weights, "member": -1,
             "data": data, "metric": metric, "value": value}
            for seed, value in values.items()
        ]  # fmt: skip
        for row in rows:
            if math.isnan(row["value"]):
                row |= {"status": "diverged", "weights": "", "data": "", "metric": ""}
        path = folder / "results.parquet"
        old = [read_table(path)] if path.exists() else []
        table = pd.concat([*old, pd.DataFrame(rows)], ignore_index=True)
        write_table(path, table, {"recipe": name, "scale": scale})
        return recipe

    return write


def line_of(root, *rows, **changes):
    ((_, (line, *_)),) = collect(root, [table_of(*rows, **changes)])
    return line


def test_full_runs_as_stated_are_ours(experiment, tmp_path):
    values = [0.91, 0.93, 0.92]
    recipe = experiment("cifar10_q75_resnet8", "full", "base", dict(enumerate(values)))
    line = line_of(tmp_path, Row("m", UNKNOWN, BASE))
    assert line.smaller == ()
    assert not line.left_out
    ours = line.ours
    assert (ours.title, ours.scale, ours.n, ours.diverged) == (recipe.title, "full", 3, 0)
    assert ours.mean == pytest.approx(100 * np.mean(values), rel=IDENTITY)
    assert ours.sd == pytest.approx(100 * np.std(values, ddof=1), rel=IDENTITY)
    assert ours.hardware == "H9, torch 2.99"


def test_one_seed_has_no_spread_and_divergence_is_counted(experiment, tmp_path):
    experiment("cifar10_q75_resnet8", "full", "base", {0: 0.9, 1: math.nan})
    ours = line_of(tmp_path, Row("m", UNKNOWN, BASE)).ours
    assert (ours.n, ours.diverged) == (1, 1)
    assert math.isnan(ours.sd)
    text = as_text(collect(tmp_path, [table_of(Row("m", UNKNOWN, BASE))]))
    assert "90.00 (n = 1), 1 diverged" in text


def test_smaller_scales_have_their_own_column_and_smoke_none(experiment, tmp_path):
    row = Row("m", Published(95.0), Source("cifar10_bn", "base", "iterate"), (BASE,))
    experiment("cifar10_bn", "smoke", "base", {0: 0.99})
    experiment("cifar10_q75_resnet8", "smoke", "base", {0: 0.99})
    line = line_of(tmp_path, row)
    assert (line.ours, line.smaller) == (None, ())
    small = experiment("cifar10_bn", "cpu", "base", {0: 0.8})
    related = experiment("cifar10_q75_resnet8", "cpu", "base", {0: 0.7})
    line = line_of(tmp_path, row)
    assert line.ours is None
    assert [(one.title, one.mean) for one in line.smaller] == [
        (small.title, pytest.approx(80.0)), (related.title, pytest.approx(70.0)),
    ]  # fmt: skip
    assert small.title != related.title
    # The larger scale of a related recipe takes the place of its smaller one.
    larger = experiment("cifar10_q75_resnet8", "full", "base", {0: 0.75})
    assert [one.title for one in line_of(tmp_path, row).smaller] == [small.title, larger.title]
    # Where the small version measures nothing but the pipeline, it is not shown.
    assert len(line_of(tmp_path, row, reduced=False).smaller) == 1
    experiment("cifar10_bn", "full", "base", {0: 0.96})
    line = line_of(tmp_path, row)
    assert line.ours.mean == pytest.approx(96.0)
    assert [one.title for one in line.smaller] == [larger.title]


@pytest.mark.parametrize(
    "changes",
    [{"train": {"epochs": 3}}, {"data": {"train_examples": 100}}, {"train": {"momentum": 0.8}}],
)
def test_runs_with_other_settings_are_never_ours(experiment, tmp_path, changes):
    experiment("cifar10_q75_resnet8", "full", "base", {0: 0.99}, to=changes)
    experiment("cifar10_q75_resnet8", "full", "base", {-1: 0.99}, "deep_ensemble_iterate")
    ensemble = replace(BASE, weights="deep_ensemble_iterate")
    for source in (BASE, ensemble):
        line = line_of(tmp_path, Row("m", UNKNOWN, source))
        assert line.ours is None
        assert line.left_out
    text = as_text(collect(tmp_path, [table_of(Row("m", UNKNOWN, BASE))]))
    assert "not run (runs with other settings are left out)" in text
    assert "99" not in text


def test_what_does_not_touch_training_may_differ(experiment, tmp_path):
    changes = {"evaluate": {"ood": (), "every": 50}, "train": {"channels_last": False}}
    experiment("cifar10_q75_resnet8", "full", "base", {0: 0.9}, to=changes)
    line = line_of(tmp_path, Row("m", UNKNOWN, BASE))
    assert line.ours.mean == pytest.approx(90.0)
    assert not line.left_out


def test_a_checkpoint_is_known_by_its_name_wherever_it_lies(experiment, tmp_path):
    cycles = Source("cifar10_q75_resnet20_cycles", "base", "iterate")
    for seed, path in enumerate(("/far/away/resnet20-12fca82f.th", "/far/away/other.th")):
        changes = {"model": {"checkpoint": path}}
        experiment("cifar10_q75_resnet20_cycles", "full", "base", {seed: 0.8}, to=changes)
    line = line_of(tmp_path, Row("m", UNKNOWN, cycles))
    assert (line.ours.n, line.left_out) == (1, True)


def test_deep_ensemble_is_one_value(experiment, tmp_path):
    experiment("cifar10_q75_resnet8", "full", "base", {0: 0.9, 1: 0.92})
    experiment("cifar10_q75_resnet8", "full", "base", {-1: 0.94}, "deep_ensemble_iterate")
    source = replace(BASE, weights="deep_ensemble_iterate")
    ours = line_of(tmp_path, Row("m", UNKNOWN, source)).ours
    assert (ours.mean, ours.n) == (pytest.approx(94.0), 1)


def test_mean_over_sets_needs_all_of_them(experiment, tmp_path):
    write = [("svhn", {0: 0.9, 1: 0.8}), ("cifar100", {0: 0.7})]
    row = Row("m", UNKNOWN, OOD)
    experiment("cifar10_bn", "full", "base", write[0][1], metric="auroc", data="svhn")
    assert line_of(tmp_path, row, factor=1.0).ours is None
    experiment("cifar10_bn", "full", "base", write[1][1], metric="auroc", data="cifar100")
    ours = line_of(tmp_path, row, factor=1.0).ours
    assert (ours.mean, ours.n) == (pytest.approx(0.8), 1)
    assert ours.title.endswith(", against svhn and cifar100")


def test_a_folder_of_something_else_is_named(experiment, tmp_path):
    experiment("cifar10_q75_resnet8", "cpu", "base", {0: 0.9})
    (tmp_path / "cifar10_q75_resnet8-cpu").rename(tmp_path / "cifar10_q75_resnet8-full")
    with pytest.raises(NQMError, match="must hold recipe cifar10_q75_resnet8 at scale full"):
        line_of(tmp_path, Row("m", UNKNOWN, BASE))


def test_command_without_any_run(tmp_path):
    out = tmp_path / "out"
    none = str(tmp_path / "none")
    done = CliRunner().invoke(cli.tables, ["--runs", none, "--saved", none, "--out", str(out)])
    assert done.exit_code == 0, done.output
    rows = [row for table in load_tables() for row in table.rows]
    assert done.output.count("not run") == len(rows)
    unknown = sum(row.paper.mean is None for row in rows)
    assert done.output.count("not established") == unknown
    page = (out / "tables.html").read_text()
    assert f"0 of {len(rows)} rows" in page
    shown = re.findall(r'<td class="number">(\d[^<]*)</td>', page)
    assert [text.partition(" (")[0] for text in shown] == [
        f"{row.paper.mean:.{table.digits}f}"
        + ("" if row.paper.sd is None else f" ± {row.paper.sd:.{table.digits}f}")
        for table in load_tables()
        for row in table.rows
        if row.paper.mean is not None
    ]
    for name in NAMES:
        frame = read_table(out / f"table_{name}.csv")
        assert frame["mean"].isna().all()
        assert (frame["status"] == "not run").all()
        assert "unit" in read_metadata(out / f"table_{name}.csv")
        with (out / f"table_{name}.csv").open() as stream:
            assert len(list(csv.reader(stream))) == len(frame) + 2  # stamp and header


def test_csv_and_page_carry_our_numbers(experiment, tmp_path):
    experiment("cifar10_q75_resnet8", "full", "base", {0: 0.9, 1: 0.92})
    filled = collect(tmp_path, [table_of(Row("a < b", Published(95.0, 0.1, 5), BASE))])
    write_tables(filled, tmp_path / "out")
    (row,) = read_table(tmp_path / "out" / "table_made.csv").to_dict("records")
    assert (row["method"], row["paper_mean"], row["n"]) == ("a < b", 95.0, 2)
    assert row["mean"] == pytest.approx(91.0)
    page = (tmp_path / "out" / "tables.html").read_text()
    assert "a &lt; b" in page
    assert "95.00 ± 0.10 (n = 5)" in page
    assert "91.00 ± 1.41 (n = 2)" in page  # sqrt(2)
    assert "H9, torch 2.99" in page
    assert "1 of 1 rows" in page


# --- tables that commands on combining saved ---


def test_every_saved_value_is_one_that_a_command_writes():
    """Columns and names of rules, pools, scores and the like are those of the commands."""
    pytest.importorskip("torch")
    from neural.combine import align, comparison, low_precision, text_ensembles
    from neural.combine.curve import KINDS as CURVES
    from neural.combine.pool import POOLS
    from neural.combine.repair import REPAIRS
    from neural.combine.rules import RULES
    from neural.modules.language import LANGUAGE_SCORES

    spaces = {"weights", *POOLS}
    modules = {
        "task": {"language", "opinions", "corruptions"}, "space": spaces,
        "score": {*LANGUAGE_SCORES, "no_module", "best"}, "kept": {3}, "weighting": {"linear"},
    }  # fmt: skip
    gates = {"ensemble", *text_ensembles.BY_SCORE, *text_ensembles.GATES}
    known = {
        "compare": {
            "rule": {*RULES, "member"}, "space": spaces, "part": {"test", "shift"},
            "align": set(align.ALIGNS), "repair": set(REPAIRS), "members": {2},
            "amortized": {True},
        },
        "low-precision": {
            "rule": {"float", "rtn", "ensemble"}, "rounding": {"stochastic"},
            "grid_bits": set(range(2, 9)),
        },
        "curve": {
            "path": {"curve", "line"}, "data": {"test"}, "kind": set(CURVES), "t": {0.0, 0.5, 1.0},
        },
        "modules": modules,
        "pairs of modules": modules,
        "gates": {"rule": gates},
        "clients": {
            "method": {"FedAvg", "FedProx", "SCAFFOLD", "FedExP", "scope", "rescaled"},
            "dirichlet": {0.1, 0.5},
        },
    }  # fmt: skip
    columns = {
        "compare": {*comparison.TABLE, "lost"}, "low-precision": set(low_precision.LOW_PRECISION),
        "curve": {"error"}, "modules": {"perplexity"}, "pairs of modules": {"lower"},
        "gates": set(text_ensembles.TABLE), "clients": {"accuracy"},
    }  # fmt: skip
    assert set(known) == set(KINDS)
    seen = set()
    for table in load_tables():
        for row in table.rows:
            source = row.source
            if not isinstance(source, Saved):
                continue
            seen.add(source.kind)
            assert source.column in columns[source.kind], source
            for name, value in source.where.items():
                assert set(np.atleast_1d(value)) <= known[source.kind][name], source
    assert seen == set(KINDS)


def saved(folder, kind, rows, /, **config):
    """A table as its command saves it; `config` is its section, and `others` more of them."""
    folder.mkdir(parents=True, exist_ok=True)
    more = config.pop("others", {})
    stated = {"config": {KINDS[kind].section: config, **more}}
    write_table(folder / KINDS[kind].file, pd.DataFrame(rows), stated)


def compared(folder, *rows, **config):
    columns = ("rule", "space", "member", "members", "repair", "data", "accuracy", "barrier")
    made = [dict(zip(columns, row, strict=True)) for row in rows]
    saved(folder, "compare", made, **config)


def shown(root, name):
    """Titles, values and numbers of our lines of a table of the roster, by method."""
    (table,) = (table for table in load_tables() if table.name == name)
    ((_, lines),) = collect(root / "no runs", [table], root)
    return {
        line.row.method: [(one.title, round(one.mean, 6), one.n) for one in line.smaller]
        for line in lines
        if line.smaller
    }


def test_soups_of_several_seeds_and_shifts(tmp_path):
    for seed, (a, b, soup) in enumerate([(0.80, 0.60, 0.74), (0.90, 0.70, 0.86)]):
        compared(
            tmp_path / "soup" / f"seed{seed}",
            ("member", "weights", "a", 1, "none", "test", a, 0.0),
            ("member", "weights", "b", 1, "none", "test", b, 0.0),
            ("member", "weights", "a", 1, "none", "noise 3", 0.3, 0.0),
            ("member", "weights", "a", 1, "none", "blur 3", 0.5, 0.0),
            ("member", "weights", "b", 1, "none", "noise 3", 0.4, 0.0),
            ("member", "weights", "b", 1, "none", "blur 3", 0.6, 0.0),
            ("uniform", "weights", "", 2, "none", "test", soup, 0.0),
            ("uniform", "probabilities", "", 2, "none", "test", 0.01, 0.0),
        )
    assert shown(tmp_path, "soups") == {
        "Mean single model": [("soup", 75.0, 2)],
        "Uniform soup": [("soup", 80.0, 2)],
        "Mean single model, shift": [("soup", 45.0, 2)],
        "Best single model under shift": [("soup", 50.0, 2)],
    }
    assert shown(tmp_path, "ame") == {}  # no rule of this comparison is amortized


def test_means_of_two_networks_by_alignment_and_repair(tmp_path):
    for align, lost in (("none", 0.5), ("weights", 0.1)):
        compared(
            tmp_path / align,
            ("member", "weights", "a", 1, "none", "test", 0.9, 0.0),
            ("member", "weights", "b", 1, "none", "test", 0.8, 0.0),
            ("uniform", "weights", "", 2, "none", "test", 0.85 - lost, 2 * lost),
            ("uniform", "weights", "", 2, "rescale", "test", 0.83, 0.01),
            align=align,
        )
    compared(tmp_path / "three", ("uniform", "weights", "", 3, "none", "test", 0.4, 0.7))
    assert shown(tmp_path, "git_rebasin") == {
        "As they are": [("none", 1.0, 1)],
        "Matched by weights": [("weights", 0.2, 1)],
    }
    assert shown(tmp_path, "repair") == {
        "Matched by weights": [("weights", 10.0, 1)],
        "Matched by weights, rescaled": [("weights", 2.0, 1)],
    }


def test_curves_take_the_worst_and_the_best_point(tmp_path):
    points = [("curve", 0.0, 0.9), ("curve", 0.5, 0.7), ("curve", 1.0, 0.8), ("line", 0.5, 0.2)]
    rows = [
        {"path": path, "t": t, "data": data, "accuracy": accuracy if data == "test" else 1.0}
        for path, t, accuracy in points
        for data in ("train", "test")
    ]
    saved(tmp_path / "deep" / "bend", "curve", rows, kind="bezier")
    assert shown(tmp_path, "curves") == {
        "Worse end": [("deep/bend", 20.0, 1)],
        "Largest on a Bezier curve": [("deep/bend", 30.0, 1)],
        "Smallest on a Bezier curve": [("deep/bend", 10.0, 1)],
        "Middle of the straight line": [("deep/bend", 80.0, 1)],
    }


def test_rounds_that_differ_in_the_seed_belong_together(tmp_path):
    def rounds(name, seed, accuracy, nll=1.0, scope=None, **clients):
        rows = [
            {"round": i, "accuracy": value, "nll": nll if i else 9.0}
            for i, value in enumerate(accuracy)
        ]
        stated = {"dirichlet": 0.5, "prox": 0.0, "control": False, "extrapolate": False}
        others = {"seed": seed} | ({} if scope is None else {"scope": scope})
        saved(tmp_path / name, "clients", rows, others=others, **stated | clients)

    rounds("a", 0, [0.0, 0.5, 0.5, 0.5, 0.5, 0.5])  # the first of six does not count
    rounds("b", 1, [0.1, 0.7, 0.7, 0.7, 0.7, 0.7])
    rounds("c", 2, [0.1, 0.9, 0.0], nll=math.nan)
    rounds("d", 0, [0.4] * 5, prox=0.1)
    rounds("e", 0, [0.3] * 5, scope={"strength": 0.0, "rescale": True})
    rounds("f", 0, [0.2] * 5, scope={"strength": 1.0})
    # A training run's history is no table of clients.
    (tmp_path / "run").mkdir()
    run = pd.DataFrame({"accuracy": [1.0]})
    write_table(tmp_path / "run" / "history.parquet", run, {"config": {"train": {}}})
    assert shown(tmp_path, "clients") == {
        "FedAvg, Dirichlet 0.5": [("a", 60.0, 2)],
        "FedProx, Dirichlet 0.5": [("d", 40.0, 1)],
        "Rescaled after training (control), Dirichlet 0.5": [("e", 30.0, 1)],
        "Weight scope alignment, Dirichlet 0.5": [("f", 20.0, 1)],
    }
    (table,) = (table for table in load_tables() if table.name == "clients")
    assert "60.0 ± 14.1 (n = 2), 1 diverged" in as_text(collect(tmp_path, [table]))


def test_modules_are_averaged_by_split(tmp_path):
    pytest.importorskip("torch")
    rows = [
        {"split": split, "target": target, "score": score, "kept": 3, "weighting": "linear",
         "space": space, "members": 3, "nll": math.log(perplexity)}
        for split, target, score, space, perplexity in [
            (0, "x", "tfidf", "weights", 20.0), (0, "y", "tfidf", "weights", 40.0),
            (1, "x", "tfidf", "weights", 10.0), (1, "y", "tfidf", "weights", 20.0),
            (0, "x", "tfidf", "logits", 20.0), (0, "y", "tfidf", "logits", 41.0),
            (1, "x", "tfidf", "logits", 9.0), (1, "y", "tfidf", "logits", 19.0),
        ]
    ]  # fmt: skip
    saved(tmp_path / "m", "modules", rows, task="language")
    found = shown(tmp_path, "modules")
    assert found["Average, TF-IDF, 3 modules"] == [("m", 22.5, 2)]  # of 30 and 15
    assert found["Ensemble of logits, TF-IDF, 3"] == [("m", 22.25, 2)]  # of 30.5 and 14
    # At most as large in one of two cases, and in both.
    assert shown(tmp_path, "module_pairs") == {
        "Language models, ensemble of logits": [("m", 75.0, 2)]
    }


def test_low_precision_of_most_draws(tmp_path):
    columns = ("rule", "rounding", "grid_bits", "members", "nll", "nll_tuned")
    rows = [
        ("float", "", 0, 1, 0.5, 0.4), ("ensemble", "stochastic", 5, 1, 0.9, 0.8),
        ("ensemble", "stochastic", 5, 8, 0.45, 0.41), ("ensemble", "gaussian", 5, 8, 0.1, 0.1),
    ]  # fmt: skip
    saved(tmp_path / "r", "low-precision", [dict(zip(columns, row, strict=True)) for row in rows])
    assert shown(tmp_path, "low_precision") == {
        "Float model": [("r", 0.5, 1)],
        "Ensemble, 5 bits": [("r", 0.45, 1)],
        "Float model, at tuned temperatures": [("r", 0.4, 1)],
        "Ensemble, 5 bits, at tuned temperatures": [("r", 0.41, 1)],
    }


def test_a_damaged_saved_table_is_named(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "curve.parquet").write_bytes(b"no table")
    with pytest.raises(NQMError, match=r"curve\.parquet"):
        shown(tmp_path, "curves")


def test_saved_tables_of_another_version_or_program(tmp_path):
    saved(tmp_path / "old", "clients", [{"accuracy": 0.5, "nll": 1.0}], count=3)
    with pytest.raises(NQMError, match=r"history\.parquet is of another version: it lacks 'prox'"):
        shown(tmp_path, "clients")
    for config in (None, [1], {"clients": 3}):
        frame = pd.DataFrame({"accuracy": [0.5]})
        write_table(tmp_path / "old" / "history.parquet", frame, {"config": config})
        assert shown(tmp_path, "clients") == {}
