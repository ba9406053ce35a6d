"""Names that a user chooses and that become the names of folders."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from nqm.errors import NQMError

#: Most bytes of a name; file systems take 255, and endings are added.
LONGEST = 100
#: Marks a name may hold beside letters and digits, not at its start.
MARKS = " _-.+=,()@"
#: What Windows keeps for devices, with any ending.
_DEVICES = {"con", "prn", "aux", "nul"} | {f"{p}{n}" for p in ("com", "lpt") for n in range(1, 10)}


def check_folder_names(where: str, names: Iterable[str], own: Iterable[str] = ()) -> None:
    """Raise NQMError unless every name is that of a plain folder on any system, and its own.

    Parameters
    ----------
    where : str
        Dotted key whose entries the names are.
    names : iterable of str
    own : iterable of str
        Files the program writes beside these folders.
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
    """A folder's name made of any text: what it must not hold becomes ``-``."""
    kept = "".join(c if c.isalnum() or c in MARKS else "-" for c in text)
    kept = kept.strip("-. ").encode()[:LONGEST].decode(errors="ignore").rstrip("-. ")
    return kept if kept and not _fault(kept) else default


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _fault(name: str) -> str:
    """What is wrong with a folder's name, after "must not"; empty if nothing is."""
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
