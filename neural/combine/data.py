"""The data that combining needs, each part apart from the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

from neural import evaluate
from neural.data import Images
from neural.late_phase.members import Batch
from neural.training.task import Task
from nqm.errors import NQMError, check_number, check_word

Source = Callable[[], Iterable[Batch]]

#: Bytes of corrupted images that are held at once, rather than made anew for every model.
HELD = 2**30


@dataclass(frozen=True)
class Parts:
    """Parts of a data set; each callable makes its batches anew, always the same ones.

    Attributes
    ----------
    test : callable
        What everything is judged on.
    train : callable, optional
        Training data, for BatchNorm statistics, Fisher information and the like. Labels are used by
        rules that say so.
    held_out : callable, optional
        What rules and temperatures may be chosen on; none of it is in `test`.
    shifts : mapping of str to callable
        Other test sets by name, e.g. corrupted images.
    """

    test: Source
    train: Source | None = None
    held_out: Source | None = None
    shifts: Mapping[str, Source] = field(default_factory=dict)

    def required(self, name: str, who: str) -> Source:
        """A part that a rule needs.

        Parameters
        ----------
        name : {"train", "held_out"}
        who : str
            The rule, for the message.

        Returns
        -------
        callable

        Raises
        ------
        NQMError
            If it is not there.
        """
        part: Source | None = getattr(self, name)
        if part is None:
            option = "held-out data; set held_out, e.g. 0.2"
            raise NQMError(f"{who} needs {option if name == 'held_out' else 'training data'}")
        return part

    def judged(self) -> dict[str, Source]:
        """Sets that results are reported on, by name; ``test`` first.

        Returns
        -------
        dict of str to callable
        """
        return {"test": self.test, **self.shifts}

    @classmethod
    def of_task(
        cls,
        task: Task,
        *,
        held_out: float = 0.0,
        seed: int = 0,
        shifts: Iterable[str] = (),
        severities: Iterable[int] = (3,),
    ) -> Parts:
        """Parts of a run's data.

        Members may have seen all training data, so that held-out examples are taken from the test
        set, which is then judged without them.

        Parameters
        ----------
        task : Task
        held_out : float
            Share of the test images that is held out, evenly over the classes; 0: none.
        seed : int
            Which ones.
        shifts : iterable of str
            Corruptions (`neural.evaluate.CORRUPTIONS`), or "corruptions" for all.
        severities : iterable of int
            From 1 to 5.

        Returns
        -------
        Parts

        Raises
        ------
        NQMError
            If the data are not images in memory and something else than `test` and `train` is asked
            for.
        """
        check_number("held_out", held_out, low=0.0, high=1.0, closed_high=False)
        named = tuple(shifts)
        test, inside = task.images, task.normalised
        if (held_out or named) and (test is None or inside is None):
            raise NQMError(f"held_out and shifts need images in memory; {task.label} has none")
        if test is None or inside is None:
            return cls(task.test, lambda: task.stream.epoch(0))
        apart: Source | None = None
        if held_out:
            count = round(held_out * len(test))
            if not 0 < count < len(test):
                raise NQMError(
                    f"held_out must leave images on both sides; {held_out:g} of {len(test)} is "
                    f"{count}"
                )
            chosen, test = test.split(count, seed)
            apart = _batches(task, chosen)
        return cls(
            _batches(task, test),
            lambda: task.stream.epoch(0),
            apart,
            dict(_shifted(task, test, named, tuple(severities))),
        )


def _batches(task: Task, images: Images) -> Source:
    normalised = task.normalised
    assert normalised is not None
    return lambda: normalised(images)


def _shifted(
    task: Task, images: Images, names: tuple[str, ...], severities: tuple[int, ...]
) -> Iterator[tuple[str, Source]]:
    """Corrupted test images, made when they are first asked for."""
    every = tuple(evaluate.CORRUPTIONS)
    chosen = every if "corruptions" in names else names
    # Every model is judged on every set: sets are held where all of them are small.
    held = len(chosen) * len(severities) * images.pixels.numel() <= HELD
    for name in chosen:
        check_word("shifts", name, every)
        for severity in severities:
            yield f"{name} {severity}", _corrupted(task, images, name, severity, held=held)


def _corrupted(task: Task, images: Images, name: str, severity: int, *, held: bool) -> Source:
    normalised = task.normalised
    assert normalised is not None

    def corrupted() -> Images:
        return Images(evaluate.corrupt(images.pixels, name, severity), images.labels)

    make = cache(corrupted) if held else corrupted
    return lambda: normalised(make())
