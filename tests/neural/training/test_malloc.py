"""Freed memory stays in the process, where the C library can be told so."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from neural.training._malloc import keep_freed_memory

FAULTS = """
import resource, sys
import torch
from neural.training._malloc import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
torch.ones(12_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
    torch.ones(12_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: str) -> int:
    command = [sys.executable, "-c", FAULTS, kept]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc only")
def test_large_tensors_are_not_faulted_in_again() -> None:
    assert faults("kept") < faults("default") / 2


@pytest.mark.parametrize("missing", [AttributeError, OSError, TypeError])
def test_elsewhere_nothing_changes(
    missing: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def library(name: None) -> None:
        raise missing

    monkeypatch.setattr(ctypes, "CDLL", library)
    assert keep_freed_memory() is False
