"""Configuration of a training run: data, model, optimisation, members, averages, snapshots.

Each section of a recipe is a frozen dataclass. `build` makes them from a mapping and reports every
mistake with its dotted key. All times are in epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from neural.data.augment import AUGMENTATIONS
from neural.data.own import OWN
from neural.late_phase.options import MemberOptions
from neural.models import option_defaults
from neural.training.averages import AVERAGES, Average
from neural.training.snapshots import SnapshotsConfig
from nqm import keys
from nqm.errors import NQMError, check_integer, check_number, check_word
from nqm.runs import toml
from nqm.schedule import SCHEDULES, Schedule

PRECISIONS = ("float32", "bfloat16", "float64")
LR_EVERY = ("epoch", "step")
OPTIMIZERS = ("sgd", "adam", "adamw")
SAMPLINGS = ("shuffle", "replacement", "stream")
#: Largest number of epochs: schedules are evaluated for each.
MOST_EPOCHS = 1_000_000


def refuse_unused(part: Any, where: str, names: Iterable[str], reason: str) -> None:
    """Check that entries which are not used have their default values.

    Parameters
    ----------
    part : dataclass
        Section of the configuration.
    where : str
        Dotted key of the section, for the message.
    names : iterable of str
        Names of the entries that are not used.
    reason : str
        Reason, for the message.

    Raises
    ------
    NQMError
        If such an entry differs from its default.
    """
    defaults = {entry.name: entry.default for entry in fields(part)}
    for name in names:
        if (value := getattr(part, name)) != defaults[name]:
            shown = list(value) if isinstance(value, tuple) else value
            raise NQMError(
                f"{where}.{name} would be ignored ({reason}); leave it out; got {shown!r:.60}"
            )


@dataclass(frozen=True)
class DataConfig:
    """Data set and its minibatches.

    Attributes
    ----------
    name : str
        Name of the data set (see `neural.data.load`).
    batch_size : int
        Number of examples (or windows of text) of one minibatch.
    augment : tuple of str
        Random changes of training images: ``crop``, ``flip``.
    cutout : int
        Side, in pixels, of the square that is cut out of training images; 0: none.
    sampling : {"shuffle", "replacement", "stream"}
        Order of the examples; "stream" is for texts.
    train_examples, test_examples : int, optional
        Use only this many images, balanced over classes, or bytes of a text; all by default.
    length : int
        Number of symbols of a window of text.
    mean, std : tuple of float, optional
        Normalisation of each channel, e.g. that of a published checkpoint; by default that of the
        data set.
    path : str, optional
        Folder or file of own data, where `name` is "folder", "npz", "huggingface" or
        "text".
    size : int, optional
        Side of own images in pixels.
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
    path: str | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if self.name in OWN:
            if not self.path:
                raise NQMError(f"DataConfig.path is missing: where the data of {self.name!r} lie")
        else:
            refuse_unused(self, "DataConfig", ("path", "size"), f"name = {self.name!r}")
        if self.size is not None:
            check_integer("DataConfig.size", self.size, 1)
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
    """Model, its initial weights, and factors on its weights.

    Attributes
    ----------
    name : str
        Name of the model (see `neural.models.build`).
    options : mapping
        Options of the model, by name.
    checkpoint : str, optional
        File of a state dict with the initial weights; random by default.
    rank1 : str, optional
        Glob over the names of the weights that get rank-1 factors, trained from the start.
    lora : int, optional
        Rank of low-rank updates; all other weights except those of the head are frozen.
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
        for name in ("weights", "pretrained"):
            if self.checkpoint is not None and self.options.get(name):
                raise NQMError(
                    f"ModelConfig.{name} would be ignored (checkpoint replaces all weights); leave "
                    f"it out; got {self.options[name]!r:.60}"
                )


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation of the base weights.

    Attributes
    ----------
    epochs : int
        Number of epochs.
    lr : Schedule
        Learning rate over epochs.
    lr_every : {"epoch", "step"}
        Whether the learning rate changes once an epoch, or with every minibatch.
    optimizer : {"sgd", "adam", "adamw"}
        Class of the optimizer.
    momentum : float
        Momentum of SGD, in [0, 1).
    nesterov : bool
        Whether SGD uses Nesterov momentum.
    betas : tuple of float
        Adam's beta1 and beta2, in [0, 1).
    weight_decay : float
        Weight decay of all weights, as in the paper, except those that `no_decay` selects.
    no_decay : str
        Selection of weights without decay, e.g. ``"norm+bias"``; none by default.
    label_smoothing : float
        Probability that is spread over all classes, in [0, 1].
    clip_norm : float, optional
        Largest norm of the gradient of a minibatch over all weights that it reaches, with members
        over the base's and those of its member, before the base's are summed (`clip_norm` of
        `neural.LatePhase.step`); no clipping by default.
    precision : {"float32", "bfloat16", "float64"}
        Precision of the computation. With bfloat16 the forward pass runs under autocast, and
        weights are stored in float32.
    channels_last : bool
        Store images and kernels in the channels-last memory layout.
    compile : bool
        Compile the model with `torch.compile`.
    micro_batches : int
        Number of pieces in which a minibatch is run, to save memory.
    sync_batchnorm : bool
        Whether BatchNorm takes its statistics from the minibatches of all processes of ``torchrun``
        instead of each process's part.
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
    sync_batchnorm: bool = False

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
        if getattr(self, unused) != 0.0:  # momentum = 0.0 is allowed for Adam, which has none
            refuse_unused(self, "TrainConfig", (unused,), f"optimizer = {self.optimizer!r}")


_WORDS = {"lr_every": LR_EVERY, "optimizer": OPTIMIZERS, "precision": PRECISIONS}


@dataclass(frozen=True, kw_only=True)
class LatePhaseConfig(MemberOptions):
    """Late-phase members: the options of `neural.LatePhase`, and those of a run.

    Attributes
    ----------
    start_epoch : int
        Number of epochs after which the members are spawned, T0.
    members : int
        Number of members, K.
    select : str
        Weights that are replicated (see `neural.late_phase.select.select`).
    fused : bool
        Run all members' minibatches in one forward pass.
    member_lr : Schedule, optional
        Learning rate of the members over the epochs of the run; by default the base's.
    weight_decay : float, optional
        Weight decay of the members; by default the base's. Weights that `TrainConfig.no_decay`
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
        if self.noise == 0.0:
            refuse_unused(self, "LatePhaseConfig", ("noise_rule",), "noise = 0")


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation during training, and measurements at the end beside the test metrics.

    Attributes
    ----------
    every : int
        Number of epochs from one evaluation during training to the next.
    batch_size : int
        Number of examples of a test batch.
    ood : tuple of str
        Names of data sets whose detection as out of distribution is measured.
    corruptions : bool
        Measure accuracy on corrupted images.
    flatness : bool
        Measure the rise of the loss under weight noise.
    line : bool
        Measure the loss on the line between a member and the average.
    mc_dropout : int
        Number of samples of MC-dropout; 0: none.
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
    """Configuration of one training run.

    Attributes
    ----------
    data : DataConfig
        Data set and its minibatches.
    model : ModelConfig
        Model and initial weights.
    train : TrainConfig
        Optimisation of the base weights.
    late_phase : LatePhaseConfig, optional
        Late-phase members; none by default.
    average : Average, optional
        Average over time; none by default.
    evaluate : EvaluateConfig
        Evaluation during training and at the end.
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
    snapshots: SnapshotsConfig | None = None

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, 0)
        if self.seed > toml.LARGEST:
            raise NQMError(f"seed must be at most 2^53; got {self.seed}")
        self._check_snapshots()
        late = self.late_phase
        if not self.train.weight_decay and not (late is not None and late.weight_decay):
            refuse_unused(self.train, "train", ("no_decay",), "weight_decay = 0")
        epochs = self.train.epochs
        for name, section in (("late_phase", self.late_phase), ("average", self.average)):
            if section is not None and section.start_epoch >= epochs:
                raise NQMError(
                    f"{name}.start_epoch must lie before the end of training, epoch {epochs}; "
                    f"got {section.start_epoch}"
                )
        late, average = self.late_phase, self.average
        if late is not None and late.fused and self.train.micro_batches > 1:
            raise NQMError(
                "late_phase.fused runs whole minibatches and needs train.micro_batches = 1; "
                f"got {self.train.micro_batches}"
            )
        if late is not None and late.fused and self.train.clip_norm is not None:
            raise NQMError(
                "late_phase.fused computes the gradient of all minibatches at once, but "
                "train.clip_norm needs that of each; leave one out"
            )
        if late is not None and average is not None and average.start_epoch < late.start_epoch:
            raise NQMError(
                "average.start_epoch must not lie before late_phase.start_epoch, "
                f"{late.start_epoch}, as the average is over the members too; "
                f"got {average.start_epoch}"
            )

    def base_lr(self) -> Callable[[float], float]:
        """Learning rate of the base weights, with the cycles of snapshots.

        Returns
        -------
        callable
            Epochs done, with the part of the running one -> rate of the next minibatch.
        """
        kept, train = self.snapshots, self.train
        cycle = None if kept is None else kept.cycle(train.lr)

        def rate(epoch: float) -> float:
            now = epoch if train.lr_every == "step" else math.floor(epoch)
            if cycle is None or kept is None or now < kept.first_epochs:
                return float(train.lr(now))
            # A triangle's lowest rate is met in mid-cycle only if it moves with every minibatch.
            return cycle(epoch if kept.kind == "triangle" else now)

        return rate

    def _check_snapshots(self) -> None:
        """Raise NQMError unless snapshots fill the run, and nothing else is made of it."""
        snapshots = self.snapshots
        if snapshots is None:
            return
        for name in ("late_phase", "average"):
            if getattr(self, name) is not None:
                raise NQMError(f"snapshots and {name} exclude each other; use one of them in a run")
        if (right := snapshots.epochs) != self.train.epochs:
            raise NQMError(
                f"train.epochs must be {right}, which snapshots.first_epochs and the cycles take; "
                f"got {self.train.epochs}"
            )
        snapshots.cycle(self.train.lr)  # refuses a peak that is no number


SECTIONS: dict[str, Any] = {
    "data": DataConfig,
    "train": TrainConfig,
    "late_phase": LatePhaseConfig,
    "evaluate": EvaluateConfig,
    "snapshots": SnapshotsConfig,
}
_TOP = ("data", "model", "train", "late_phase", "average", "snapshots", "evaluate", "seed")


def build(mapping: Mapping[str, Any]) -> RunConfig:
    """Make the configuration of a run from a mapping.

    Parameters
    ----------
    mapping : mapping
        Sections and entries, as in a recipe (see `RunConfig`).

    Returns
    -------
    RunConfig
        The configuration.

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
    """Make the section `model`; entries that are no fields of `ModelConfig` are model options."""
    table = dict(toml.table_at("model", value))
    toml.require("model", table, "name")
    for name in ("classes", "channels"):
        if name in table:
            raise NQMError(f"model.{name} is set by the data; leave it out")
    names = ("name", "checkpoint", "rank1", "lora")
    own: dict[str, Any] = {name: table.pop(name) for name in names if name in table}
    made: ModelConfig = toml.call(ModelConfig, own, "model", {"options": table})
    return made


