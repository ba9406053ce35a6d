"""What a recipe trains and what it takes, as text and tables for ``nqm neural show``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from neural.training.cost import Cost
    from neural.training.recipe import Recipe


def note(share: float) -> str:
    """Say what the estimates are.

    Parameters
    ----------
    share : float
        Assumed share of an H100's peak.

    Returns
    -------
    str
    """
    return (
        "Estimates. FLOPs: matrix products and convolutions of training, without evaluation. "
        f"Hours: at {share:.0%} of an H100's peak (989 TFLOP/s in BF16, 495 in TF32, which float32 "
        "uses); small and recurrent nets take longer. Memory: of the largest arm, without the "
        "workspace of kernels, and not compiled. Disk: all runs, each with two checkpoints."
    )


def describe_recipe(recipe: Recipe, share: float, root: Path | None = None) -> dict[str, Any]:
    """Collect configuration, selections and costs of a recipe.

    Parameters
    ----------
    recipe : Recipe
        The experiment.
    share : float
        Assumed share of an H100's peak, in (0, 1].
    root : Path, optional
        Folder of data files.

    Returns
    -------
    dict of str to object
        ``recipe``, ``scale``, ``title``, ``seeds``, ``share_of_peak``, ``note``; at scale gpu
        ``gpu``: entry -> ``value``, ``reason`` (see `neural.training.gpu_scale`); ``arms``: name ->
        ``config``, ``selections`` (term or the arm's own selection -> ``names``, ``tensors``,
        ``weights``, ``share``) and the entries of `neural.training.cost.Cost` with ``hours``;
        ``total``: ``flops``, ``hours``, ``disk`` of all arms and seeds.
    """
    from dataclasses import asdict

    from neural.training.config import describe
    from neural.training.cost import estimate, hours, network, size_of
    from neural.training.gpu_scale import choose

    costs = estimate(recipe, root)
    chosen = choose(recipe.arms.values()) if recipe.scale == "gpu" else {}
    arms: dict[str, Any] = {}
    for name, run in recipe.arms.items():
        model = network(run, size_of(run, root))
        arms[name] = {
            "config": describe(run),
            "selections": _selections(model, run),
            **asdict(costs[name]),
            "hours": hours([costs[name]], run.train.precision, share),
        }
    count = len(recipe.seeds)
    total = {
        key: count * sum(arm[key] for arm in arms.values()) for key in ("flops", "hours", "disk")
    }
    return {
        "recipe": recipe.name,
        "scale": recipe.scale,
        "title": recipe.title,
        "seeds": list(recipe.seeds),
        "share_of_peak": share,
        "note": note(share),
        **({"gpu": {entry: asdict(choice) for entry, choice in chosen.items()}} if chosen else {}),
        "arms": arms,
        "total": total,
    }


def _selections(model: Any, run: Any) -> dict[str, Any]:
    """What every term, and the selections of the run, mean in its network."""
    from neural.late_phase.select import select
    from neural.training.cost import shares

    found = shares(model)
    stated = [run.train.no_decay, run.late_phase.select if run.late_phase is not None else ""]
    found |= {term: select(model, term).parameters for term in stated if term}
    total = sum(p.numel() for p in model.parameters())
    made = {}
    for term, names in found.items():
        weights = sum(model.get_parameter(name).numel() for name in names)
        made[term] = {
            "names": list(names),
            "tensors": len(names),
            "weights": weights,
            "share": weights / total,
        }
    return made


def text(content: Mapping[str, Any], names: bool = False) -> str:
    """Format a result of `describe_recipe` for reading.

    Parameters
    ----------
    content : mapping
        Result of `describe_recipe`.
    names : bool
        Whether to print the names of all selected weights.

    Returns
    -------
    str
    """
    arms: dict[str, Any] = dict(content["arms"])
    first, *others = arms
    lines = [
        f"{content['title']}  ({content['recipe']}, scale {content['scale']}, "
        f"{len(content['seeds'])} seeds)",
    ]
    if "gpu" in content:
        lines.append("\nscale gpu, for all arms; the rest is scale full")
        for entry, choice in content["gpu"].items():
            lines.append(f"  {entry} = {choice['value']!r}: {choice['reason']}")
    lines.append(f"\nconfiguration of arm {first}")
    base = _flat(arms[first]["config"])
    lines += [f"  {key} = {value!r}" for key, value in base.items() if key != "seed"]
    for arm in others:
        own = _flat(arms[arm]["config"])
        changed = [f"  {key} = {value!r}" for key, value in own.items() if base.get(key) != value]
        gone = [f"  without {key}" for key in base if key not in own]
        lines += [f"\narm {arm}: differs from {first} by", *(changed + gone or ["  nothing"])]
    shown: list[Any] = []
    for arm, entry in arms.items():
        if entry["selections"] in shown:  # the same network with the same selections
            continue
        shown.append(entry["selections"])
        lines.append(f"\nselections in the network of arm {arm}, {entry['weights']:,} weights")
        for term, found in entry["selections"].items():
            lines.append(
                f"  {term}: {found['weights']:,} weights ({found['share']:.2%}) in "
                f"{found['tensors']} tensors, {_listed(found['names'], names)}"
            )
    lines += ["", costs_table(arms).to_string(index=False)]
    total = content["total"]
    lines.append(
        f"\nall seeds: {total['flops']:.3g} FLOPs, {_hours(total['hours'])} h on an H100, "
        f"{size(total['disk'])} of disk\n{content['note']}"
    )
    return "\n".join(lines)


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Entries by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _listed(names: list[str], all_of_them: bool) -> str:
    if all_of_them or len(names) < 4:
        return ", ".join(names)
    return f"{names[0]}, {names[1]} ... {names[-1]}"


def size(count: float) -> str:
    """Format a number of bytes.

    Parameters
    ----------
    count : float
        Bytes.

    Returns
    -------
    str
        In MiB or GiB.
    """
    mib = count / 2**20
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.3g} MiB"


def _hours(value: float) -> str:
    """Hours; below a hundredth the start of kernels takes longer than what they compute."""
    return f"{value:.2g}" if value >= 0.01 else "< 0.01"


def costs_table(arms: Mapping[str, Any]) -> pd.DataFrame:
    """Make the table of an experiment's arms, with one seed each.

    Parameters
    ----------
    arms : mapping
        Entry ``arms`` of `describe_recipe`.

    Returns
    -------
    DataFrame
        Text.
    """
    import pandas as pd

    rows = [
        {
            "arm": name,
            "weights": f"{arm['weights']:,}",
            "a member's own": f"{arm['selected']:,}" if arm["selected"] else "",
            "epochs": arm["epochs"],
            "minibatches": f"{arm['epochs'] * arm['minibatches']:,}",
            "base steps": f"{arm['steps']:,}",
            "FLOPs": f"{arm['flops']:.3g}",
            "h on an H100": _hours(arm["hours"]),
            "memory": size(arm["memory"]),
            "disk": size(arm["disk"]),
        }
        for name, arm in arms.items()
    ]
    return pd.DataFrame(rows)


def overview(scale: str, share: float, root: Path | None = None, *names: str) -> pd.DataFrame:
    """Make the table of all recipes of the package; at scale full with columns of scale gpu.

    Parameters
    ----------
    scale : str
        Scale of the recipes.
    share : float
        Assumed share of an H100's peak, in (0, 1].
    root : Path, optional
        Folder of data files.
    *names : str
        Only these recipes; all by default.

    Returns
    -------
    DataFrame
        Text.
    """
    import pandas as pd

    from neural.training.cost import estimate
    from neural.training.recipe import load_recipe, recipe_names

    rows = []
    for name in names or recipe_names():
        recipe = load_recipe(name, scale)
        costs = estimate(recipe, root)
        seeds = len(recipe.seeds)
        row = {
            "recipe": name,
            "model": ", ".join(dict.fromkeys(r.model.name for r in recipe.arms.values())),
            "weights": f"{max(cost.weights for cost in costs.values()):,}",
            "arms x seeds": f"{len(costs)} x {seeds}",
            "FLOPs": f"{seeds * sum(cost.flops for cost in costs.values()):.2g}",
            "h on an H100": _all_hours(recipe, costs, share),
            "memory": size(max(cost.memory for cost in costs.values())),
            "disk": size(seeds * sum(cost.disk for cost in costs.values())),
        }
        if scale == "full":
            on_gpu = load_recipe(name, "gpu")
            costs = estimate(on_gpu, root)
            row |= {
                "scale gpu": _switched_on(on_gpu),
                "gpu: h": _all_hours(on_gpu, costs, share),
                "gpu: memory": size(max(cost.memory for cost in costs.values())),
            }
        rows.append(row)
    return pd.DataFrame(rows)


def _all_hours(recipe: Recipe, costs: Mapping[str, Cost], share: float) -> str:
    """Hours of all arms and seeds."""
    from neural.training.cost import hours

    one_seed = sum(hours([costs[arm]], run.train.precision, share)
                   for arm, run in recipe.arms.items())  # fmt: skip
    return _hours(len(recipe.seeds) * one_seed)


def _switched_on(recipe: Recipe) -> str:
    """Settings of scale gpu that are in use."""
    from neural.training.gpu_scale import choose

    chosen = choose(recipe.arms.values())
    return ", ".join(
        str(choice.value) if entry == "train.precision" else entry.partition(".")[2]
        for entry, choice in chosen.items()
        if choice.value
    )
