"""Full float32 for measurements, also where training uses faster kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 numbers with all their 24 bits inside the block; restore the setting after.

    Training on a GPU may use TF32, with 11 bits (torch's own default for convolutions). Products of
    the Hessian are then wrong by some per cent, and a loss in its fourth digit.

    Yields
    ------
    None
    """
    matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions
