"""Recipes with the same arms as the paper's CIFAR experiments, on data that are at hand."""

from __future__ import annotations

from paper_repro.tables.rows import Source

_RECIPES = ("cifar10_q75_resnet8", "cifar10_q75_resnet20", "fashion_mnist_bn")


def small_images(arm: str, weights: str) -> tuple[Source, ...]:
    """Return an arm of each CIFAR-like recipe on data that are easier to obtain.

    Parameters
    ----------
    arm : str
        Name of the arm.
    weights : str
        Kind of weights, as in the results.

    Returns
    -------
    tuple of Source
        One per recipe.
    """
    return tuple(Source(recipe, arm, weights) for recipe in _RECIPES)
