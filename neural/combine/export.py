"""Members as files for mergekit, whose rules are not ours.

``mergekit-pytorch`` merges state dicts tensor by tensor, as a YAML file says. It requires exact
versions of much (and is under the LGPL), so that it is not called from here: it reads this folder
in an environment of its own, and writes a file that every command of ours reads again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from neural.combine.mean import refuse_factors
from neural.combine.members import Members, State, check_weights
from neural.late_phase.merge import singular_vectors
from neural.training.load_run import write_weights
from nqm.errors import NQMError, check_number, suggest
from nqm.files import replacing

#: Name of the file that mergekit reads.
CONFIG = "mergekit.yaml"


@dataclass(frozen=True)
class Method:
    """What mergekit's method needs, by version 0.1.5.

    Attributes
    ----------
    base : {"", "ancestor", "first"}
        What is its ``base_model``: nothing, the ancestor, or the first member.
    weight : {"", "mean", "one"}
        Weight of each member: none, 1 / N, or 1.
    each : mapping of str to float
        Further parameters of each member.
    shared : mapping of str to float
        Parameters of the merge.
    count : tuple of int
        Smallest and largest number of members; 0: no largest.
    random : bool
        Whether it drops weights at random.
    """

    base: str = "ancestor"
    weight: str = "mean"
    each: Mapping[str, float] = field(default_factory=dict)
    shared: Mapping[str, float] = field(default_factory=dict)
    count: tuple[int, int] = (1, 0)
    random: bool = False


_SUM = {"lambda": 1.0}
_HALF = {"density": 0.5}
#: Method of mergekit -> what it needs. Every default can be changed by `parameters`.
METHODS: dict[str, Method] = {
    "linear": Method(base=""),
    "task_arithmetic": Method(weight="one", shared={"lambda": 0.3}),
    "ties": Method(weight="one", each={"density": 0.2}, shared=_SUM),
    "dare_linear": Method(each=_HALF, shared=_SUM, random=True),
    "dare_ties": Method(each=_HALF, shared=_SUM, random=True),
    "breadcrumbs": Method(each={"density": 0.85, "gamma": 0.01}, shared=_SUM),
    "breadcrumbs_ties": Method(each={"density": 0.85, "gamma": 0.01}, shared=_SUM),
    "della": Method(each={"density": 0.5, "epsilon": 0.15}, shared=_SUM, random=True),
    "della_linear": Method(each={"density": 0.5, "epsilon": 0.15}, shared=_SUM, random=True),
    "sce": Method(weight="", shared={"select_topk": 1.0}),
    "model_stock": Method(weight="", count=(2, 0)),
    "slerp": Method(base="first", weight="", shared={"t": 0.5}, count=(2, 2)),
    "nuslerp": Method(base="", count=(2, 2)),
    "multislerp": Method(base="", count=(2, 0)),
    "karcher": Method(base="", weight="", shared={"max_iter": 10, "tol": 1e-5}, count=(2, 0)),
}


def for_mergekit(
    members: Members,
    out: str | Path,
    method: str = "linear",
    *,
    weights: tuple[float, ...] | None = None,
    settings: Mapping[str, float] | None = None,
) -> list[Path]:
    """Write members, and the file by which ``mergekit-pytorch`` merges them.

    mergekit wants tensors of integers to be equal in all its inputs. They are set to the largest,
    which our own means take. BatchNorm's statistics are merged as weights are, and mean nothing
    then: compute them anew (``nqm neural merge MERGED --like RUN``).

    Parameters
    ----------
    members : Members
    out : str or Path
        A new or empty folder.
    method : str
        A name of `METHODS`.
    weights : tuple of float, optional
        One a member, summing to 1, instead of the method's own.
    settings : mapping of str to float, optional
        Other parameters of the method, e.g. ``density``.

    Returns
    -------
    list of Path
        The files; the last is for mergekit. Its paths are relative to the folder.

    Raises
    ------
    NQMError
        If the method lacks what it needs or cannot merge this architecture, a parameter is none of
        its, or the folder holds files.
    """
    if method not in METHODS:
        raise NQMError(f"method: mergekit has no {method!r}{suggest(method, METHODS)}")
    known = METHODS[method]
    each, shared = _settings(method, known, settings or {})
    share = _weights(method, known, members, weights)
    _check(members, method, known)
    start = members.ancestor_state(method) if known.base == "ancestor" else None
    whole = _integers(members, start)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise NQMError(f"{out} is not an empty folder; choose another for mergekit's files")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for index, member in enumerate(members):
        state = members.state(index) | whole
        files.append(_written(out / f"member{index}.safetensors", state, member.name))
    base = files[0].name if known.base == "first" else None
    if start is not None:
        files.append(_written(out / "ancestor.safetensors", start | whole, "ancestor"))
        base = files[-1].name
    lines = [
        f"# cd {json.dumps(str(out))} && mergekit-pytorch {CONFIG} merged",
        f"merge_method: {method}",
        *([] if base is None else [f"base_model: {base}"]),
        "dtype: float32" if not _double(members) else "dtype: float64",
        *_table("parameters", shared, ""),
        "models:",
    ]
    for index, member in enumerate(members):
        lines.append(f"  - model: {files[index].name}  # {json.dumps(member.name)}")
        own = each if share is None else {"weight": share[index], **each}
        lines.extend(_table("parameters", own, "    "))
    with replacing(out / CONFIG) as stream:
        stream.write(("\n".join(lines) + "\n").encode())
    return [*files, out / CONFIG]


def _settings(
    method: str, known: Method, settings: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Parameters of each member and of the merge, with the user's."""
    each, shared = dict(known.each), dict(known.shared)
    for name, value in settings.items():
        table = each if name in each else shared
        if name not in table:
            has = ", ".join([*each, *shared]) or "none"
            raise NQMError(f"mergekit's {method} has no parameter {name!r}; it has: {has}")
        if name in ("density", "gamma", "epsilon", "select_topk", "t"):
            check_number(name, value, low=0.0, high=1.0)
        check_number(name, value)
        table[name] = value
    return each, shared


