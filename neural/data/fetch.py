"""Finding a published file, checking it against its published sum, and fetching it where it is not.

A download continues an earlier one that stopped, and appears under its name only when it is whole
and its checksum is right. It takes no more than the size stated for the file, and follows a server
nowhere but to http and https.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast
from urllib import request
from urllib.error import HTTPError

from nqm.errors import NQMError
from nqm.files import locked, sync_folder

_CHUNK = 1 << 18
#: Seconds a server may stay silent.
_TIMEOUT = 30.0


@dataclass(frozen=True)
class File:
    """One file of a set, as published.

    Attributes
    ----------
    name : str
        File name.
    url : str
        Where it is published; empty if it is not.
    md5 : str
        Published checksum; empty if there is none.
    unpacked : bool
        The checksum is that of the content of the .gz or .zip. Of such a file copies that were
        compressed anew are in circulation, and the content is what counts.
    limit : int
        Bytes that are downloaded at most.
    command : str
        A command that fetches the file into the folder that is named after it, if there is one.
    """

    name: str
    url: str = ""
    md5: str = ""
    unpacked: bool = False
    limit: int = 2**30
    command: str = ""


def checksum(path: Path, file: File) -> str:
    """MD5 of the file at `path`, or of what it unpacks to; "unreadable" if that fails.

    Parameters
    ----------
    path : Path
    file : File
        States whether the file is compressed.

    Returns
    -------
    str
        Hexadecimal digits.
    """
    try:
        with _opened(path, file) as stream:
            # MD5 is what these sets publish; it guards against damage, not against an attack.
            digest = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False))
    except (gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, EOFError, IndexError):
        return "unreadable"
    return digest.hexdigest()


def _opened(path: Path, file: File) -> BufferedIOBase:
    if file.unpacked and path.name.removesuffix(".part").endswith(".zip"):
        archive = zipfile.ZipFile(path)
        return cast(BufferedIOBase, archive.open(archive.namelist()[0]))
    if file.unpacked:
        return gzip.GzipFile(path)
    return path.open("rb")


@dataclass(frozen=True)
class Store:
    """Place of one set's files: folders that are searched, and the folder for downloads.

    Attributes
    ----------
    root : Path
        The folder of all data; searched flat.
    name : str
        Name of the set. ``root/name`` is searched first and takes what is downloaded.
    folders : tuple of str
        Further folders to search, relative to the root or absolute.
    download : bool
        Whether a missing file may be fetched.
    """

    root: Path
    name: str
    folders: tuple[str, ...] = ()
    download: bool = True

    @property
    def home(self) -> Path:
        """Folder that belongs to this set."""
        return self.root / self.name

    def places(self) -> list[Path]:
        """Folders that are searched, in order.

        Returns
        -------
        list of Path
        """
        names = (self.name, self.name.replace("_", "-"), *self.folders, ".")
        return [self.root / name for name in dict.fromkeys(names)]

    def find(self, file: File) -> Path | None:
        """The first copy with the right checksum, or None if there is no copy at all.

        Parameters
        ----------
        file : File
            Its name and checksum.

        Returns
        -------
        Path or None

        Raises
        ------
        NQMError
            If there are copies and none is right.
        """
        wrong = None
        for path in (place / file.name for place in self.places()):
            if not path.is_file():
                continue
            found = checksum(path, file) if file.md5 else ""
            if found == file.md5:
                return path
            wrong = wrong or (path, found)
        if wrong:
            raise NQMError(f"{wrong[0]} is damaged or another file: {_sums(file, wrong[1])}; "
                           "delete it and run again")  # fmt: skip
        return None

    def get(self, file: File) -> Path:
        """Path of a verified copy of the file; it is downloaded if it is missing.

        Parameters
        ----------
        file : File
            Its name, checksum and address.

        Returns
        -------
        Path

        Raises
        ------
        NQMError
            If a copy is damaged, or there is none and it cannot be fetched.
        """
        path = self.find(file)
        if path is not None:
            return path
        by_hand = f"fetch {file.url} and put it in {self.home}"
        if file.command:
            by_hand = f"run `{file.command} {self.home}`"
        elif not file.url:
            raise NQMError(
                f"{file.name} not found in {self.root}; it has no public address: put it in "
                f"{self.home}, or set NQM_DATA to the folder that has it"
            )
        if not (file.url and self.download):
            raise NQMError(f"{file.name} not found in {self.root}; {by_hand}")
        try:
            with locked(self.home / file.name):
                # Another process may have fetched it just now.
                return self.find(file) or _retrieve(file, self.home)
        except (OSError, HTTPException) as error:
            reason = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
            raise NQMError(
                f"{file.name} is not in {self.root} and could not be fetched ({reason}); "
                f"run again, or {by_hand}"
            ) from error

    def get_all(self, files: Iterable[File]) -> list[Path]:
        """Paths of verified copies of several files (see `get`).

        Parameters
        ----------
        files : iterable of File

        Returns
        -------
        list of Path
            In the order of `files`.
        """
        return [self.get(file) for file in files]


def _sums(file: File, found: str) -> str:
    of = " of its content" if file.unpacked else ""
    return f"expected md5{of} {file.md5}, found {found}"


def _retrieve(file: File, folder: Path) -> Path:
    """Fetch a file to the folder, under its name once it is whole, right and on the disk."""
    path, part = folder / file.name, folder / f"{file.name}.part"
    resume(file.url, part, file.limit)
    found = checksum(part, file)
    if file.md5 and found != file.md5:
        part.unlink()
        raise NQMError(
            f"{file.url} sent another file than was published: {_sums(file, found)}; "
            f"run again, or put the right {file.name} in {folder}"
        )
    with part.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(part, path)
    sync_folder(folder)
    return path


class _Redirects(request.HTTPRedirectHandler):
    """Follows a server to http and https alone, and from https to https."""

    def redirect_request(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str
    ) -> Any:
        kinds = ("https",) if req.full_url.startswith("https:") else ("http", "https")
        if newurl.partition(":")[0].lower() not in kinds:
            raise HTTPError(newurl, code, f"the server points to {newurl:.80}", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, start: int) -> HTTPResponse:
    """Ask for a file from byte `start` on; nothing but http and https is spoken."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler(), request.HTTPHandler(), request.HTTPSHandler(), _Redirects(),
        request.HTTPDefaultErrorHandler(), request.HTTPErrorProcessor(), request.UnknownHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    headers = {"Range": f"bytes={start}-"} if start else {}
    return cast(HTTPResponse, opener.open(request.Request(url, headers=headers), timeout=_TIMEOUT))


