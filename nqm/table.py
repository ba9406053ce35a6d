"""Tables on disk: names, units and labels of columns, and functions that read and write.

A table is Parquet or CSV by its extension. It contains a metadata dictionary (the configuration and
a content key) and no time stamp, so the same content is the same bytes. A file of its name exists
only once the table is complete.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pandas as pd

from nqm.errors import NQMError
from nqm.files import check_regular, locked, tidy_lock
from nqm.files import replacing as replacing
from nqm.keys import difference
from nqm.limits import memory_limit


@dataclass(frozen=True)
class Column:
    """Description of a column.

    Attributes
    ----------
    label : str
        Text for an axis or a legend.
    unit : str
        Unit of the values; empty for a pure number.
    doc : str
        Meaning of the values, one line.
    dtype : str
        Type of the values, as pandas names it.
    """

    label: str
    unit: str
    doc: str
    dtype: str = "float64"


COLUMNS: dict[str, Column] = {
    "case": Column("case", "", "content key of the cell of a sweep", "str"),
    "step": Column("training step", "steps", "steps over the whole program", "int64"),
    "examples": Column("examples", "examples", "examples drawn up to this step"),
    "loss": Column("expected loss", "", "expected loss of the evaluated weights (mean model)"),
    "member_loss": Column("member loss", "", "expected loss of the average member"),
    "bias": Column("bias", "", "loss without gradient noise"),
    "variance": Column("variance", "", "loss due to gradient noise alone"),
    "bound": Column(
        "information bound", "", "least loss that a linear method could reach with these examples"
    ),
    "regret": Column("regret", "", "loss above the bound"),
    "bound_any": Column(
        "bound of any method", "", "least loss of any method that knows noise and eigenvectors"
    ),
    "other_loss": Column("loss of the other", "", "expected loss of the program compared with"),
    "probability": Column("probability", "", "that one run has a lower loss than one of the other"),
    "difference": Column("difference", "", "mean loss of the other less the program's own"),
    "runs": Column("runs", "", "of each program, to tell the means apart; empty for equal means"),
    "ordered_runs": Column(
        "ordered runs", "", "of each, for the better one to have the lower mean"
    ),
    "difference_sd": Column("sd of the difference", "", "of one run of each"),
    "always_below": Column("always lower", "", "probability of a lower loss at every record"),
    "always_low": Column("lowest always_below", "", "lower end of its 95 % interval"),
    "always_high": Column("highest always_below", "", "upper end of its 95 % interval"),
    "reached": Column("reached", "", "probability that a run was at the target by this record"),
    "reached_low": Column("lowest reached", "", "lower end of its 95 % interval"),
    "reached_high": Column("highest reached", "", "upper end of its 95 % interval"),
    "phase": Column("phase", "", "number of the phase, from 0", "int64"),
    "algorithm": Column("algorithm", "", "method of the phase", "str"),
    "edge": Column("stability edge", "", "least constant rate at which a direction is unstable"),
    "peak_lr": Column("peak rate", "", "largest learning rate of the phase"),
    "first": Column("first step", "steps", "first step of a piece, from 0", "int64"),
    "last": Column("last step", "steps", "last step of a piece", "int64"),
    "lr_low": Column("lowest good rate", "", "smallest rate within the stated rise of the loss"),
    "lr_high": Column("highest good rate", "", "largest rate within the stated rise of the loss"),
    "momentum_low": Column("lowest good momentum", "", "as lr_low"),
    "momentum_high": Column("highest good momentum", "", "as lr_high"),
    "decay_low": Column("lowest good decay", "", "as lr_low"),
    "decay_high": Column("highest good decay", "", "as lr_high"),
    "fit": Column("fitted steps", "steps", "least_steps (1 + critical / batch_size)"),
    "critical": Column("critical batch size", "examples", "where steps are twice their least"),
    "least_steps": Column("least steps", "steps", "limit of large batches"),
    "least_examples": Column("least examples", "examples", "limit of small batches"),
    "ingredient": Column("ingredient", "", "model of a soup, by what distinguishes its run", "str"),
    "ingredients": Column("ingredients", "", "models with a weight other than 0", "int64"),
    "loss_sd": Column("sd of loss", "", "standard deviation of the loss from run to run"),
    "stderr": Column("standard error", "", "Monte Carlo standard error of loss; 0 if analytic"),
    "member_stderr": Column(
        "member standard error", "", "Monte Carlo standard error of member_loss; 0 if analytic"
    ),
    "status": Column("status", "", "finished, reached, not_reached or diverged", "str"),
    "curvature": Column("curvature h", "", "eigenvalue of the Hessian"),
    "noise_variance": Column("noise variance v", "", "of the gradient of one example"),
    "kind": Column("kind", "", "exact, sample, first_order, long_run or closure", "str"),
    "in_range": Column(
        "within range",
        "",
        "false where a first order is estimated to be off by 5 % and more",
        "bool",
    ),
    "radius": Column("spectral radius", "", "largest spectral radius of one cycle"),
    "lr": Column("learning rate", "", "learning rate (of the base weights)"),
    "member_lr": Column("member learning rate", "", "learning rate of late-phase weights"),
    "batch_size": Column("batch size", "examples", "examples in one minibatch"),
    "members": Column("members K", "", "late-phase members or independent runs", "int64"),
    "gamma": Column(r"$\gamma_\theta$", "", "scale of the summed base gradient"),
    "momentum": Column("momentum", "", "momentum, in PyTorch's form"),
    "decay": Column("decay", "", "share of an exponential average that a step keeps"),
    "flat_low": Column(
        "lowest good rate", "", "smallest rate whose loss is within 10 % of the best"
    ),
    "flat_high": Column(
        "highest good rate", "", "largest rate whose loss is within 10 % of the best"
    ),
    "arm": Column("arm", "", "one way of training in an experiment", "str"),
    "seed": Column("seed", "", "seed of initial weights, data order and noise", "int64"),
    "epoch": Column("epochs", "epochs", "passes over the training set", "int64"),
    "accuracy": Column("accuracy", "", "share of correct predictions"),
    "nll": Column("negative log-likelihood", "nats", "mean cross-entropy"),
    "brier": Column("Brier score", "", "mean squared distance of probabilities from the truth"),
    "ece": Column("calibration error", "", "expected calibration error, 15 bins"),
    "nll_tuned": Column("tuned NLL", "nats", "mean cross-entropy at a tuned temperature"),
    "temperature": Column("temperature", "", "by which logits are divided; above 1 if too sure"),
    "rule": Column("rule", "", "how models are combined", "str"),
    "space": Column("space", "", "what is averaged: weights, probabilities or logits", "str"),
    "repair": Column("repair", "", "what is done to a merged model: statistics or none", "str"),
    "mean_member_nll": Column("mean member's NLL", "nats", "mean of the members' cross-entropies"),
    "ambiguity": Column("ambiguity", "nats", "mean member's loss less the combined model's"),
    "barrier": Column("barrier", "nats", "combined model's loss above the mean member's, or 0"),
    "barrier_to_mean": Column(
        "barrier to the mean", "nats", "largest excess of the loss on the line to the members' mean"
    ),
    "barrier_to_first": Column(
        "barrier to the first", "nats", "largest excess of the loss on the line to the first member"
    ),
    "passes": Column("forward passes", "", "forward passes of one prediction", "int64"),
    "bits": Column("bits per weight", "bits", "held for each weight of the architecture", "int64"),
    "epochs_total": Column("epochs of training", "epochs", "of all members, shared ones once"),
    "comparison": Column("comparison", "", "name of a comparison of combined models", "str"),
    "best": Column("best way", "", "way of combining with the lowest measured loss", "str"),
    "best_nll": Column("its loss", "nats", "loss of the best way"),
    "chosen": Column("predicted best", "", "way with the lowest predicted loss", "str"),
    "chosen_nll": Column("its measured loss", "nats", "measured loss of the predicted best"),
    "pairs": Column("pairs", "", "pairs of ways whose losses differ", "int64"),
    "right": Column(
        "in the right order", "", "those that are predicted in the right order", "int64"
    ),
    "selected_on": Column("selected on", "", "none, train or held_out", "str"),
    "predicted": Column("predicted loss", "nats", "loss that theory predicts"),
    "predicted_from": Column("predicted from", "", "what the prediction rests on", "str"),
    "macro_f1": Column("macro F1", "", "F1 score of every class, averaged with equal weights"),
    "kappa": Column("Cohen's kappa", "", "agreement beyond chance, 1 at most"),
    "mcnemar_p": Column(
        "McNemar's p", "", "chance of so uneven a split if both are right as often"
    ),
    "accuracy_gain": Column("gain in accuracy", "", "over the rule that is the baseline"),
    "nll_gain": Column("gain in NLL", "nats", "over the rule that is the baseline"),
    "nll_tuned_gain": Column("gain in tuned NLL", "nats", "as nll_gain, at tuned temperatures"),
    "strength": Column(
        "strength", "", "of a gate's pull to equal weights; inf if these are chosen"
    ),
    "split": Column("split", "", "draw of training and test parts", "int64"),
    "target": Column("target", "", "domain that no module has seen", "str"),
    "score": Column("score", "", "by what modules are weighed", "str"),
    "kept": Column("modules kept", "", "modules with the highest scores", "int64"),
    "weighting": Column("weighting", "", "linear in the score, or uniform", "str"),
    "round": Column("rounds", "rounds", "federated rounds done", "int64"),
    "drift": Column("client drift", "", "mean distance of clients from their mean"),
    "distance": Column("distance", "", "of the weights from those where the cycles began"),
    "server_step": Column("server step", "", "step of the server to the clients' mean"),
    "scope_kl": Column("scope divergence", "nats", "of clients' layers from their mean scope"),
    "bpc": Column("bits per character", "bits", "mean cross-entropy of a text"),
    "at_edge": Column(
        "at edge", "", "whether the best rate lies at an end of the searched range", "bool"
    ),
}

_QUANTILE = "loss_q"
#: pandas reads floats exactly by default from version 3 on.
_EXACT: dict[str, Any] = (
    {} if int(pd.__version__.partition(".")[0]) >= 3 else {"float_precision": "round_trip"}
)


def quantile_name(level: float) -> str:
    """Name the column of a quantile of the loss.

    Parameters
    ----------
    level : float
        Probability, in (0, 1).

    Returns
    -------
    str
        Name of the column, e.g. ``loss_q0.05``.
    """
    return f"{_QUANTILE}{level:g}"


def label(name: str) -> str:
    """Write the label of an axis that shows a column.

    Parameters
    ----------
    name : str
        Name of the column.

    Returns
    -------
    str
        Label and unit; `name` itself for an unknown column.
    """
    if name.startswith(_QUANTILE):
        return f"{name.removeprefix(_QUANTILE)} quantile of loss"
    if name not in COLUMNS:
        return name
    column = COLUMNS[name]
    repeats = column.unit in ("", column.label)
    return column.label if repeats else f"{column.label} ({column.unit})"


def to_json(table: pd.DataFrame) -> str:
    """Write a table as the JSON document that ``--json`` prints.

    Parameters
    ----------
    table : DataFrame
        The table.

    Returns
    -------
    str
        An object with the lists ``columns`` and ``rows``; numbers that are not finite are null.
    """

    def strict(value: Any) -> Any:
        # JSON has neither NaN nor infinity; the column status names the reason.
        return None if isinstance(value, float) and not math.isfinite(value) else value

    columns = [table[name].tolist() for name in table.columns]
    rows = [[strict(value) for value in row] for row in zip(*columns, strict=True)]
    return json.dumps({"columns": list(table.columns), "rows": rows}, allow_nan=False)


def write_table(path: str | Path, frame: pd.DataFrame, metadata: Mapping[str, Any]) -> None:
    """Write a table and its metadata, all or nothing.

    Parameters
    ----------
    path : str or Path
        File to write; its name ends in .parquet or .csv.
    frame : DataFrame
        Table without its index. Both formats keep floats exactly.
    metadata : mapping
        Values of JSON types; `read_metadata` returns them.

    Raises
    ------
    NQMError
        If the name has another ending, or the file cannot be written.
    """
    dtypes = {str(name): dtype_name(frame[name]) for name in frame.columns}
    write_frames(path, [frame], dtypes, len(frame), metadata)


def write_frames(
    path: str | Path,
    frames: Iterable[pd.DataFrame],
    dtypes: Mapping[str, str],
    rows: int,
    metadata: Mapping[str, Any],
) -> None:
    """Write a table piece by piece, so that it need not fit in memory.

    Parameters
    ----------
    path : str or Path
        File to write; its name ends in .parquet or .csv.
    frames : iterable of DataFrame
        Pieces with equal columns and types; they become row groups.
    dtypes : mapping of str to str
        Types of the columns, as pandas names them.
    rows : int
        Number of rows of all pieces together.
    metadata : mapping
        Values of JSON types; `read_metadata` returns them.

    Raises
    ------
    NQMError
        If the name has another ending, or the file cannot be written.
    """
    path = Path(path)
    write = _write_parquet if _format(path) == ".parquet" else _write_csv
    with replacing(path) as stream:
        write(stream, frames, dict(dtypes), rows, dict(metadata))


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a table.

    Parameters
    ----------
    path : str or Path
        A .parquet or .csv file; a CSV file may come from another program.

    Returns
    -------
    DataFrame
        Its rows.

    Raises
    ------
    NQMError
        If there is no such file, it is damaged, or it does not fit into memory.
    """
    path = Path(path)
    if _format(path) == ".parquet":
        with _reading(path):
            import pyarrow.parquet as pq

            file = pq.ParquetFile(path)
            _check_size(path, 8 * file.metadata.num_rows * file.metadata.num_columns)
            frame: pd.DataFrame = file.read().to_pandas()
            return frame
    stamp = _csv_stamp(path)
    with _reading(path):
        if stamp is None:
            foreign: pd.DataFrame = pd.read_csv(path, comment="#", **_EXACT)
            return foreign
        dtypes = stamp["dtypes"]
        # In a text column an empty field is an empty text; elsewhere it is NaN.
        missing = {name: [""] for name, dtype in dtypes.items() if dtype != "str"}
        table: pd.DataFrame = pd.read_csv(
            path,
            skiprows=1,
            dtype=dtypes,
            keep_default_na=False,
            na_values=missing,
            **_EXACT,
        )
        if len(table) != stamp["rows"] or list(table.columns) != list(dtypes):
            raise ValueError(f"{len(table)} of {stamp['rows']} rows")
    return table


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read the metadata that a table was written with.

    Parameters
    ----------
    path : str or Path
        A .parquet or .csv file.

    Returns
    -------
    dict of str to Any
        Empty for a file of another program.

    Raises
    ------
    NQMError
        If there is no such file, or it is damaged.
    """
    path = Path(path)
    if _format(path) == ".csv":
        stamp = _csv_stamp(path)
        return {} if stamp is None else dict(stamp["metadata"])
    with _reading(path):
        import pyarrow.parquet as pq

        stored = pq.read_schema(path).metadata or {}
        return dict(json.loads(stored[b"nqm"])) if b"nqm" in stored else {}


@dataclass(frozen=True)
class Stamp:
    """Identity of the content of a file: the configuration and version that it was computed from.

    Attributes
    ----------
    key : str
        Content key of the configuration.
    version : str
        Version of this package.
    config : mapping
        The configuration with the user's keys; messages name the entries that differ.
    plain : callable
        Takes a configuration, also one read from a file; returns the form in which two of them are
        compared.
    absent : str
        Text for an entry that a configuration lacks.
    axes : mapping, optional
        Values of each axis of a sweep, by dotted key.
    """

    key: str
    version: str
    config: Mapping[str, Any] = field(default_factory=dict)
    plain: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    absent: str = "none"
    axes: Mapping[str, Any] | None = None

    def metadata(self) -> dict[str, Any]:
        """Build the metadata of a file.

        Returns
        -------
        dict of str to Any
            Entries key, version and config; of a sweep also axes.
        """
        held = {"key": self.key, "version": self.version, "config": dict(self.config)}
        return held if self.axes is None else held | {"axes": dict(self.axes)}

    def check(self, path: Path, found: Mapping[str, Any]) -> None:
        """Check that a file has this key and version.

        Parameters
        ----------
        path : Path
            The file, for the message.
        found : mapping
            Its metadata.

        Raises
        ------
        NQMError
            If it was not written by this package, or has another key or version.
        """
        advice = "move it away or use --out OTHER; nothing was overwritten"
        if "key" not in found:
            raise NQMError(f"{path} exists and was not written by nqm; {advice}")
        if found["key"] != self.key:
            differ = None
            if isinstance(found.get("config"), Mapping):
                stated, asked = self._comparable(found), self._comparable(self.metadata())
                differ = difference(stated, asked, self.absent)
            what = f"was computed with {differ}" if differ else "holds another configuration"
            raise NQMError(f"{path} {what}; {advice}")
        if found.get("version") != self.version:
            raise NQMError(
                f"{path} was written by nqm {found.get('version')}, this is {self.version}; "
                f"{advice}"
            )

    def _comparable(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Configuration and axes of a file, in the form in which two are compared."""
        config, axes = metadata.get("config"), metadata.get("axes")
        return {
            **(self.plain(config) if isinstance(config, Mapping) else {}),
            **({"sweep": axes} if isinstance(axes, Mapping) else {}),
        }


