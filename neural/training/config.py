"""What a training run is: data, model, optimisation, late-phase weights, averaging, evaluation.

Each section of a recipe is one frozen dataclass here; `build` makes them from a mapping, so that
every mistake is reported under its dotted key. All times are in epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from neural.data.augment import AUGMENTATIONS
from neural.late_phase.options import MemberOptions
from neural.models import option_defaults
from neural.training.averages import AVERAGES, Average
from nqm import keys
from nqm.errors import NQMError, check_integer, check_number, check_word
from nqm.runs import toml
from nqm.schedule import SCHEDULES, Schedule

PRECISIONS = ("float32", "bfloat16", "float64")
LR_EVERY = ("epoch", "step")
OPTIMIZERS = ("sgd", "adam", "adamw")
SAMPLINGS = ("shuffle", "replacement", "stream")
#: More than anyone trains for; schedules are looked at epoch by epoch.
MOST_EPOCHS = 1_000_000


def refuse_unused(part: Any, where: str, names: Iterable[str], reason: str) -> None:
    """Refuse entries that differ from their default although nothing reads them.

    Parameters
    ----------
    part : dataclass
        The section of the configuration.
    where : str
        Its dotted key, for the message.
    names : iterable of str
        Entries that nothing reads.
    reason : str
        Why nothing reads them, for the message.

    Raises
    ------
    NQMError
        If such an entry differs from its default.
    """
    stated = {one.name: one for one in fields(part)}
    for name in names:
        if (value := getattr(part, name)) != stated[name].default:
            shown = list(value) if isinstance(value, tuple) else value
            raise NQMError(
                f"{where}.{name} would be ignored ({reason}); leave it out; got {shown!r:.60}"
            )


@dataclass(frozen=True)
class DataConfig:
    """Data set and its batches.

    Attributes
    ----------
    name : str
        As `neural.data.load` knows it.
    batch_size : int
        Examples (or windows of text) of one minibatch.
    augment : tuple of str
        ``crop``, ``flip``.
    cutout : int
        Side of the hole, pixels; 0: none.
    sampling : {"shuffle", "replacement", "stream"}
        "stream" is for texts.
    train_examples, test_examples : int, optional
        Take a class-balanced part, or this many bytes of a text.
    length : int
        Symbols of a window of text.
    mean, std : tuple of float, optional
        Normalisation of each channel instead of the set's own, as a published checkpoint needs.
    """

    name: str
    batch_size: int = 128
    augment: tuple[str, ...] = ()
    cutout: int = 0
    sampling: str = "shuffle"
    train_examples: int | None = None
    test_examples: int | None = None
    length: int = 100
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_integer("DataConfig.batch_size", self.batch_size, 1)
        check_integer("DataConfig.length", self.length, 1)
        check_integer("DataConfig.cutout", self.cutout, 0)
        check_word("DataConfig.sampling", self.sampling, SAMPLINGS)
        for name in self.augment:
            check_word("DataConfig.augment", name, AUGMENTATIONS)
        for name in ("train_examples", "test_examples"):
            if getattr(self, name) is not None:
                check_integer(f"DataConfig.{name}", getattr(self, name), 1)
        for value in self.mean or ():
            check_number("DataConfig.mean", value)
        for value in self.std or ():
            check_number("DataConfig.std", value, low=0.0, closed_low=False)
        for name in ("mean", "std"):
            if getattr(self, name) == ():
                raise NQMError(f"DataConfig.{name} must hold a number for each channel; got []")


@dataclass(frozen=True)
class ModelConfig:
    """Model, and what is put on it.

    Attributes
    ----------
    name : str
        As `neural.models.build` knows it.
    options : mapping
        Of the model.
    checkpoint : str, optional
        State dict to start from.
    rank1 : str, optional
        Glob over weight names that get rank-1 factors, trained from the start.
    lora : int, optional
        Rank of low-rank updates; all other weights but the head's are frozen.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    rank1: str | None = None
    lora: int | None = None

    def __post_init__(self) -> None:
        if self.lora is not None:
            check_integer("ModelConfig.lora", self.lora, 1)
        if self.checkpoint is not None and not Path(self.checkpoint).name:
            raise NQMError(
                f"ModelConfig.checkpoint must be the path of a file; got {self.checkpoint!r}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation of the base weights.

    Attributes
    ----------
    epochs : int
    lr : Schedule
        Over epochs.
    lr_every : {"epoch", "step"}
        Whether the rate moves once an epoch, or with every minibatch.
    optimizer : {"sgd", "adam", "adamw"}
    momentum : float
    nesterov : bool
    betas : tuple of float
        Adam's beta1 and beta2.
    weight_decay : float
        On every weight, as in the paper, but those that `no_decay` selects.
    no_decay : str
        Selection, e.g. ``"norm+bias"``.
    label_smoothing : float
    clip_norm : float, optional
        Largest norm of the base gradient, and of each member's.
    precision : {"float32", "bfloat16", "float64"}
        bfloat16: autocast of the forward pass; weights stay in float32.
    channels_last, compile : bool
    micro_batches : int
        Pieces a minibatch is run in.
    """

    epochs: int
    lr: Schedule
    lr_every: str = "epoch"
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = True
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 5e-4
    no_decay: str = ""
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    micro_batches: int = 1

    def __post_init__(self) -> None:
        check_integer("TrainConfig.epochs", self.epochs, 1)
        if self.epochs > MOST_EPOCHS:
            raise NQMError(f"TrainConfig.epochs must be at most {MOST_EPOCHS}; got {self.epochs}")
        check_integer("TrainConfig.micro_batches", self.micro_batches, 1)
        check_number("TrainConfig.momentum", self.momentum, low=0.0, high=1.0, closed_high=False)
        check_number("TrainConfig.weight_decay", self.weight_decay, low=0.0)
        check_number("TrainConfig.label_smoothing", self.label_smoothing, low=0.0, high=1.0)
        if len(self.betas) != 2:
            raise NQMError(f"TrainConfig.betas must be two numbers; got {list(self.betas)}")
        for beta in self.betas:
            check_number("TrainConfig.betas", beta, low=0.0, high=1.0, closed_high=False)
        if self.clip_norm is not None:
            check_number("TrainConfig.clip_norm", self.clip_norm, low=0.0, closed_low=False)
        for name, known in _WORDS.items():
            check_word(f"TrainConfig.{name}", getattr(self, name), known)
        unused = "betas" if self.optimizer == "sgd" else "momentum"
        if getattr(self, unused) != 0.0:  # which says that there is none
            refuse_unused(self, "TrainConfig", (unused,), f"optimizer = {self.optimizer!r}")


_WORDS = {"lr_every": LR_EVERY, "optimizer": OPTIMIZERS, "precision": PRECISIONS}


@dataclass(frozen=True, kw_only=True)
class LatePhaseConfig(MemberOptions):
    """Late-phase members: the options of `neural.LatePhase`, and those of a run.

    Attributes
    ----------
    start_epoch : int
        T0: number of epochs after which the members are spawned.
    members : int
        K.
    select : str
        What is replicated.
    fused : bool
        Run all members' minibatches in one forward pass.
    member_lr : Schedule, optional
        Learning rate of the members over the epochs of the run; by default the base's.
    weight_decay : float, optional
        Weight decay of the members; by default the base's. Members that `TrainConfig.no_decay`
        selects have none.
    """

    start_epoch: int
    members: int = 10
    select: str = "batchnorm+head"
    fused: bool = False
    member_lr: Schedule | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("LatePhaseConfig.start_epoch", self.start_epoch, 0)
        if self.weight_decay is not None:
            check_number("LatePhaseConfig.weight_decay", self.weight_decay, low=0.0)
        if self.fused and self.idle_steps != "none":
            raise NQMError(
                f"LatePhaseConfig.fused needs idle_steps = 'none'; got {self.idle_steps!r}"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured beside the test metrics at the end.

    Attributes
    ----------
    every : int
        Epochs between two evaluations during training.
    batch_size : int
    ood : tuple of str
        Data sets that are out of distribution.
    corruptions, flatness, line : bool
        Robustness, loss rise under weight noise, and the line between a member and the average.
    mc_dropout : int
        Samples of MC-dropout; 0: none.
    """

    every: int = 1
    batch_size: int = 500
    ood: tuple[str, ...] = ()
    corruptions: bool = False
    flatness: bool = False
    line: bool = False
    mc_dropout: int = 0

    def __post_init__(self) -> None:
        check_integer("EvaluateConfig.every", self.every, 1)
        check_integer("EvaluateConfig.batch_size", self.batch_size, 1)
        check_integer("EvaluateConfig.mc_dropout", self.mc_dropout, 0)


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    Attributes
    ----------
    seed : int
        Seed of the initial weights, the order of the data, and the members' noise.
    """

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    late_phase: LatePhaseConfig | None = None
    average: Average[Any] | None = None
    evaluate: EvaluateConfig = EvaluateConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, 0)
        if self.seed > toml.LARGEST:
            raise NQMError(f"seed must be at most 2^53; got {self.seed}")
        epochs = self.train.epochs
        for name, part in (("late_phase", self.late_phase), ("average", self.average)):
            if part is not None and part.start_epoch >= epochs:
                raise NQMError(
                    f"{name}.start_epoch must lie before the end of training, epoch {epochs}; "
                    f"got {part.start_epoch}"
                )
        late, average = self.late_phase, self.average
        if late is not None and late.fused and self.train.micro_batches > 1:
            raise NQMError(
                "late_phase.fused runs whole minibatches and needs train.micro_batches = 1; "
                f"got {self.train.micro_batches}"
            )
        if late is not None and average is not None and average.start_epoch < late.start_epoch:
            raise NQMError(
                "average.start_epoch must not lie before late_phase.start_epoch, "
                f"{late.start_epoch}, as the average is over the members too; "
                f"got {average.start_epoch}"
            )


SECTIONS: dict[str, Any] = {
    "data": DataConfig,
    "train": TrainConfig,
    "late_phase": LatePhaseConfig,
    "evaluate": EvaluateConfig,
}
_TOP = ("data", "model", "train", "late_phase", "average", "evaluate", "seed")


def build(mapping: Mapping[str, Any]) -> RunConfig:
    """Make the run that a mapping describes.

    Parameters
    ----------
    mapping : mapping
        Sections and entries, as in a recipe (see `RunConfig`).

    Returns
    -------
    RunConfig

    Raises
    ------
    NQMError
        If an entry is unknown, missing or out of range; the message names its dotted key.
    """
    names = {name: tuple(toml.signature(cls)[0]) for name, cls in SECTIONS.items()}
    toml.check_sections(mapping, names)
    toml.known_keys("", mapping, _TOP)
    for name in ("data", "model", "train"):
        if name not in mapping:
            raise NQMError(f"{name} is missing; add a [{name}] table")
    parts: dict[str, Any] = {
        name: toml.call(SECTIONS[name], toml.table_at(name, mapping[name]), name)
        for name in mapping
        if name in SECTIONS
    }
    if "average" in mapping:
        parts["average"] = _average(mapping["average"])
    seed = toml.leaf("seed", mapping.get("seed", 0), int)
    return RunConfig(model=_model(mapping["model"]), seed=seed, **parts)


def _model(value: Any) -> ModelConfig:
    """Entries that are none of ours are the model's own options."""
    table = dict(toml.table_at("model", value))
    toml.require("model", table, "name")
    for name in ("classes", "channels"):
        if name in table:
            raise NQMError(f"model.{name} is what the data have; leave it out")
    names = ("name", "checkpoint", "rank1", "lora")
    own: dict[str, Any] = {name: table.pop(name) for name in names if name in table}
    made: ModelConfig = toml.call(ModelConfig, own, "model", {"options": table})
    return made


def _average(value: Any) -> Average[Any]:
    """Entries beside `method` are the options of that method alone."""
    table = dict(toml.table_at("average", value))
    toml.require("average", table, "method")
    method = table.pop("method")
    kind = toml.lookup("average.method", method, AVERAGES)
    options = [one.name for one in fields(kind)]
    for name in table:
        if name not in options:
            raise NQMError(
                f"average.{name} is no option of average.method = {method!r}, which has "
                f"{', '.join(options)}; leave it out"
            )
    made: Average[Any] = toml.call(kind, table, "average")
    return made


def restore(mapping: Mapping[str, Any]) -> RunConfig:
    """The run that `describe` described, by this version or an older one.

    Parameters
    ----------
    mapping : mapping
        An entry that it lacks was added since; it has the value that keys leave out.

    Returns
    -------
    RunConfig

    Raises
    ------
    NQMError
        Naming the dotted key at fault.
    """
    known = SECTIONS | {"model": ModelConfig}
    if isinstance(average := mapping.get("average"), Mapping):
        known["average"] = AVERAGES.get(str(average.get("method")))
    filled = {
        name: {**keys.earlier_defaults(known.get(name)), **part}
        if isinstance(part, Mapping)
        else part
        for name, part in mapping.items()
    }
    return build({**keys.earlier_defaults(RunConfig), **filled})


def describe(run: RunConfig) -> dict[str, Any]:
    """The mapping from which `build` makes this run, with every default written out.

    Parameters
    ----------
    run : RunConfig

    Returns
    -------
    dict of str to object
    """
    mapping = {name: _plain(getattr(run, name)) for name in _TOP if getattr(run, name) is not None}
    return mapping | {"model": mapping["model"].pop("options") | mapping["model"]}


def differing(run: RunConfig) -> dict[str, Any]:
    """The entries of a run that differ from the defaults, in the form of `describe`.

    Defaults of a model's options are those of its class; options of models of other libraries
    always count as different.

    Parameters
    ----------
    run : RunConfig

    Returns
    -------
    dict of str to object
    """
    mapping = _differing(run)
    defaults = option_defaults(run.model.name)
    options = {
        name: value
        for name, value in mapping["model"].pop("options", {}).items()
        if name not in defaults or not keys.same(value, _plain(defaults[name]))
    }
    return mapping | {"model": options | mapping["model"]}


def run_key(run: RunConfig) -> str:
    """Content key of a run, made of the entries that differ from the defaults (see `nqm.keys`).

    Parameters
    ----------
    run : RunConfig

    Returns
    -------
    str
    """
    return keys.key(differing(run))


def _plain(value: Any, entries: Callable[[Any], dict[str, Any]] | None = None) -> Any:
    """A value as `build` reads it; `entries` gives those of a dataclass, all by default."""
    entries = entries or _fields
    if isinstance(value, Schedule):
        names = {kind: name for name, kind in SCHEDULES.items()}
        return {"schedule": names[type(value)]} | entries(value)
    if isinstance(value, Average):
        return {"method": value.method} | entries(value)
    if is_dataclass(value):
        return entries(value)
    if isinstance(value, Mapping):
        return {name: _plain(entry, entries) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, entries) for entry in value]
    return value


def _fields(value: Any) -> dict[str, Any]:
    """Entries of a dataclass, but for those that are None by default."""
    stated = {one.name: (getattr(value, one.name), one.default) for one in fields(value)}
    return {
        name: _plain(entry)
        for name, (entry, default) in stated.items()
        if entry is not None or default not in (None, MISSING)
    }


def _differing(value: Any) -> dict[str, Any]:
    """Entries of a dataclass that differ from its defaults."""
    return keys.differing(value, lambda entry: _plain(entry, _differing))
