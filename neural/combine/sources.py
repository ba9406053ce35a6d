"""Where members come from: finished runs, what runs kept beside their model, files of weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from neural.combine.members import Member, Members
from neural.data.catalog import data_root
from neural.training.build import plain_model, read_weights
from neural.training.config import RunConfig, describe, restore
from neural.training.load_run import open_finished, reopen
from neural.training.recipe import load_recipe
from neural.training.snapshots import FOLDER, LIST
from neural.training.task import DTYPES, Runtime, Task, open_task
from nqm.errors import NQMError
from nqm.files import check_regular
from nqm.keys import difference
from nqm.table import read_metadata, read_table

#: Files that Hugging Face's libraries write into a model's folder.
_SHARDS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")
#: Ends of the names of files with weights.
_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".th", ".bin")


@dataclass(frozen=True)
class Opened:
    """Members on disk, and the data they are judged on.

    Attributes
    ----------
    members : Members
    run : RunConfig or None
        States architecture and data; None if the caller gave a model of their own.
    task : Task or None
    """

    members: Members
    run: RunConfig | None
    task: Task | None


def open_members(
    where: Sequence[str | Path],
    *,
    like: str | Path | None = None,
    model: nn.Module | None = None,
    ancestor: str | Path | None = None,
    runtime: Runtime | None = None,
    scale: str = "full",
    overrides: Sequence[str] = (),
) -> Opened:
    """Find members on disk; their weights are read later, one at a time.

    Parameters
    ----------
    where : sequence of str or Path
        Each one of: the folder of a finished run (its single model), ``RUN#members`` (its
        late-phase members, or the clients of federated rounds), ``RUN#snapshots`` (models that it
        kept on its way), a pattern such as
        ``"out/x/base/seed*"``, a file of weights (.safetensors, .pt, .pth, .ckpt, .th, .bin), or a
        folder with ``model.safetensors``.
    like : str or Path, optional
        A run's folder or a recipe, which states architecture and data; the first run of `where` by
        default.
    model : Module, optional
        The architecture itself, instead of `like`.
    ancestor : str or Path, optional
        Model from which all were fine-tuned: a run or a file.
    runtime : Runtime, optional
        Device and data folder; one CPU by default.
    scale : {"full", "cpu", "smoke"}
        Scale of a recipe given by `like`.
    overrides : sequence of str
        ``key=value``, changes of a recipe given by `like`.

    Returns
    -------
    Opened

    Raises
    ------
    NQMError
        If something is not there, is not what it should be, or nothing states the architecture.
    """
    runtime = runtime or Runtime()
    places = [place for one in where for place in _expand(str(one))]
    runs = {
        folder: run
        for folder in dict.fromkeys(Path(place.partition("#")[0]) for place in places)
        if (run := _run_at(folder)) is not None
    }
    for place in places:
        if Path(place).is_dir() and Path(place) not in runs and _weights_in(Path(place)) is None:
            open_finished(place)  # which says what the folder is
    run = None if model is not None else _stated(like, runs, scale, overrides)
    if run is None and model is None:
        raise NQMError(
            "nothing states the architecture of the members: files of weights need --like, the "
            "folder of a run or a recipe"
        )
    task = None if run is None else open_task(run, runtime)
    if model is None:
        assert run is not None
        assert task is not None
        model = plain_model(run.model, task).to(DTYPES[run.train.precision])
    for folder, other in runs.items():
        _check_alike(folder, other, run)
    found = [member for place in places for member in _members(place, model, runs, runtime.root)]
    start = None
    if ancestor is not None:
        (start,) = _members(str(ancestor), model, {}, runtime.root)[:1]
    elif run is not None and run.model.checkpoint is not None:
        file = _checkpoint(run.model.checkpoint, runtime.root)
        start = Member("ancestor", _reader(file, model), source=file)
    return Opened(Members(model, _named(found), start), run, task)


def _expand(place: str) -> list[str]:
    """What a pattern matches; anything else is itself."""
    path, mark, what = place.partition("#")
    if not has_magic(path) or Path(path).exists():
        return [place]
    matches = sorted(glob(path))
    if not matches:
        raise NQMError(f"{place}: no file or folder matches this pattern")
    return [f"{one}{mark}{what}" for one in matches]


def _stated(
    like: str | Path | None,
    runs: Mapping[Path, RunConfig],
    scale: str,
    overrides: Sequence[str],
) -> RunConfig | None:
    """The run that states architecture and data."""
    if like is None:
        return next(iter(runs.values()), None)
    if (run := _run_at(Path(like))) is not None:
        return run
    return next(iter(load_recipe(str(like), scale, overrides).arms.values()))


def _run_at(folder: Path) -> RunConfig | None:
    """Configuration of a finished run or of finished federated rounds; None: the folder has none.

    Of rounds it is the clients' configuration, without a number of epochs of its own.
    """
    if (folder / "run.json").is_file():
        return open_finished(folder)
    if (file := _rounds_in(folder)) is None:
        return None
    try:
        stated = dict(read_metadata(file)["config"])
        parts = {name: part for name, part in stated.items() if name not in ("clients", "scope")}
        return restore(parts | {"train": {**parts["train"], "epochs": 1}})
    except (KeyError, TypeError) as error:
        raise NQMError(f"{file} does not state what clients trained ({error!s:.60})") from None


def _rounds_in(folder: Path) -> Path | None:
    """Table of the finished federated rounds in a folder."""
    file = folder / "history.parquet"
    found = file.is_file() and (folder / FOLDER / LIST).is_file()
    return file if found and not (folder / "run.json").exists() else None


def _check_alike(folder: Path, other: RunConfig, run: RunConfig | None) -> None:
    """Refuse a run whose inputs mean something else: another set, or other normalisation."""
    if run is None:
        return
    for name in ("name", "mean", "std", "length"):
        if getattr(other.data, name) != getattr(run.data, name):
            differ = difference(describe(run)["data"], describe(other)["data"])
            raise NQMError(f"{folder} was trained on other data: {differ}; they cannot be combined")


def _members(
    place: str, model: nn.Module, runs: Mapping[Path, RunConfig], root: Path | None
) -> list[Member]:
    """Members at one place."""
    where, mark, what = place.partition("#")
    path = Path(where).expanduser()
    if mark and what not in ("members", "snapshots"):
        raise NQMError(f"{place}: after # comes members or snapshots; got {what!r}")
    if mark and path not in runs:
        raise NQMError(f"{place}: {where} is not the folder of a finished run")
    rounds = _rounds_in(path)
    if what == "members":
        return _late_members(path, runs[path]) if rounds is None else _kept(path, what, model)
    if what == "snapshots":
        return _kept(path, what, model)
    if (run := runs.get(path) or _run_at(path)) is not None:
        epochs = run.train.epochs if rounds is None else read_table(rounds)["epochs_total"].iloc[-1]
        return [Member(where, _reader(path / "model.pt", model), float(epochs), source=path)]
    if path.is_dir():
        file = _weights_in(path)
        if file is None:
            raise NQMError(f"{path} is no run and holds no {_SHARDS[1]}")
        return [Member(where, _reader(file, model), source=file)]
    if not path.exists():
        raise NQMError(f"{place}: there is no such file or folder")
    if path.suffix not in _SUFFIXES:
        raise NQMError(
            f"{place}: the name of a file of weights ends in {', '.join(_SUFFIXES)}; got "
            f"{path.suffix!r}"
        )
    return [Member(where, _reader(path, model), source=path)]


def _weights_in(folder: Path) -> Path | None:
    """The file of weights in a folder that Hugging Face's libraries wrote."""
    return next((folder / name for name in _SHARDS if (folder / name).is_file()), None)


