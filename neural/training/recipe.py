"""Recipes: an experiment as a TOML file, with several arms and seeds.

The sections of a run (`neural.training.config`) are at the top level and shared by all arms, except
that only arms that ``use`` them have ``[late_phase]``, ``[average]``, ``[snapshots]`` and
``[branches]``. Other entries of an arm change the shared ones. An arm that uses ``[branches]``
stands for several, ``ARM/branch0`` and so on (see `neural.training.branches`)::

    title = "..."
    seeds = 5
    [data] ...
    [late_phase] ...
    [arm.base]
    [arm.late_phase]
    use = ["late_phase"]
    train.weight_decay = 1e-3
    [scale.smoke]
    train.epochs = 2
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from neural.training import gpu_scale
from neural.training.branches import BranchesConfig, expanded
from neural.training.config import RunConfig, build
from nqm.errors import NQMError, check_integer, check_word, suggest
from nqm.names import check_folder_names
from nqm.runs import toml

SCALES = ("full", "gpu", "cpu", "smoke")
#: Largest number of seeds; every arm has a run for each.
MOST_SEEDS = 10_000
#: Sections that arms have only if they use them.
OPTIONAL = ("late_phase", "average", "snapshots", "branches")
_OWN = ("title", "about", "seeds", "arm", "scale")
#: Files of an experiment beside the folders of its arms.
OUTPUTS = (
    *("results.parquet", "history.parquet", "cycles.parquet"),
    *("comparison.png", "comparison.pdf", "cycles.png", "cycles.pdf"),
)


@dataclass(frozen=True)
class Recipe:
    """An experiment: one run for every arm and seed.

    Attributes
    ----------
    name : str
        Name of the recipe, that of its file.
    title, about : str
        Title for figures, and description.
    scale : {"full", "gpu", "cpu", "smoke"}
        Scale at which it was loaded.
    seeds : tuple of int
        Seeds of the runs.
    arms : mapping of str to RunConfig
        Name of the arm -> run with seed 0. The others are compared with the first. Branches of an
        arm are arms.
    mapping : mapping
        Content of the TOML file with the changes of the scale.
    branches : mapping of str to (int, int)
        Branch of a checkpoint -> its number, and how many its arm has.
    """

    name: str
    title: str
    about: str
    scale: str
    seeds: tuple[int, ...]
    arms: Mapping[str, RunConfig]
    mapping: Mapping[str, Any]
    branches: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def run_seed(self, arm: str, seed: int) -> int:
        """Seed of a run.

        Parameters
        ----------
        arm : str
        seed : int
            Of the experiment.

        Returns
        -------
        int
            `seed` itself, but for branches of a checkpoint: each draws minibatches of its own.
        """
        branch, count = self.branches.get(arm, (0, 1))
        return seed * count + branch


def recipe_names() -> list[str]:
    """List the names of the recipes in the package.

    Returns
    -------
    list of str
        Sorted.
    """
    folder = files("neural") / "recipes"
    names = [path.name for path in folder.iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load_recipe(
    name: str, scale: str = "full", overrides: Sequence[str] = (), *, arms: Sequence[str] = ()
) -> Recipe:
    """Load a recipe by its name or from a file.

    Parameters
    ----------
    name : str
        One of `recipe_names`, or the path of a TOML file.
    scale : {"full", "gpu", "cpu", "smoke"}
        ``full`` is the recipe itself; for the others its changes ``[scale.NAME]`` are applied.
        Every recipe has ``gpu``, by the rule of `neural.training.gpu_scale`.
    overrides : sequence of str
        Changes of the form ``train.epochs=3``; applied last.
    arms : sequence of str
        Arms that are needed; all by default. Of the others those are left out that cannot be made
        with these changes, like one whose members start after the last epoch.

    Returns
    -------
    Recipe

    Raises
    ------
    NQMError
        If there is no such recipe or scale, or an entry is unknown, missing or out of range; the
        message names the recipe or the dotted key.
    """
    path = Path(name)
    if path.suffix != ".toml":
        if name not in recipe_names():
            raise NQMError(f"no recipe is called {name!r}{suggest(name, recipe_names())}")
        path = Path(str(files("neural") / "recipes" / f"{name}.toml"))
    mapping = toml.load(path)
    check_word("scale", scale, SCALES)
    changes = toml.table_at("scale", mapping.pop("scale", {}))
    toml.known_keys("scale", changes, SCALES[1:])
    if scale not in ("full", "gpu", *changes):
        has = ", ".join(dict.fromkeys(("full", "gpu", *changes)))
        raise NQMError(f"recipe {path.stem} has no scale {scale!r}; it has {has}")
    own = toml.table_at(f"scale.{scale}", changes.get(scale, {}))
    if scale == "gpu":
        asked = copy.deepcopy(mapping)
        merge(asked, own)
        toml.override(asked, overrides)
        chosen = gpu_scale.changes(make_recipe(path.stem, asked).arms.values())
        merge(mapping, {name: part for name, part in chosen.items() if name in mapping})
        for table in mapping["arm"].values():  # a section that arms alone have
            for name in chosen.keys() - mapping.keys() & table.keys():
                table[name] = chosen[name] | table[name]
    merge(mapping, own)
    toml.override(mapping, overrides)
    return make_recipe(path.stem, mapping, scale, needed=arms)


def make_recipe(
    name: str, mapping: Mapping[str, Any], scale: str = "full", *, needed: Sequence[str] = ()
) -> Recipe:
    """Make a recipe from a mapping.

    Parameters
    ----------
    name : str
        Name of the recipe.
    mapping : mapping
        Content of the recipe's TOML file, with the changes of the scale applied and without the
        table ``[scale]``.
    scale : {"full", "gpu", "cpu", "smoke"}
        Name of the scale; it is recorded only.
    needed : sequence of str
        `arms` of `load_recipe`.

    Returns
    -------
    Recipe

    Raises
    ------
    NQMError
        If an entry is unknown, missing or out of range; the message names the recipe and the dotted
        key.
    """
    top = copy.deepcopy(dict(mapping))
    own = {key: top.pop(key) for key in _OWN if key in top}
    arms = toml.table_at("arm", own.get("arm", {}))
    if not arms:
        raise NQMError(f"recipe {name} has no arm; add an [arm.NAME] table")
    check_folder_names("arm", arms, OUTPUTS)
    runs: dict[str, RunConfig] = {}
    branches: dict[str, tuple[int, int]] = {}
    must = arms.keys() & {arm.partition("/")[0] for arm in needed} or arms.keys()
    for arm, table in arms.items():
        try:
            made = _runs(arm, top, table)
        except NQMError:
            if arm in must:
                raise
            continue
        runs |= made
        if arm not in made and next(iter(made.values())).model.checkpoint is not None:
            branches |= {branch: (i, len(made)) for i, branch in enumerate(made)}
    _check_used(top, arms)
    measured = next(iter(runs.values())).evaluate
    if measured.line and not any(run.late_phase for run in runs.values()):
        raise NQMError("evaluate.line would be ignored, as no arm has members; leave it out")
    return Recipe(
        name,
        toml.leaf("title", own.get("title", name), str),
        toml.leaf("about", own.get("about", ""), str),
        scale,
        _seeds(own.get("seeds", 1)),
        runs,
        mapping,
        branches,
    )


def _check_used(top: Mapping[str, Any], arms: Mapping[str, Any]) -> None:
    """Raise NQMError if no arm uses an optional section."""
    used = {section for table in arms.values() for section in table.get("use", ())}
    for section in OPTIONAL:
        if section in top and section not in used:
            raise NQMError(
                f'{section} would be ignored, as no arm uses it; add use = ["{section}"] to an '
                "arm, or leave it out"
            )


def _runs(arm: str, top: Mapping[str, Any], table: Any) -> dict[str, RunConfig]:
    """The run of an arm, or those of its branches, by name."""
    changes = dict(toml.table_at(f"arm.{arm}", table))
    used = toml.leaf(f"arm.{arm}.use", changes.pop("use", []), tuple[str, ...])
    for section in used:
        if section not in OPTIONAL or section not in top:
            raise NQMError(
                f"arm.{arm}.use: there is no section {section!r} to use"
                f"{suggest(section, [name for name in OPTIONAL if name in top])}"
            )
    unused = [name for name in OPTIONAL if name not in used]
    mapping = {name: copy.deepcopy(entry) for name, entry in top.items() if name not in unused}
    merge(mapping, changes)
    try:
        branches = mapping.pop("branches", None)
        if branches is None:
            return {arm: build(mapping)}
        return _branches(arm, branches, mapping)
    except NQMError as error:
        # The key may be one of the arm or of the top level, so the arm is named before it.
        raise NQMError(f"arm.{arm}: {error}") from None


def _branches(arm: str, section: Any, mapping: Mapping[str, Any]) -> dict[str, RunConfig]:
    table = dict(toml.table_at("branches", section))
    toml.require("branches", table, "vary")
    vary = toml.table_at("branches.vary", table.pop("vary"))
    config = toml.call(BranchesConfig, table, "branches", {"vary": vary})
    runs: dict[str, RunConfig] = {}
    for name, made in expanded(config, mapping):
        try:
            run = build(made)
        except NQMError as error:
            raise NQMError(f"{name}: {error}") from None
        # A checkpoint's branches have seeds of their own; others start from their seed's weights.
        if run.model.checkpoint is None and run in runs.values():
            raise NQMError(
                f"{name} is the same run as another branch; without model.checkpoint all of them "
                "have one seed: lower branches.count, or let branches.vary differ more"
            )
        runs[f"{arm}/{name}"] = run
    return runs


def merge(mapping: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Merge changes into a mapping, table by table.

    A table with ``schedule``, or a model with a name, replaces the old table entirely, since the
    options of one schedule or model do not belong to another.

    Parameters
    ----------
    mapping : dict
        Entries; changed in place.
    changes : mapping
        New entries, with the same nesting.
    """
    for name, value in changes.items():
        inner = mapping.get(name)
        anew = isinstance(value, Mapping) and (
            "schedule" in value or (name == "model" and "name" in value)
        )
        if isinstance(value, Mapping) and isinstance(inner, dict) and not anew:
            merge(inner, value)
        else:
            mapping[name] = copy.deepcopy(value)


def _seeds(value: Any) -> tuple[int, ...]:
    if isinstance(value, list):
        seeds = tuple(toml.leaf("seeds", value, list[int]))
        check_seeds("seeds", seeds)
        return seeds
    check_integer("seeds", value, 1)
    if value > MOST_SEEDS:
        raise NQMError(f"seeds must be at most {MOST_SEEDS}; got {value}")
    return tuple(range(value))


def check_seeds(where: str, seeds: Sequence[int]) -> None:
    """Check the seeds of an experiment.

    Parameters
    ----------
    where : str
        Dotted key of the seeds, for the message.
    seeds : sequence of int
        The seeds.

    Raises
    ------
    NQMError
        If there are none or too many, if two are equal, or if one is out of range.
    """
    wrong = len(set(seeds)) < len(seeds) or any(not 0 <= s <= toml.LARGEST for s in seeds)
    if wrong or not 0 < len(seeds) <= MOST_SEEDS:
        raise NQMError(
            f"{where} must be 1 to {MOST_SEEDS} different whole numbers from 0 to 2^53; "
            f"got {list(seeds)!r:.60}"
        )
