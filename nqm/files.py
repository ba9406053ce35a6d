"""Files that are written completely or not at all, and locks against a second writer."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from nqm.errors import NQMError

#: Errors of a file system that has no locks of its own.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}

#: Times that a lock is asked for again, 10 ms apart, before it counts as taken.
LOOKS = 10


@contextmanager
def locked(output: str | Path, *, folder: bool = False) -> Iterator[None]:
    """Lock an output, so that this process is its only writer until the end of the block.

    The system frees the lock when the process ends, however it ends. The lock holds for all
    machines that share the file, if the file system supports `flock`, as NFS does.

    Parameters
    ----------
    output : str or Path
        A file, or a folder with `folder`; the folder that contains it is made if it does not exist.
    folder : bool
        Whether `output` is a folder whose whole content is locked.

    Yields
    ------
    None

    Raises
    ------
    NQMError
        If another process has the lock (the message names it), or if nothing can be written there.
    """
    output = Path(output)
    path = _lock_of(output, folder)
    made = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = _take(path)
    except OSError as error:
        raise NQMError(f"cannot write {output}: {error.strerror or error}") from None
    if stream is None:
        raise NQMError(
            f"{output} is being written by {_holder(path)}; wait for it, or choose another output"
        )
    try:
        yield
    finally:
        # Removed before it is freed: a process that opened it sees that its name is gone.
        with suppress(OSError):
            os.unlink(stream.name)
        stream.close()
        if made:
            with suppress(OSError):  # unless there is something in it
                path.parent.rmdir()


def is_locked(output: str | Path, *, folder: bool = False) -> bool:
    """Tell whether a process has the lock of an output now; nothing is written.

    Parameters
    ----------
    output, folder
        As in `locked`.

    Returns
    -------
    bool
        False also if there is no lock file, or the lock is that of a process that ended. On a file
        system without locks, the lock of a killed process counts.
    """
    path = _lock_of(Path(output), folder)
    if path.with_name(f"{path.name}.held").exists():
        return True
    try:
        check_regular(path)  # to open a pipe would wait for its other end
        with open(path, "rb") as stream:
            return _flock(stream, shared=True) is False
    except (NQMError, OSError):
        return False


def tidy_lock(output: str | Path, *, folder: bool = False) -> None:
    """Remove the lock that a killed process left beside an output that was finished.

    Parameters
    ----------
    output, folder
        As in `locked`.
    """
    if _lock_of(Path(output), folder).exists():
        with suppress(NQMError), locked(output, folder=folder):
            pass


def _lock_of(output: Path, folder: bool) -> Path:
    return output / ".lock" if folder else output.with_name(f".{output.name}.lock")


def _take(path: Path) -> IO[bytes] | None:
    """Open and lock the file at `path`; None if another process has the lock."""
    tries = 0
    while True:
        check_replaceable(path)  # to open a pipe would wait for its other end
        stream: IO[bytes] = open(path, "ab")  # noqa: SIM115  closed with the lock
        free = _flock(stream)
        if free and _is_at(stream, path):
            break
        stream.close()
        if free is None:  # no locks on this file system: use the existence of a second file
            path.unlink(missing_ok=True)
            try:
                stream = open(path.with_name(f"{path.name}.held"), "xb")  # noqa: SIM115
            except FileExistsError:
                return None
            break
        if not free:
            # `is_locked` holds a lock for the moment in which it looks.
            if tries == LOOKS:
                return None
            tries += 1
            time.sleep(0.01)
        # Or its holder removed the file between the two calls; try again.
    with suppress(OSError):  # only for information: on a full disk the lock holds as well
        stream.truncate(0)
        os.write(stream.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    return stream


def _flock(stream: IO[bytes], *, shared: bool = False) -> bool | None:
    """Whether the file could be locked at once; None if the file system has no locks."""
    try:
        import fcntl

        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(stream.fileno(), kind | fcntl.LOCK_NB)
    except ImportError:  # Windows
        return None
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_at(stream: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """Process that has the lock, as written in the file."""
    held = path.with_name(f"{path.name}.held")
    for name, advice in ((held, f" (if there is no such process, delete {held})"), (path, "")):
        with suppress(OSError, UnicodeDecodeError):
            if text := name.read_text(encoding="utf-8")[:200]:
                return text + advice
    return "another process"


def check_regular(path: Path) -> int:
    """Check that a file can be read to its end.

    Parameters
    ----------
    path : Path

    Returns
    -------
    int
        Its size, bytes.

    Raises
    ------
    NQMError
        If there is no file, or it is a folder, a pipe or a device, which may have no end.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise NQMError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise NQMError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise NQMError(f"{path} is {kind}, not a file; name a file")
    return found.st_size


def check_replaceable(path: Path) -> None:
    """Check, before an output is computed, that its path is free or a regular file.

    Parameters
    ----------
    path : Path
        Where the output will be written.

    Raises
    ------
    NQMError
        If there is a folder, a pipe or a device.
    """
    if path.exists():
        check_regular(path)


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Write a file completely or not at all.

    The stream is a temporary file in the same folder, which is renamed to `path` once everything is
    on disk. Temporary files of killed processes are removed.

    Parameters
    ----------
    path : Path
        File to write.
    durable : bool
        False not to wait for the disk; the file may then be lost with the machine's power.

    Yields
    ------
    IO of bytes
        Stream to write to.

    Raises
    ------
    NQMError
        If the file cannot be written; an older file of that name is not changed.
    """
    try:
        _tidy(path)
        with _temporary(path) as stream:
            try:
                yield stream
                stream.flush()
                if durable:
                    os.fsync(stream.fileno())
                os.replace(stream.name, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(stream.name)
                raise
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        raise NQMError(f"cannot write {path}: {error.strerror or error}") from None


def _temporary(path: Path) -> IO[bytes]:
    """New temporary file in the folder of `path`, locked as long as it is open."""
    while True:
        stream = open(path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp"), "xb")  # noqa: SIM115
        # `_tidy` of another process may have removed it between the two calls.
        if _flock(stream) is not False and os.path.exists(stream.name):
            return stream
        stream.close()


def _tidy(path: Path) -> None:
    """Remove temporary files of `path` to which no process writes."""
    for left in path.parent.iterdir():
        if is_temporary(left) and left.name.startswith(f".{path.name}."):
            with suppress(OSError), open(left, "ab") as stream:
                if _flock(stream):
                    left.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Tell whether a file is a temporary file of `replacing`.

    Parameters
    ----------
    path : Path
        The file, judged by its name only.

    Returns
    -------
    bool
        True for names like ``.NAME.1a2b3c4d.tmp``.
    """
    return path.name.startswith(".") and path.suffix == ".tmp"


def is_lock(path: Path) -> bool:
    """Tell whether a file is a lock of `locked`.

    Parameters
    ----------
    path : Path
        The file, judged by its name only.

    Returns
    -------
    bool
        True for hidden names that end in ``.lock`` or ``.lock.held``.
    """
    return path.name.startswith(".") and path.name.endswith((".lock", ".lock.held"))


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk, if the system can.

    Parameters
    ----------
    folder : Path
        The folder.
    """
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