def _reader(path: Path, model: nn.Module) -> Callable[[], dict[str, Tensor]]:
    if path.name.endswith(".index.json"):
        return lambda: _sharded(path, model)
    return lambda: read_weights(path, model)


def _sharded(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """A state dict in several files, by Hugging Face's index of them."""
    check_regular(path)
    try:
        files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        inside = all(isinstance(file, str) and Path(file).name == file for file in files)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise NQMError(f"{path} is not an index of shards ({error!s:.60})") from None
    if not files or not inside:
        raise NQMError(f"{path} is not an index of shards: it names no file beside it")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_weights(path.parent / file, model, part=True)
    return state


def _late_members(folder: Path, run: RunConfig) -> list[Member]:
    """Late-phase members; base and members are read once, together."""
    if run.late_phase is None:
        raise NQMError(f"{folder}#members: this run has no late-phase members")

    @cache
    def late() -> Any:
        return reopen(folder).late

    trunk = (str(folder), float(run.train.epochs))
    return [
        Member(
            f"{folder}#{k}",
            lambda k=k: late().member(k).state_dict(),  # type: ignore[misc]
            0.0,
            trunk,
            folder,
        )
        for k in range(run.late_phase.members)
    ]


def _kept(folder: Path, what: str, model: nn.Module) -> list[Member]:
    """Models that a run kept on its way, or clients of the last round, by their list."""
    file = folder / FOLDER / LIST
    if not file.is_file():
        raise NQMError(f"{folder}#{what}: this run kept none; it has no {FOLDER}/{LIST}")
    check_regular(file)
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        made = [
            Member(
                f"{folder}#{entry['name']}",
                _reader(folder / FOLDER / entry["file"], model),
                float(entry["epochs"]),
                None if not entry["trunk"] else (str(folder), float(entry["trunk"])),
                folder / FOLDER / entry["file"],
            )
            for entry in entries
            if Path(entry["file"]).name == entry["file"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NQMError(f"{file} is damaged ({error!s:.60}); train the run again") from None
    return made


def _checkpoint(name: str, root: Path | None) -> Path:
    from neural.training.build import find_checkpoint

    return find_checkpoint(name, root or data_root())


def _named(members: Sequence[Member]) -> list[Member]:
    """The members under shorter names: without the folders in which all of them lie."""
    if not members:
        return []
    names = [member.name for member in members]
    folders = [Path(name.partition("#")[0]).parts for name in names]
    shared = 0
    while (
        all(len(one) > shared + 1 for one in folders) and len({one[shared] for one in folders}) < 2
    ):
        shared += 1
    names = ["/".join(Path(name).parts[shared:]) for name in names]
    return [replace(member, name=name) for member, name in zip(members, names, strict=True)]