def _average(value: Any) -> Average[Any]:
    """Make the section `average`; entries beside `method` are options of that method."""
    table = dict(toml.table_at("average", value))
    toml.require("average", table, "method")
    method = table.pop("method")
    kind = toml.lookup("average.method", method, AVERAGES)
    options = [option.name for option in fields(kind)]
    for name in table:
        if name not in options:
            raise NQMError(
                f"average.{name} is no option of average.method = {method!r}, which has "
                f"{', '.join(options)}; leave it out"
            )
    made: Average[Any] = toml.call(kind, table, "average")
    return made


def restore(mapping: Mapping[str, Any]) -> RunConfig:
    """Make the configuration of a run from a result of `describe`, also of an older version.

    Parameters
    ----------
    mapping : mapping
        Result of `describe`. Entries that were added since it was written get the value that
        content keys leave out.

    Returns
    -------
    RunConfig
        The configuration.

    Raises
    ------
    NQMError
        If an entry is unknown, missing or out of range; the message names its dotted key.
    """
    known = SECTIONS | {"model": ModelConfig}
    if isinstance(average := mapping.get("average"), Mapping):
        known["average"] = AVERAGES.get(str(average.get("method")))
    filled = {
        name: {**keys.earlier_defaults(known.get(name)), **section}
        if isinstance(section, Mapping)
        else section
        for name, section in mapping.items()
    }
    return build({**keys.earlier_defaults(RunConfig), **filled})