def resume(url: str, part: Path, limit: int) -> None:
    """Download to `part`, going on after the bytes it already holds.

    A connection that breaks is opened again as long as each attempt brings something.

    Parameters
    ----------
    url : str
        Any server; one that cannot serve a range sends the whole file again.
    part : Path
        Holds the beginning of the file, or does not exist.
    limit : int
        Bytes of the file at most; of a larger one nothing is kept.

    Raises
    ------
    NQMError
        If the file is larger.
    OSError, http.client.HTTPException
        If the file is still incomplete; `part` keeps what has arrived.
    """
    best = have = part.stat().st_size if part.exists() else 0
    while True:
        try:
            response = _open(url, have)
        except HTTPError as error:
            if error.code != 416 or not have:
                raise
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return  # all of it had arrived
            part.unlink()  # what is there is no beginning of this file
            best = have = 0
            continue
        with closing(response):
            if response.status != 206:
                have = 0  # the server starts from the beginning
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                part.unlink()
                raise ConnectionError("the server sent another part than it was asked for")
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            if total is not None and total > limit:
                raise _too_large(url, part, limit)
            broken = _append(response, part, have, total, limit)
        have = part.stat().st_size
        if have > limit:
            raise _too_large(url, part, limit)
        if broken is None and total in (None, have):
            return
        if have <= best:
            raise broken or ConnectionError(f"connection closed after {have} of {total} bytes")
        best = have


def _too_large(url: str, part: Path, limit: int) -> NQMError:
    part.unlink(missing_ok=True)
    return NQMError(f"{url} sends more than the {limit:,} bytes that the file has at most")


def _append(
    response: HTTPResponse, part: Path, have: int, total: int | None, limit: int
) -> Exception | None:
    """Write the response behind the first `have` bytes; what broke the connection, if anything."""
    from tqdm import tqdm

    bar = tqdm(
        desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, disable=None,
        leave=False,
    )  # fmt: skip
    with part.open("ab" if have else "wb") as out, bar:
        try:
            while out.tell() <= limit and (chunk := response.read(_CHUNK)):
                out.write(chunk)
                bar.update(len(chunk))
        except (OSError, HTTPException) as error:
            return error
    return None