def _weights(
    method: str, known: Method, members: Members, weights: tuple[float, ...] | None
) -> list[float] | None:
    count = len(members)
    if weights is None:
        return {"": None, "one": [1.0] * count, "mean": [1.0 / count] * count}[known.weight]
    if not known.weight:
        raise NQMError(f"mergekit's {method} takes no weights; leave --weights out")
    return [float(w) for w in check_weights(method, weights, count)]


def _check(members: Members, method: str, known: Method) -> None:
    """Refuse what mergekit would refuse late, or merge wrongly."""
    least, most = known.count
    if len(members) < least or (most and len(members) > most):
        asked = f"exactly {least}" if most == least else f"at least {least}"
        raise NQMError(f"mergekit's {method} needs {asked} members; got {len(members)}")
    if known.base == "ancestor" and members.ancestor is None:
        raise NQMError(
            f"mergekit's {method} needs the model from which the members were fine-tuned; give "
            "--ancestor"
        )
    refuse_factors(members.weight_names)
    model = members.model
    named = dict(model.named_parameters(remove_duplicate=False))
    if known.random and len(named) > len(members.weight_names):
        raise NQMError(
            f"mergekit's {method} drops weights at random, and would drop others of a tied weight "
            "under each of its names; choose a method without chance"
        )
    if singular_vectors(model, model.state_dict()):
        raise NQMError(
            "the model has spectral normalisation, whose vectors mergekit would merge as weights; "
            "use nqm neural merge"
        )
    for name, value in model.state_dict().items():
        if value.is_complex():
            raise NQMError(f"{name!r} is complex, and mergekit merges real weights only")


def _integers(members: Members, start: State | None) -> State:
    """Largest value of every tensor that is no real number, over all models."""
    largest: State = {}
    states = members.states() if start is None else (*members.states(), start)
    for state in states:
        for name, value in state.items():
            if not value.is_floating_point():
                held = largest.get(name)
                largest[name] = value if held is None else torch.maximum(held, value)
            elif not bool(value.isfinite().all()):
                raise NQMError(
                    f"{name!r} holds numbers that are not finite (a mask?), which mergekit would "
                    "add up; use nqm neural merge"
                )
    return largest


def _written(path: Path, state: Mapping[str, Tensor], name: str) -> Path:
    return write_weights(path, lambda: state, {"member": name})


def _double(members: Members) -> bool:
    return any(value.dtype == torch.float64 for value in members.model.state_dict().values())


def _table(name: str, values: Mapping[str, float], indent: str) -> list[str]:
    """A table of numbers in YAML, or nothing."""
    if not values:
        return []
    # YAML 1.1 takes 1e-05 for a text: it wants a point.
    shown = {key: f"{value!r}" for key, value in values.items()}
    pointed = {key: v if "." in v else v.replace("e", ".0e") for key, v in shown.items()}
    return [f"{indent}{name}:", *(f"{indent}  {key}: {value}" for key, value in pointed.items())]
