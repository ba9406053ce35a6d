"""Settings of federated rounds: the tables ``[clients]`` and ``[scope]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neural.training.config import TrainConfig, refuse_unused
from nqm.errors import NQMError, check_integer, check_number, check_word
from nqm.runs import toml

TARGETS = ("start", "fused", "given")
DIVERGENCES = ("kl",)
#: Largest number of clients: the weights of all of them are held in memory.
MOST_CLIENTS = 1000


@dataclass(frozen=True)
class ClientsConfig:
    """Federated rounds: the table ``[clients]``.

    The defaults are FedAvg (McMahan et al. 2017) with all clients in every round.

    Attributes
    ----------
    count : int
        Number of clients.
    rounds : int
        Number of rounds: the clients train, and the server takes the mean of their weights.
    local_epochs : int
        Passes of a client over its own examples in a round.
    dirichlet : float
        Concentration of the Dirichlet distribution by which each class is shared among clients;
        small: clients see few classes.
    least_examples : int
        Smallest number of examples of a client; shards are drawn again until all have as many.
    participation : float
        Share of the clients that are drawn for each round, in (0, 1].
    server_lr : float
        Step of the server towards the clients' mean, > 0.
    prox : float
        Coefficient of FedProx's pull to the server's weights (Li et al. 2020); 0: none.
    control : bool
        SCAFFOLD's control variates (Karimireddy et al. 2020).
    extrapolate : bool
        FedExP's server step, max(1, sum ||D_k||^2 / (2 M ||mean D||^2)) for the clients' moves D_k
        (Jhunjhunwala et al. 2023).
    barrier : bool
        Measure all clients of a round on the test set, and their mean's loss above theirs.
    """

    count: int = 10
    rounds: int = 20
    local_epochs: int = 1
    dirichlet: float = 0.5
    least_examples: int = 10
    participation: float = 1.0
    server_lr: float = 1.0
    prox: float = 0.0
    control: bool = False
    extrapolate: bool = False
    barrier: bool = False

    def __post_init__(self) -> None:
        for name in ("count", "rounds", "local_epochs", "least_examples"):
            check_integer(f"ClientsConfig.{name}", getattr(self, name), 1)
        if self.count > MOST_CLIENTS:
            raise NQMError(f"ClientsConfig.count must be at most {MOST_CLIENTS}; got {self.count}")
        for name in ("dirichlet", "server_lr"):
            check_number(f"ClientsConfig.{name}", getattr(self, name), low=0.0, closed_low=False)
        check_number(
            "ClientsConfig.participation", self.participation, low=0.0, high=1.0, closed_low=False
        )
        check_number("ClientsConfig.prox", self.prox, low=0.0)
        if self.extrapolate:
            refuse_unused(
                self, "ClientsConfig", ("server_lr",), "extrapolate = true computes the step"
            )

    @property
    def participants(self) -> int:
        """Number of clients of a round: participation times count, rounded, at least one."""
        return max(1, round(self.participation * self.count))


@dataclass(frozen=True)
class ScopeConfig:
    """Weight scope alignment (Xu et al. 2024): the table ``[scope]``.

    The scope of a layer is the mean and standard deviation of its weights. Layers are the trainable
    weights with more than one dimension: no biases, and no normalisation.

    Attributes
    ----------
    strength : float
        Coefficient of each layer's divergence in the clients' loss; 0: none. The gradient in one of
        p weights is of order strength / p.
    target : {"start", "fused", "given"}
        Scope to which clients are pulled: that of the first round's start; the mean of the
        clients' scopes after the round before (the first round's is the start's); or, for all
        layers, the Gaussian of `mean` and `sd`.
    divergence : {"kl"}
        Divergence of a layer's scope from its target, between Gaussians.
    rescale : bool
        After training, shift and scale each client's layers to the mean of this round's scopes,
        before the mean is taken. With strength 0 it is a control without any penalty.
    mean : float
        Of the target "given".
    sd : float
        Standard deviation of the target "given", > 0.
    """

    strength: float = 1e-2
    target: str = "start"
    divergence: str = "kl"
    rescale: bool = False
    mean: float = 0.0
    sd: float = 0.05

    def __post_init__(self) -> None:
        check_number("ScopeConfig.strength", self.strength, low=0.0)
        check_word("ScopeConfig.target", self.target, TARGETS)
        check_number("ScopeConfig.mean", self.mean)
        check_number("ScopeConfig.sd", self.sd, low=0.0, closed_low=False)
        if self.target != "given":
            refuse_unused(self, "ScopeConfig", ("mean", "sd"), 'they belong to target = "given"')
        check_word("ScopeConfig.divergence", self.divergence, DIVERGENCES)
        if self.strength == 0.0:
            refuse_unused(self, "ScopeConfig", ("target",), "strength = 0 has no target")
            if not self.rescale:
                raise NQMError(
                    "ScopeConfig.strength must be above 0 unless rescale = true, or the table does "
                    "nothing; got 0"
                )


def load_config(
    path: Path | None = None, overrides: Sequence[str] = ()
) -> tuple[ClientsConfig, ScopeConfig | None]:
    """Read the settings of federated rounds.

    Parameters
    ----------
    path : Path, optional
        TOML file with ``[clients]`` and, for scope alignment, ``[scope]``.
    overrides : sequence of str
        ``key=value``, e.g. ``clients.rounds=5``.

    Returns
    -------
    clients : ClientsConfig
    scope : ScopeConfig or None
        None if there is no table ``[scope]``.

    Raises
    ------
    NQMError
        If a key or value is wrong; the message names the dotted key.
    """
    mapping: dict[str, Any] = {} if path is None else toml.load(path)
    toml.override(mapping, overrides)
    kinds = {"clients": ClientsConfig, "scope": ScopeConfig}
    toml.check_sections(mapping, {n: tuple(toml.signature(kind)[0]) for n, kind in kinds.items()})
    toml.known_keys("", mapping, tuple(kinds))

    def section(name: str) -> Any:
        return toml.call(kinds[name], toml.table_at(name, mapping.get(name, {})), name)

    return section("clients"), section("scope") if "scope" in mapping else None


def own_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide ``key=value`` settings into those of the rounds and those of a recipe.

    Parameters
    ----------
    overrides : sequence of str

    Returns
    -------
    own, others : list of str
    """
    own: list[str] = []
    others: list[str] = []
    for setting in overrides:
        first = setting.partition("=")[0].strip().partition(".")[0]
        (own if first in ("clients", "scope") else others).append(setting)
    return own, others


def check_train(train: TrainConfig) -> None:
    """Refuse settings of training that clients do not follow.

    Parameters
    ----------
    train : TrainConfig

    Raises
    ------
    NQMError
        If there is one.
    """
    if train.optimizer != "sgd":
        raise NQMError(
            f"train.optimizer must be 'sgd': clients train by plain SGD; got {train.optimizer!r}"
        )
    unused = ("lr_every", "clip_norm", "micro_batches", "compile")
    refuse_unused(train, "train", unused, "clients train without it")
    if train.precision == "bfloat16":
        raise NQMError("train.precision must be 'float32' or 'float64' for clients; got 'bfloat16'")
