"""Chains and stars of snapshots on EMNIST letters, from a network of Fashion-MNIST.

    python docs/examples/letters.py out/letters

The file of 20,800 test letters is all that is at hand: 2,000 of them train, the others test. The
start is a ResNet-8 of Fashion-MNIST whose head is a linear probe of the letters; all runs share it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from neural.combine import Members, merge
from neural.combine.data import Parts
from neural.combine.sources import Opened, open_members
from neural.combine.survey import pooled_metrics
from neural.data import evaluation_batches, load_images
from neural.data.catalog import data_root
from neural.data.own import npz
from neural.evaluate import classification_metrics, paired_difference, predict
from neural.training.experiment import run_experiment
from neural.training.recipe import load_recipe
from neural.training.task import Runtime
from nqm.table import read_table

TRAIN, CLASSES, RATES = 2000, 26, ("quarter", "1", "4", "16")
WAYS = {"local": "local", "sse": "SSE", "star": "StarSSE"}
FILES = {"data.path": "letters.npz", "model.checkpoint": "start.pt"}


def split(path: Path, root: Path | None) -> None:
    """Write 2,000 letters for training and the others for tests, drawn once for all."""
    letters = load_images("emnist_letters", root).test
    order = np.random.default_rng(0).permutation(len(letters))
    x, y = letters.pixels.numpy(), letters.labels.numpy()
    parts = {"train": order[:TRAIN], "test": order[TRAIN:]}
    arrays = {f"{a}_{n}": v[at] for n, at in parts.items() for a, v in (("x", x), ("y", y))}
    np.savez_compressed(path, **arrays)


def probe(features: Tensor, labels: Tensor) -> nn.Linear:
    """Logistic regression of the letters on features, with a little decay."""
    head = nn.Linear(features.shape[1], CLASSES)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(head(features), labels)
        value = value + 1e-4 * head.weight.square().sum()
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)
    return head


def start(out: Path, runtime: Runtime) -> None:
    """Train the network on Fashion-MNIST, and give it a head for the letters."""
    about = ["data.train_examples=20000", "data.test_examples=2000", "seeds=1", "train.epochs=5"]
    about += ["train.lr.over=5", "model.norm=batch", "late_phase.start_epoch=3"]
    source = load_recipe("fashion_mnist_gn", "full", about)
    run_experiment(source, out / "fashion_mnist", runtime, arms=["base"])
    trained = open_members([out / "fashion_mnist/base/seed0"], runtime=runtime).members
    net = trained.with_state(trained.state(0)).eval()
    (name, last), *_ = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear)][::-1]
    letters = npz(out / "letters.npz", None)
    assert letters.train is not None
    seen: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    predict(net, evaluation_batches(letters.train, 500, letters.mean, letters.std))
    hook.remove()
    net.set_submodule(name, probe(torch.cat(seen), letters.train.labels))
    torch.save(net.state_dict(), out / "start.pt")


def local(out: Path, seed: int, runtime: Runtime) -> dict[str, float]:
    """Four fine-tunings, their soup and ensemble."""
    opened = open_members([f"{out}/branch{k}/seed{seed}" for k in range(4)], runtime=runtime)
    rows = [_judged(opened, merge(Members(opened.members.model, [m]))) for m in opened.members]
    row = {"mean snapshot": pd.DataFrame(rows).mean().to_dict()}
    row["soup"] = _judged(opened, merge(opened.members, parts=_parts(opened)))
    row["ensemble"] = pooled_metrics(opened, "probabilities", None, held_out=0.0)
    kept = {f"{what}, {m}": part[m] for what, part in row.items() for m in ("accuracy", "nll")}
    return kept | _height(opened, rows[0]["nll"], rows[-1]["nll"])


def cycled(folder: Path, runtime: Runtime) -> dict[str, float]:
    """Snapshots of a run, their soup and ensemble, as its results have them."""
    table = read_table(folder / "result.parquet")
    table = table[table["data"] == "test"]
    names = {"snapshot": "mean snapshot", "snapshot_soup": "soup", "snapshot_ensemble": "ensemble"}
    row = {
        f"{what}, {metric}": float(
            table.loc[(table["weights"] == name) & (table["metric"] == metric), "value"].mean()
        )
        for name, what in names.items()
        for metric in ("accuracy", "nll")
    }
    each = table[(table["weights"] == "snapshot") & (table["metric"] == "nll")].set_index("member")
    opened = open_members([f"{folder}#snapshots"], runtime=runtime)
    return row | _height(opened, each["value"][0], each["value"][len(opened.members) - 1])


def _height(opened: Opened, first: float, last: float) -> dict[str, float]:
    """Loss of the mean of the first model and the last, above the mean of their losses."""
    ends = Members(opened.members.model, (opened.members[0], opened.members[-1]))
    middle = _judged(opened, merge(ends, parts=_parts(opened)))["nll"]
    return {"height": middle - (first + last) / 2}


def _parts(opened: Opened) -> Parts:
    assert opened.task is not None
    return Parts.of_task(opened.task)


def _judged(opened: Opened, net: nn.Module) -> dict[str, float]:
    return classification_metrics(*predict(net, _parts(opened).test()))


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Means and standard deviations over seeds; stars less chains, paired by seed."""
    made = []
    for rate, way in [("none", "local"), *((r, w) for r in RATES for w in ("sse", "star"))]:
        own = _of(rows, way, rate)
        row = {"rate of the cycles": "1/4" if rate == "quarter" else rate, "way": WAYS[way]}
        row["height in the middle"] = f"{own['height'].mean():.3f} ± {own['height'].std():.3f}"
        for what in ("mean snapshot", "soup", "ensemble"):
            values = 100 * own[f"{what}, accuracy"]
            row[f"{what}, %"] = f"{values.mean():.1f} ± {values.std():.1f}"
        for what in ("soup", "ensemble"):
            row[f"NLL, {what}"] = f"{own[f'{what}, nll'].mean():.3f}"
        for what in ("soup", "ensemble"):
            values = 100 * own[f"{what}, accuracy"]
            for other, title in (("sse", "star - chain"), ("local", "over local")):
                if way == "star" or (way, other) == ("sse", "local"):
                    base = 100 * _of(rows, other, rate)[f"{what}, accuracy"]
                    gap = paired_difference(values.tolist(), base[own.index].tolist())
                    text = f"{gap.mean:+.1f} [{gap.low:.1f}, {gap.high:.1f}]"
                    row[f"{what}, {title}, points"] = text
        made.append(row)
    return pd.DataFrame(made).fillna("")


def _of(rows: pd.DataFrame, way: str, rate: str) -> pd.DataFrame:
    name = way if way == "local" else f"{way}_{rate}"
    return rows[rows["arm"] == name].set_index("seed")


def main(out: Path) -> None:
    """Train what is missing, and write the tables."""
    runtime = Runtime(root=data_root())
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "letters.npz").exists():
        split(out / "letters.npz", runtime.root)
    if not (out / "start.pt").exists():
        start(out, runtime)
    paths = [f"{n}={str(out / f)!r}" for n, f in FILES.items()]
    recipe = load_recipe(str(Path(__file__).with_suffix(".toml")), "full", paths)
    run_experiment(recipe, out / "runs", runtime)
    rows = []
    for seed in recipe.seeds:
        rows.append({"arm": "local", "seed": seed} | local(out / "runs/local", seed, runtime))
        for arm in (f"{way}_{rate}" for rate in RATES for way in ("sse", "star")):
            row = cycled(out / "runs" / arm / f"seed{seed}", runtime)
            rows.append({"arm": arm, "seed": seed} | row)
    table = pd.DataFrame(rows)
    table.to_csv(out / "seeds.csv", index=False)
    summary(table).to_csv(out / "letters.csv", index=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
