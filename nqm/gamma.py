"""gamma: factor on the summed gradient of the weights that late-phase members share."""

from __future__ import annotations

from nqm.errors import check_number, check_word

#: Names of two values: 1, as in the official code for CIFAR, and 1 / K, as in that for ImageNet.
GAMMAS = ("sum", "mean")


def check_gamma(field: str, gamma: str | float) -> None:
    """Check that `gamma` is ``"sum"``, ``"mean"`` or a number >= 0.

    Parameters
    ----------
    field : str
        Name of the field, for the message.
    gamma : {"sum", "mean"} or float
        The value that the user gave.

    Raises
    ------
    NQMError
        If it is none of these.
    """
    if isinstance(gamma, str):
        check_word(field, gamma, GAMMAS)
    else:
        check_number(field, gamma, low=0.0)


def base_scale(gamma: str | float, members: int) -> float:
    """Compute gamma as a number.

    Parameters
    ----------
    gamma : {"sum", "mean"} or float
        Checked value of the field.
    members : int
        Number K of members.

    Returns
    -------
    float
        1 for ``"sum"``, 1 / K for ``"mean"``, else `gamma` itself.
    """
    if isinstance(gamma, str):
        return {"sum": 1.0, "mean": 1.0 / members}[gamma]
    return float(gamma)
