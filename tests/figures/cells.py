"""A cell of a notebook for every public function that draws: a small table, and the call."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import figures

#: First cell: names that the others use. `drawn` reads a table of the documentation.
FIRST = f"""
import numpy as np
import pandas as pd
from figures import *
from nqm.table import read_table
import figures.pages, importlib
for _name in {[one.name for one in iter_modules(figures.__path__)]}:
    globals()[_name] = importlib.import_module("figures." + _name)
def drawn(name):
    path = {str(Path(figures.__file__).parents[1] / "docs" / "tables" / "drawn")!r} + "/" + name
    with open(path) as stream:
        own = stream.read(1) == "#"
    return read_table(path) if own else pd.read_csv(path, keep_default_na=False, na_values=[""])
def tidy(**columns):
    return pd.DataFrame(columns)
steady = drawn("steady_state.csv")
additive = steady[steady["model"] == "additive"]
combined = drawn("combining_resnet20.csv").fillna({{"member": "", "repair": "none"}})
shifted = drawn("soup_shift.csv").fillna({{"member": "", "repair": "none", "space": ""}})
curve = drawn("curve_digits.csv")
history = drawn("fashion_mnist_fge_history.csv")
ranks = drawn("ranking.csv")
sizes = drawn("scaling.csv")
found = pd.DataFrame([
    {{"lr": lr, "momentum": 0.0, "batch_size": 8, "members": k, "weights": "iterate", "floor": 1e-5,
     "predicted_rise": lr / k, "measured_rise": 1.1 * lr / k, "error": 0.1 * lr / k, "ratio": 1.1,
     "ratio_error": 0.1, "predicted_test_gain": lr - lr / k, "test_gain": lr - lr / k,
     "test_gain_error": 0.01, "predicted": lr, "measured": lr, "step": k, "lr_times_sharpness": lr}}
    for lr in (0.1, 0.2) for k in (1, 2, 4)])
pairs = tidy(curvature=[1.0, 0.1, -0.01], noise_variance=[1.0, 0.1, 0.01], count=1, kind="pair")
late = pd.DataFrame([
    {{"members": k, "gamma_rule": "1/K", "lr": 0.1, "effective_lr": 0.2, "batch_size": 2,
     "kind": kind, "loss": 0.1 / k, "curve": 0.1 / k, "stderr": 0.01}}
    for k in (1, 2) for kind in ("sample", "curve")])
digits_table = pd.DataFrame([
    {{"step": step, "loss": 1.0 / step, "stderr": 0.01, "members": k, "lr": lr, "kind": kind,
     "additive_loss": 0.9 / step}} for step in (1, 10) for k in (1, 4) for lr in (0.1, 0.2)
    for kind in ("additive", "exact", "sample")])
zhang = pd.DataFrame([
    {{"batch_size": b, "step": 1e4 / b, "lr": 0.01 * b, "series": series, "exponent": g,
     "kind": kind, "target": 0.1, "momentum": 0.9, "effective_lr": 0.1 * b, "edge": 2.0}}
    for b in (4.0, 16.0) for series in ("SGD", "momentum") for g in (0.0, 0.5)
    for kind in ("exact", "bound")])