def finished(path: str | Path, stamp: Stamp) -> pd.DataFrame | None:
    """Read the table at `path` if it has this content already.

    Parameters
    ----------
    path : str or Path
        A .parquet or .csv file, which need not exist.
    stamp : Stamp
        Identity of the content.

    Returns
    -------
    DataFrame or None
        None if there is no file.

    Raises
    ------
    NQMError
        As `is_finished`.
    """
    return read_table(path) if is_finished(path, stamp) else None


def is_finished(path: str | Path, stamp: Stamp) -> bool:
    """Tell whether the table at `path` has this content already.

    Parameters
    ----------
    path : str or Path
        A .parquet or .csv file; its folder is made if it does not exist.
    stamp : Stamp
        Identity of the content.

    Returns
    -------
    bool
        False if there is no file.

    Raises
    ------
    NQMError
        If the file has other content, which is never overwritten, or if it could not be written.
    """
    path = Path(path)
    _format(path)
    try:
        if path.exists():
            stamp.check(path, read_metadata(path))
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        if isinstance(error, NQMError):
            raise
        reason = getattr(error, "strerror", error)
        raise NQMError(f"cannot write {path}: folder {path.parent}: {reason}") from None
    if not os.access(path.parent, os.W_OK):
        raise NQMError(f"cannot write {path}: folder {path.parent} is not writable")
    return False


