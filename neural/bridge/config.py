"""Settings of a bridge: what it measures, which trainings it predicts and runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from neural.bridge.iterate_averages import ExponentialMean, TailMean, TimeAverage
from neural.curvature.risk import CURVATURES
from nqm import SGD, HeavyBall
from nqm.errors import NQMError, check_integer, check_number, check_word
from nqm.gamma import check_gamma
from nqm.keys import omits

#: Entry of the column `weights` for the weights themselves, as opposed to averages over time.
ITERATE = "iterate"
#: Entry of the column `way` for independent runs, as opposed to late-phase members.
INDEPENDENT = "runs"
SHUFFLED = "shuffled"
SAMPLING = ("with replacement", SHUFFLED)
ADAM, ADAMW = "adam", "adamw"
ADAPTIVE = (ADAM, ADAMW)
OPTIMIZERS = ("sgd", *ADAPTIVE)
#: Largest relative error of the loss that the fluctuations of Adam's second moments may cause
#: (`neural.bridge.adam`), each of the two.
FLUCTUATIONS = 0.03
#: Largest number of runs, and largest seed: late-phase runs multiply the seed by a thousand.
MOST = 10**9
MOST_RECORDS = 10**6
#: Largest number of passes over the data for one measured quantity; a million would take days.
MOST_PASSES = 10**6
#: Largest integer in a bridge's settings: counts stay exact in float64, and indices fit in int64.
LARGEST = 10**12
#: Largest gamma, and largest ratio of the members' rate and the base's; its inverse is the
#: smallest. At 1e300 the covariance of a member underflows.
MOST_RATIO = 1e6
#: Default learning rates times the largest curvature: they span a factor of eight.
LR_TIMES_SHARPNESS = (0.0625, 0.125, 0.25, 0.5)
#: Number of recorded steps in the first half of a training; each is half of the next.
EARLY = 5


def check_different(name: str, values: tuple[object, ...]) -> None:
    """Check that a list of values is not empty and has no duplicates.

    Parameters
    ----------
    name : str
        Name of the field, for the message.
    values : tuple
        Its values.

    Raises
    ------
    NQMError
        If `values` is empty or has duplicates.
    """
    if not values or len(set(values)) < len(values):
        raise NQMError(f"{name} must have at least one entry and no duplicates; got {values!r}")


@dataclass(frozen=True)
class Training:
    """One training from the checkpoint: constant learning rate, minibatches of one size.

    Attributes
    ----------
    lr : float
        Learning rate of `torch.optim.SGD`, above 0.
    momentum : float
        Momentum of `torch.optim.SGD`, in [0, 1).
    batch_size : int
        Examples of one minibatch, B.
    steps : int
        Optimizer steps.
    sampling : {"with replacement", "shuffled"}
        How minibatches are drawn from the examples.
    optimizer : {"sgd", "adam", "adamw"}
        `torch.optim.Adam` or AdamW at the effective rate, with `momentum` as its beta1. The
        prediction is that of heavy ball in other coordinates (`neural.bridge.adam`).
    beta2, eps : float
        Those of Adam.

    Raises
    ------
    NQMError
        If a value is out of its range.
    """

    lr: float
    batch_size: int
    steps: int
    momentum: float = 0.0
    sampling: str = "with replacement"
    optimizer: str = "sgd"
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_number("lr", self.lr, low=0.0, closed_low=False)
        check_integer("batch_size", self.batch_size, 1)
        check_number("batch_size", self.batch_size, high=2**53)
        check_integer("steps", self.steps, 1)
        check_number("steps", self.steps, high=2**53)
        check_number("momentum", self.momentum, low=0.0, high=1.0, closed_high=False)
        check_word("sampling", self.sampling, SAMPLING)
        check_word("optimizer", self.optimizer, OPTIMIZERS)
        check_number("beta2", self.beta2, low=0.0, high=1.0, closed_high=False)
        check_number("eps", self.eps, low=0.0)

    @property
    def effective_lr(self) -> float:
        """Learning rate of the plain SGD that heavy ball approaches, lr / (1 - momentum)."""
        return self.lr / (1.0 - self.momentum)

    @property
    def algorithm(self) -> SGD | HeavyBall:
        """The optimizer as an algorithm of `nqm`."""
        return HeavyBall(momentum=self.momentum) if self.momentum else SGD()

    def noise_ratio(self, reference: Training) -> float:
        """Ratio of the effective lr / B of this training to that of another one.

        To leading order it is the ratio of the stationary covariances of the weights.

        Parameters
        ----------
        reference : Training
            The other training.

        Returns
        -------
        float
            Above 0.
        """
        own = self.effective_lr / self.batch_size
        return own / (reference.effective_lr / reference.batch_size)

    def record_steps(self, count: int) -> list[int]:
        """Steps of the second half at which the loss is recorded, evenly spaced.

        Parameters
        ----------
        count : int
            Number of recorded steps; fewer are returned if the second half is shorter.

        Returns
        -------
        list of int
            Increasing; the last is `steps`.
        """
        half = self.steps / 2.0
        return sorted({round(half + half * i / count) for i in range(1, count + 1)})

    def course_steps(self, count: int) -> list[int]:
        """`record_steps`, and a few steps of the first half, each twice the one before.

        Parameters
        ----------
        count : int
            Number of recorded steps of the second half.

        Returns
        -------
        list of int
            Increasing; the last is `steps`.
        """
        early = {self.steps >> halvings for halvings in range(2, 2 + EARLY)} - {0}
        return sorted(early | set(self.record_steps(count)))

    def check(self, examples: int) -> None:
        """Check that shuffled epochs consist of whole minibatches.

        Parameters
        ----------
        examples : int
            Number of training examples, N.

        Raises
        ------
        NQMError
            If sampling is "shuffled" and the batch size does not divide the number of examples, or
            is all of them.
        """
        if self.sampling != SHUFFLED:
            return
        if examples % self.batch_size or self.batch_size == examples:
            raise NQMError(
                f"shuffled epochs need a batch_size that divides the {examples} examples, in two "
                f"minibatches or more; got {self.batch_size}"
            )


@dataclass(frozen=True)
class Plan:
    """How many runs are trained, which of their averages are evaluated, and when.

    Attributes
    ----------
    members : tuple of int
        Sizes K of the groups of runs whose weights are averaged.
    runs : int
        Number of independent runs: at least the largest K, and twice that for a standard error.
    records : int
        How many times the loss is recorded in the second half of the steps.
    late_phase : str, optional
        Weights to replicate on a shared base. Each group of K is then one run of
        `neural.LatePhase`; without it, a group consists of K independent runs.
    gamma : {"sum", "mean"} or float
        With `late_phase`: scale of the base gradient, which is summed over members.
    member_lr_ratio : float
        With `late_phase`: learning rate of the members over that of the base.
    decay : float
        Decay of the exponential mean of a run's weights. It is evaluated beside the uniform mean
        over the second half of the steps.
    seed : int
        Seed of all random draws, those of the measurement included.

    Raises
    ------
    NQMError
        If a value is out of its range, or a group is larger than the number of runs.
    """

    members: tuple[int, ...] = (1, 2, 4, 8, 16)
    runs: int = 32
    records: int = 5
    late_phase: str | None = None
    gamma: str | float = "mean"
    member_lr_ratio: float = 1.0
    decay: float = 0.99
    seed: int = 0

    def averages(self, training: Training) -> tuple[TimeAverage, ...]:
        """Averages over time that are evaluated.

        Parameters
        ----------
        training : Training
            Gives the number of steps.

        Returns
        -------
        tuple of TimeAverage
            Uniform and exponential mean, of late-phase members those of their mean weights.
        """
        return TailMean(training.steps), ExponentialMean(training.steps, self.decay)

    @property
    def way(self) -> str:
        """Column `way` of the tables: independent runs, or the weights that are replicated."""
        return self.late_phase or INDEPENDENT

    def __post_init__(self) -> None:
        check_integer("records", self.records, 1)
        check_number("records", self.records, high=MOST_RECORDS)
        check_number("runs", self.runs, low=1, high=MOST)
        check_integer("seed", self.seed, 0)
        check_number("seed", self.seed, high=MOST)
        check_different("members", self.members)
        for k in self.members:
            check_integer("members", k, 1)
        check_gamma("gamma", self.gamma)
        if not isinstance(self.gamma, str):
            check_number("gamma", self.gamma, high=MOST_RATIO)
        ratio = self.member_lr_ratio
        check_number("member_lr_ratio", ratio, low=1.0 / MOST_RATIO, high=MOST_RATIO)
        if self.late_phase is None and (self.gamma, self.member_lr_ratio) != ("mean", 1.0):
            raise NQMError(
                "gamma and member_lr_ratio are those of late-phase members; set late_phase"
            )
        check_number("decay", self.decay, low=0.0, high=1.0, closed_high=False)
        if max(self.members) > self.runs:
            raise NQMError(f"members must be at most the {self.runs} runs; got {max(self.members)}")
        if self.late_phase is not None and min(self.members) < 2:
            raise NQMError(
                f"members must be at least 2 with late_phase; got {min(self.members)}; K = 1 is "
                "only available for independent runs"
            )


@omits(lanczos_steps=30, displacements=32)
@dataclass(frozen=True)
class BridgeConfig:
    """Settings of the measurement, and the trainings that are predicted and run.

    Attributes
    ----------
    select : str
        Weights that the loss is a function of (see `neural.late_phase.select.select`); the others
        stay fixed.
    examples : int
        Number of training examples in the measured loss; 0 for all.
    weight_decay : float, optional
        Weight decay of the measured loss, without weights of the run's `no_decay`; that of the run
        by default. With AdamW it is decoupled.
    curvature : {"hessian", "ggn"}
        The Hessian, or its Gauss-Newton part, which has no negative eigenvalues for cross-entropy
        and is cheap for a few weights of many.
    batchnorm_group : int, optional
        Compute BatchNorm statistics over groups of this many examples, as in training; batch sizes
        then count groups. By default BatchNorm uses its running statistics.
    minimise : int
        Minimise the training loss for this many iterations before measuring; 0 to measure at the
        checkpoint.
    minimise_lr : float, optional
        Minimise by gradient descent at this learning rate; by L-BFGS and Newton steps by default
        (`neural.curvature.minimise.minimise`).
    eigenpairs : int
        Number of largest eigenvalues that are measured one by one; 0 for all, which needs a dense
        matrix of all selected weights.
    noise_samples : int
        Random draws of the gradient noise beyond the eigenpairs.
    lanczos_steps : int
        Hessian products for each of these draws, and for the gradient and the drift.
    displacements : int
        Random displacements for third derivatives and kinks, at the covariance of each training.
    averaging_displacements : int
        Random displacements over which curvature and noise are averaged; 0 uses the values at the
        checkpoint and leaves kinks out.
    lr_times_sharpness : tuple of float
        Effective learning rates lr / (1 - momentum), times the largest curvature. Each is trained
        at the first batch size.
    batch_sizes : tuple of int
        Each is trained at the last but one of the learning rates.
    steps, momentum, sampling, optimizer, beta2, eps
        Common to all trainings (see `Training`).
    train : bool
        False to predict only.
    test_examples : int
        Number of test examples whose loss is recorded after training; 0 for all.

    Raises
    ------
    NQMError
        If a value is out of its range, or a learning rate is beyond the edge of stability.
    """

    select: str = "all"
    examples: int = 2000
    weight_decay: float | None = None
    curvature: str = "hessian"
    batchnorm_group: int | None = None
    minimise: int = 0
    minimise_lr: float | None = None
    eigenpairs: int = 50
    noise_samples: int = 6
    lanczos_steps: int = 10
    displacements: int = 64
    averaging_displacements: int = 2
    lr_times_sharpness: tuple[float, ...] = LR_TIMES_SHARPNESS
    batch_sizes: tuple[int, ...] = (32,)
    steps: int = 1000
    momentum: float = 0.0
    sampling: str = "with replacement"
    optimizer: str = "sgd"
    beta2: float = 0.999
    eps: float = 1e-8
    train: bool = True
    test_examples: int = 2000

    def __post_init__(self) -> None:
        check_word("curvature", self.curvature, CURVATURES)
        least = {
            "minimise": 0,
            "eigenpairs": 0,
            "noise_samples": 1,
            "lanczos_steps": 1,
            "displacements": 2,
            "averaging_displacements": 0,
            "test_examples": 0,
        }
        for name, minimum in least.items():
            check_integer(name, getattr(self, name), minimum)
            most = LARGEST if name == "test_examples" else MOST_PASSES
            check_number(name, getattr(self, name), high=most)
        for name in ("examples", "batchnorm_group", "steps"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 0)
                check_number(name, getattr(self, name), high=LARGEST)
        if self.examples != 0:
            check_integer("examples", self.examples, 2)
        if self.batchnorm_group is not None:
            check_integer("batchnorm_group", self.batchnorm_group, 2)
        if self.minimise_lr is not None:
            check_number("minimise_lr", self.minimise_lr, low=0.0, closed_low=False)
        check_number("momentum", self.momentum, low=0.0, high=1.0, closed_high=False)
        stable = 2.0 * (1.0 + self.momentum) / (1.0 - self.momentum)
        check_different("lr_times_sharpness", self.lr_times_sharpness)
        check_different("batch_sizes", self.batch_sizes)
        for rate in self.lr_times_sharpness:
            check_number("lr_times_sharpness", rate)
            if not 0.0 < rate < stable:
                raise NQMError(
                    f"lr_times_sharpness must lie in (0, {stable:.4g}), below the edge of "
                    f"stability; got {rate}"
                )
        self.trainings(1.0)  # a Training checks its own fields
        self._check_adam()

    def _check_adam(self) -> None:
        """Raise NQMError unless Adam's second moments are nearly at rest."""
        if self.optimizer not in ADAPTIVE:
            if (self.beta2, self.eps) != (0.999, 1e-8):
                raise NQMError("beta2 and eps are those of Adam; set optimizer = 'adam'")
            return
        if self.sampling == SHUFFLED:
            raise NQMError(
                f"optimizer = '{self.optimizer}' is predicted for sampling = 'with replacement' "
                "only; drop sampling, or optimizer"
            )
        rate = 0.75 * (1.0 - self.beta2) / (1.0 + self.beta2)
        drift = 0.25 * (1.0 - self.beta2) ** 2 * self.steps
        if max(rate, drift) > FLUCTUATIONS:
            raise NQMError(
                f"beta2 = {self.beta2}: Adam's second moments move within the {self.steps} steps; "
                "take beta2 nearer to 1, or fewer steps"
            )

    def reference(self, largest: float) -> Training:
        """The training over whose weights curvature and noise are averaged.

        Parameters
        ----------
        largest : float
            Largest curvature.

        Returns
        -------
        Training
            Has the first batch size and the last but one of the learning rates.
        """
        rate = self.lr_times_sharpness[max(len(self.lr_times_sharpness) - 2, 0)]
        lr = rate * (1.0 - self.momentum) / largest
        own = (self.momentum, self.sampling, self.optimizer, self.beta2, self.eps)
        return Training(float(lr), self.batch_sizes[0], self.steps, *own)

    def trainings(self, largest: float) -> list[Training]:
        """All trainings of the configuration.

        Parameters
        ----------
        largest : float
            Largest curvature.

        Returns
        -------
        list of Training
            First those at every learning rate and the first batch size, then `reference` at every
            other batch size.
        """
        middle = self.reference(largest)
        lrs = [rate * (1.0 - self.momentum) / largest for rate in self.lr_times_sharpness]
        return [replace(middle, lr=float(lr)) for lr in lrs] + [
            replace(middle, batch_size=size) for size in self.batch_sizes[1:]
        ]

    def in_own_coordinates(self) -> list[BridgeConfig]:
        """Divide the trainings into those that are predicted in the same coordinates.

        Returns
        -------
        list of BridgeConfig
            The configuration itself for SGD, one for every batch size for Adam, whose second
            moments depend on it. Their trainings are those of the configuration, in that order, but
            learning rates are relative to the largest curvature in their own coordinates.
        """
        if self.optimizer not in ADAPTIVE:
            return [self]
        middle = self.lr_times_sharpness[max(len(self.lr_times_sharpness) - 2, 0)]
        first, *others = self.batch_sizes
        return [replace(self, batch_sizes=(first,))] + [
            replace(self, batch_sizes=(size,), lr_times_sharpness=(middle,)) for size in others
        ]
