"""Compile and load the stand-in for CUDA; import this before torch."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
CACHE = Path(__file__).parents[3] / ".pytest_cache" / "gpu_ready"


def library() -> Path:
    """Path of the compiled stand-in, made once for a version of torch (some seconds)."""
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    key = hashlib.sha256(SOURCE.read_bytes() + version("torch").encode() + str(torch).encode())
    out = CACHE / f"stand_in_{key.hexdigest()[:16]}.so"
    if not out.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        made = out.with_suffix(f".{os.getpid()}.part")
        include = torch / "include"
        subprocess.run(
            ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{include}",
             f"-I{include / 'torch/csrc/api/include'}", str(SOURCE), f"-L{torch / 'lib'}",
             "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}", "-o", str(made)],
            check=True,
        )  # fmt: skip
        made.replace(out)
    return out


#: Its symbols stay its own: with RTLD_GLOBAL other libraries would take them for their own.
LOADED = ctypes.CDLL(str(library()))
