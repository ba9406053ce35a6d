"""Names that a user chooses and that become the names of folders."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from nqm.errors import NQMError

#: Largest number of bytes of a name; file systems allow 255, and endings are added.
LONGEST = 100
#: Characters that a name may contain besides letters and digits, but not at its start.
MARKS = " _-.+=,()@"
#: Names that Windows reserves for devices, with any ending.
_DEVICES = {"con", "prn", "aux", "nul"} | {f"{p}{n}" for p in ("com", "lpt") for n in range(1, 10)}


def check_folder_names(where: str, names: Iterable[str], own: Iterable[str] = ()) -> None:
    """Check that names are distinct folder names on any system.

    Parameters
    ----------
    where : str
        Dotted key whose entries the names are, for the message.
    names : iterable of str
        Names that the user chose.
    own : iterable of str
        Names of files that the program writes beside these folders.

    Raises
    ------
    NQMError
        If a name is no valid folder name, or equals another one up to capitals.
    """
    taken = {_folded(name): name for name in own}
    for name in names:
        reason = _fault(name)
        if reason:
            raise NQMError(
                f"{where} {name!r:.60} becomes the name of a folder and must not {reason}; "
                "use letters, digits, '_' and '-'"
            )
        other = taken.setdefault(_folded(name), name)
        if other is not name:
            raise NQMError(
                f"{where} {name!r} and {other!r} would be one folder or file where capitals do not "
                "count; rename one"
            )


def folder_name(text: str, default: str) -> str:
    """Make a folder name from any text.

    Parameters
    ----------
    text : str
        Any text; characters that are not allowed become ``-``.
    default : str
        Name to use if nothing valid is left.

    Returns
    -------
    str
        Valid folder name of at most `LONGEST` bytes.
    """
    name = "".join(c if c.isalnum() or c in MARKS else "-" for c in text)
    name = name.strip("-. ").encode()[:LONGEST].decode(errors="ignore").rstrip("-. ")
    return name if name and not _fault(name) else default


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _fault(name: str) -> str:
    """Fault of a folder name, to be read after "must not"; empty if there is none."""
    wrong = next((c for c in name if not (c.isalnum() or c in MARKS)), "")
    if not name:
        return "be empty"
    if wrong:
        return f"hold {wrong!r}"
    if not (name[0].isalnum() or name[0] == "_"):
        return f"begin with {name[0]!r}"
    if name[-1] in ". ":
        return f"end with {name[-1]!r}"
    if len(name.encode()) > LONGEST:
        return f"be longer than {LONGEST} bytes"
    return "be one that Windows keeps" if name.partition(".")[0].casefold() in _DEVICES else ""
