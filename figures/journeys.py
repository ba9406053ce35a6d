"""Journeys: pages whose blocks are one session, from a clone to a picture.

The Python blocks of such a page share their variables, as the cells of a notebook do; the `nqm`
commands of its ``sh`` blocks run between them, in the same folder. (Blocks of all other pages
stand alone.) A picture that a comment ``<!-- drawn: FILE -->`` follows is a file of the session. ::

    python -m figures.journeys docs/journey_spectrum.md

runs a page in a new folder at full size, puts what a Python block prints into the ``text`` block
after it, copies the pictures to their places, and prints the seconds that it took.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_FENCE = re.compile(r"^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_DRAWN = re.compile(r"\]\((?P<picture>[^)]+\.png)\)\n*<!-- drawn: (?P<file>\S+) -->")

#: Runs one command, given as words without the first, ``nqm``.
Runs = Callable[[Sequence[str]], object]


def walk(page: str, run: Runs) -> str:
    """Run all blocks of a page from top to bottom, in the present folder.

    Parameters
    ----------
    page : str
        Text of the page, in Markdown.
    run : callable
        Runs each `nqm` command.

    Returns
    -------
    str
        The page, with what its Python blocks print in the ``text`` blocks right after them.
    """
    space: dict[str, object] = {"__name__": "__main__"}
    parts, end, printed = [], 0, None
    for number, fence in enumerate(_FENCE.finditer(page)):
        kind, text = fence["kind"], fence["text"]
        parts.append(page[end : fence.start("text")])
        end = fence.end("text")
        parts.append(printed if kind == "text" and printed is not None else text)
        printed = None
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, f"block {number}", "exec"), space)
            printed = out.getvalue()
        for line in text.splitlines() if kind == "sh" else ():
            if line.startswith("nqm "):
                run(shlex.split(line, comments=True)[1:])
    return "".join([*parts, page[end:]])


def pictures(page: str) -> dict[str, str]:
    """Find the pictures that the session draws.

    Parameters
    ----------
    page : str
        Text of the page, in Markdown.

    Returns
    -------
    dict of str to str
        By the picture's path from the page: the file in the session's folder.
    """
    return {found["picture"]: found["file"] for found in _DRAWN.finditer(page)}


def build(path: Path) -> float:
    """Run a page at full size; write what is printed into it, and its pictures.

    Parameters
    ----------
    path : Path
        The page.

    Returns
    -------
    float
        Seconds that all its blocks took.
    """
    page, path, back = path.read_text(encoding="utf-8"), path.resolve(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        began = time.perf_counter()
        try:
            written = walk(page, _in_a_shell)
            seconds = time.perf_counter() - began
            for picture, file in pictures(page).items():
                shutil.copyfile(file, path.parent / picture)
        finally:
            os.chdir(back)
    path.write_text(written, encoding="utf-8")
    return seconds


def _in_a_shell(words: Sequence[str]) -> None:
    subprocess.run([sys.executable, "-m", "nqm", *words], check=True)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}: {build(Path(name)):.0f} s")