def describe(run: RunConfig) -> dict[str, Any]:
    """Make the mapping from which `build` makes this run, with every default written out.

    Parameters
    ----------
    run : RunConfig
        The configuration.

    Returns
    -------
    dict of str to object
        Sections and entries, as in a recipe.
    """
    mapping = {name: _plain(getattr(run, name)) for name in _TOP if getattr(run, name) is not None}
    return mapping | {"model": mapping["model"].pop("options") | mapping["model"]}


def differing(run: RunConfig) -> dict[str, Any]:
    """Make the mapping of those entries of a run that differ from their defaults.

    Defaults of a model's options are those of its class; options of models of other libraries are
    always included.

    Parameters
    ----------
    run : RunConfig
        The configuration.

    Returns
    -------
    dict of str to object
        Sections and entries, as in `describe`.
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
        The configuration.

    Returns
    -------
    str
        Hexadecimal digits.
    """
    return keys.key(differing(run))


def _plain(value: Any, entries: Callable[[Any], dict[str, Any]] | None = None) -> Any:
    """Convert a value to the form that `build` reads; `entries` lists those of a dataclass."""
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
    """Entries of a dataclass, without those that are None if None is their default."""
    entries = {f.name: (getattr(value, f.name), f.default) for f in fields(value)}
    return {
        name: _plain(entry)
        for name, (entry, default) in entries.items()
        if entry is not None or default not in (None, MISSING)
    }


def _differing(value: Any) -> dict[str, Any]:
    """Entries of a dataclass that differ from its defaults."""
    return keys.differing(value, lambda entry: _plain(entry, _differing))