@contextmanager
def writing(path: str | Path, stamp: Stamp) -> Iterator[bool]:
    """Lock a table while it is computed, unless it is finished already.

    Parameters
    ----------
    path : str or Path
        A .parquet or .csv file; its folder is made if it does not exist.
    stamp : Stamp
        Identity of the content.

    Yields
    ------
    bool
        Whether the content must still be computed.

    Raises
    ------
    NQMError
        As `is_finished`, and if another process is writing the table.
    """
    if is_finished(path, stamp):  # possible without permission to write
        tidy_lock(path)
        yield False
        return
    with locked(path):
        yield not is_finished(path, stamp)


def _format(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".parquet", ".csv"):
        raise NQMError(f"{path}: a table's name must end in .parquet or .csv; got {suffix!r}")
    return suffix


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn any error of a reader into one line that names the file."""
    _check_size(path, check_regular(path))
    try:
        yield
    except NQMError:
        raise
    except Exception as error:  # a damaged file can raise any error in a reader
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NQMError(
            f"{path} is not a complete table ({reason:.120}); delete it and run again"
        ) from None


def _check_size(path: Path, size: int) -> None:
    if size > memory_limit():
        raise NQMError(
            f"{path} takes {size / 2**30:.3g} GiB in memory, more than {memory_limit() / 2**30:.3g}"
            " GiB, the limit; read it in parts, or set NQM_MEMORY (GiB)"
        )


def _write_parquet(
    stream: IO[bytes],
    frames: Iterable[pd.DataFrame],
    dtypes: dict[str, str],
    rows: int,
    metadata: dict[str, Any],
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    for frame in frames:
        table = pa.Table.from_pandas(frame, preserve_index=False)
        # pandas' own metadata name its version; the bytes should depend on the content alone.
        stamped = table.replace_schema_metadata({"nqm": json.dumps(metadata, sort_keys=True)})
        if writer is None:
            writer = pq.ParquetWriter(stream, stamped.schema)
        writer.write_table(stamped)
    if writer is not None:
        writer.close()


def _write_csv(
    stream: IO[bytes],
    frames: Iterable[pd.DataFrame],
    dtypes: dict[str, str],
    rows: int,
    metadata: dict[str, Any],
) -> None:
    stamp = {"dtypes": dtypes, "metadata": metadata, "rows": rows}
    stream.write(f"# {json.dumps(stamp)}\n".encode())
    for index, frame in enumerate(frames):
        text = frame.to_csv(index=False, lineterminator="\n", header=index == 0)
        if "\r" in text:  # which ends a line for readers, but is not quoted as such
            text = frame.to_csv(
                index=False, lineterminator="\n", header=index == 0, quoting=csv.QUOTE_NONNUMERIC
            )
        stream.write(text.encode())


def dtype_name(values: pd.Series[Any]) -> str:
    """Name the type of a column as files do, in which all that is no number is a text.

    Parameters
    ----------
    values : Series

    Returns
    -------
    str
        "bool", "int64", "float64" or the like, or "str", which older pandas call "object".
    """
    return str(values.dtype) if values.dtype.kind in "iufb" else "str"


def _csv_stamp(path: Path) -> dict[str, Any] | None:
    """First line of one of our CSV files; None for a file of another program."""
    with _reading(path):
        with open(path, "rb") as stream:
            first = stream.readline()
            if not first.startswith(b"# {"):
                return None
            stamp = dict(json.loads(first[2:]))
            if not {"dtypes", "metadata", "rows"} <= stamp.keys():
                return None
            _check_csv_stamp(stamp)
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                raise ValueError("its last line is cut short")
        return stamp


def _check_csv_stamp(stamp: Mapping[str, Any]) -> None:
    kinds = {"dtypes": dict, "metadata": dict, "rows": int}
    wrong = [name for name, kind in kinds.items() if type(stamp[name]) is not kind]
    known = re.compile("str|bool|float(16|32|64)|u?int(8|16|32|64)")
    if not wrong and not all(known.fullmatch(str(one)) for one in stamp["dtypes"].values()):
        wrong = ["dtypes"]
    if wrong:
        raise ValueError(f"{wrong[0]} of its first line is damaged")