"""

#: Calls by ``module.function``.
CALLS = {
    "agreement.kappa": "drawn('gates_kappa.csv')",
    "agreement.gains": "tidy(rule=['a'], member=['x'], accuracy_gain=[0.1],"
    " accuracy_gain_low=[0.0], accuracy_gain_high=[0.2])",
    "bridge.spectrum": "pairs",
    "bridge.noise_against_curvature": "pairs, 1.0",
    "bridge.against_members": "found",
    "bridge.against_rate": "found",
    "bridge.against_batch_size": "found",
    "bridge.course": "found",
    "bridge.averages": "found",
    "bridge.held_out": "found",
    "bridge.ratios": "found",
    "bridge.residuals": "found, 1.0",
    "clients.over_rounds": "tidy(round=[1, 2], accuracy=[0.1, 0.2], arm='a')",
    "collapse.scattered": "late",
    "collapse.collapsed": "late",
    "collapse.remainder": "late",
    "combine.decomposition": "combined",
    "combine.predicted": "combined",
    "combine.ingredients": "tidy(rule=['member'] * 2 + ['uniform'] * 2, space='weights',"
    " members=[1, 2] * 2, accuracy=[0.8, 0.9, 0.8, 0.92])",
    "combine.ways": "drawn('which_combining.csv')",
    "combine.passes": "combined",
    "combine.soup_scatter": "shifted",
    "combine.budget": "drawn('low_precision_resnet20.csv').fillna({'rounding': ''})",
    "combine.curve": "curve",
    "combine.cycle": "tidy(arm='a', seed=0, row='test', cycle=0, step=[1, 2], error=[0.2, 0.1])",
    "combine.cycle_rates": "tidy(way=['local', 'SSE', 'SSE'], lr_scale=[np.nan, 1, 4],"
    " mean=[1.0, 2.0, 3.0], low=[0.9, 1.8, 2.5], high=[1.1, 2.2, 3.5])",
    "combine.plane": "tidy(corner=[''] * 4 + ['a'], x=[0, 0, 1, 1, 0], y=[0, 1, 0, 1, 0],"
    " nll=[1.0, 2.0, 3.0, 4.0, 1.0], accuracy=0.5)",
    "curves.curves": "additive[additive['kind'] == 'exact'], x='members', by='lr'",
    "digits.transient": "digits_table[digits_table['lr'] == 0.1]",
    "digits.against_members": "digits_table[digits_table['step'] == 10]",
    "digits.ratio": "digits_table[digits_table['lr'] == 0.1], x='step'",
    "explore.over_examples": "tidy(series='sgd', examples=[1, 2], loss=[2.0, 1.0])",
    "explore.against_rate": "tidy(members=2, lr=[0.1, 0.2], loss=[2.0, 1.0]), 0.1, 2",
    "floors.by_rate": "additive",
    "floors.ratio": "additive",
    "floors.compared": "steady[steady['lr'] == 0.15]",
    "gallery.draw": "pd.DataFrame({'a': [1.0, 2.0]}, index=[1, 2])",
    "modules.scores": "drawn('modules_opinions.csv').fillna({'weighting': ''})",
    "multiplicative.error_map": "tidy(lr=[0.1, 0.2] * 2, variance=[1e-3] * 2 + [1e-2] * 2,"
    " error=[0.01, -0.02, 0.1, -0.3], in_range=[True, True, False, False])",
    "multiplicative.floors": "pd.concat(tidy(members=[1, 2, 4, 8], loss=[1.0, 0.5, 0.25, 0.1],"
    " stderr=0.01, kind=kind) for kind in"
    " ('first_order', 'long_run', 'sample, short', 'sample, long'))",
    "multiplicative.course": "pd.concat(tidy(members=2, step=[10.0, 100.0], loss=[2.0, 3.0],"
    " stderr=0.2, quasi_steady=2.0, long_run=4.0, kind=kind) for kind in ('sample', 'closure'))",
    "multiplicative.first_order_error": "tidy(lr=0.1, variance=[1e-3, 1e-2], loss=[-2e-3, -2e-2],"
    " stderr=1e-4, series='average member')",
    "over_time.switch": "tidy(series='mean model', kind='exact', examples=[1, 2], loss=[2.0, 1.0],"
    " stderr=0.0)",
    "over_time.parts": "tidy(series='mean model', kind='exact', examples=[1, 2], bias=[2.0, 1.0],"
    " variance=[0.1, 0.2])",
    "plot.plot": "history",
    "ranking.panel": "ranks[(ranks['spectrum'] == 'harmonic') & (ranks['noise'] == 'small noise')],"
    " ranking.order(ranks)",
    "rate_map.rate_map": "pd.concat([tidy(members=[1, 1, 2, 2], lr=[0.1, 0.2] * 2, kind='exact',"
    " loss=[1.0, 2.0, 3.0, 4.0])] + [tidy(members=[1, 2], lr=0.2, kind=kind, loss=1.0)"
    " for kind in ('edge', 'best')])",
    "runs.comparison": "tidy(arm='a', weights='iterate', seed=[0, 1], value=[0.1, 0.2], mean=0.15,"
    " low=0.1, high=0.2)",
    "runs.means": "tidy(model=['a', 'b'], mean=[1.0, 2.0], spread=[0.1, np.nan])",
    "runs.over_epochs": "history, starts={'late_phase': 9}",
    "scaling.frontier": "sizes[sizes['panel'] == 'frontier']",
    "scaling.decay_start": "sizes[sizes['panel'] == 'decay']",
    "zhang2019.training_curves": "tidy(step=[1, 10, 10], loss=[2.0, 1.0, 0.5], lr=0.1,"
    " kind=['exact', 'exact', 'floor'])",
    "zhang2019.targets": "zhang[zhang['kind'] == 'exact']",
    "zhang2019.steps": "zhang",
    "zhang2019.best_rates": "zhang[zhang['series'] == 'SGD']",
    "zhang2019.effective_rates": "zhang",
    "zhang2019.memories": "zhang",
    "zhang2019.schedules": "tidy(begin=[0, 5], length=5, lr=[1.0, 0.5], batch_size=4.0, step=10.0)",
}


def public() -> set[str]:
    """Every public function of `figures` that returns axes or a figure, but for the tools."""
    names = set()
    for one in iter_modules(figures.__path__):
        module = import_module(f"figures.{one.name}")
        for name, value in vars(module).items():
            own = inspect.isfunction(value) and value.__module__ == module.__name__
            if own and not name.startswith("_") and one.name != "style":
                drawn = inspect.get_annotations(value).get("return") in ("Axes", "Figure")
                names |= {f"{one.name}.{name}"} if drawn else set()
    return names
