"""Selection of the weights that are replicated, by a small grammar of names.

``"batchnorm+head"`` joins terms by ``+``. A term is one of `TERMS`, or ``name:PATTERN``, a glob
over parameter names as ``model.named_parameters()`` prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import ParametrizationList

from neural.late_phase.reparametrize import LowRank, RankOne
from nqm.errors import NQMError, suggest


@dataclass(frozen=True)
class Selection:
    """Names of the selected parameters and buffers.

    Attributes
    ----------
    parameters : tuple of str
        Names of the parameters.
    buffers : tuple of str
        Names of the buffers that are replicated with them, e.g. running statistics.
    """

    parameters: tuple[str, ...]
    buffers: tuple[str, ...]


def _is_torch_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm | _InstanceNorm | nn.LayerNorm | nn.GroupNorm)


def _is_named(module: nn.Module, kind: str) -> bool:
    """Tell by name and weights whether a layer of another library is a normalisation.

    Its own weights must have one number per channel, and layers inside it must have none. This
    excludes a block that begins with a normalisation, and a linear layer with a normalised weight.
    """
    own = list(module.parameters(recurse=False))
    return (
        kind in type(module).__name__.lower()
        and bool(own)
        and len(own) == len(list(module.parameters()))
        and all(max(p.shape, default=1) == p.numel() for p in own)
    )


_KINDS: dict[str, Callable[[nn.Module], bool]] = {
    "batchnorm": lambda module: isinstance(module, _BatchNorm) or _is_named(module, "batchnorm"),
    "layernorm": lambda module: isinstance(module, nn.LayerNorm) or _is_named(module, "layernorm"),
    "groupnorm": lambda module: isinstance(module, nn.GroupNorm) or _is_named(module, "groupnorm"),
    "rmsnorm": lambda module: _is_named(module, "rmsnorm"),
    "norm": lambda module: _is_torch_norm(module) or _is_named(module, "norm"),
    "rank1": lambda module: isinstance(module, RankOne),
    "lora": lambda module: isinstance(module, LowRank),
}

#: Terms other than ``name:PATTERN`` -> the weights that they select.
TERMS: dict[str, str] = {
    "batchnorm": "scale, shift and running statistics of BatchNorm",
    "layernorm": "scale and shift of LayerNorm",
    "groupnorm": "scale and shift of GroupNorm",
    "rmsnorm": "scale of RMSNorm",
    "norm": "all normalisation layers",
    "head": "the last Linear layer, usually the classifier",
    "bias": "every bias",
    "rank1": "rank-1 factors (see add_rank1)",
    "lora": "low-rank factors (see add_lora)",
    "embedding": "embeddings of template banks (parameters called embedding)",
    "all": "every trainable parameter",
}

_ADVICE = {
    "rank1": "; call neural.add_rank1(model) first",
    "lora": "; call neural.add_lora(model, rank) first",
    "head": "; select it by name, as in name:classifier.*",
}


def select(model: nn.Module, what: str | Iterable[str]) -> Selection:
    """Find the parameters and buffers of a model that a selection names.

    Frozen parameters are never selected. Buffers of a layer with a selected parameter are selected
    with it (running statistics, vectors of spectral normalisation, a quantiser's range), and so are
    the statistics of a layer without parameters if its kind is named.

    Parameters
    ----------
    model : Module
        The model.
    what : str or iterable of str
        Terms (see `TERMS`) joined by ``+``, or a sequence of terms.

    Returns
    -------
    Selection
        Names in the order of the model.

    Raises
    ------
    NQMError
        If a term is unknown or selects nothing in this model.
    """
    terms = what.split("+") if isinstance(what, str) else list(what)
    names_of = {id(p): name for name, p in model.named_parameters()}
    # A tied weight may be selected by any of its names.
    trainable = {
        name: names_of[id(p)]
        for name, p in model.named_parameters(remove_duplicate=False)
        if p.requires_grad
    }
    chosen: set[str] = set()
    statistics: set[str] = set()
    for term in (term.strip() for term in terms):
        names, buffers = _term(model, term, trainable.keys())
        if not names and not buffers:
            raise NQMError(
                f"select: {term!r} matches nothing in {type(model).__name__}"
                f"{_ADVICE.get(term) or _what_there_is(model, trainable)}"
            )
        chosen |= {trainable[name] for name in names}
        statistics |= buffers
    if not chosen:
        raise NQMError(f"select: {what!r} holds no trainable weight of {type(model).__name__}")
    for path, module in model.named_modules():
        if any(_join(path, name) in chosen for name, _ in module.named_parameters(recurse=False)):
            # Buffers of the parametrizations belong to the weight that they compute.
            inside = isinstance(module, ParametrizationList)
            statistics |= {_join(path, n) for n, _ in module.named_buffers(recurse=inside)}
    return Selection(
        tuple(name for name in names_of.values() if name in chosen),
        tuple(name for name, _ in model.named_buffers() if name in statistics),
    )


def _what_there_is(model: nn.Module, trainable: Iterable[str]) -> str:
    """List terms that match the model, for a message."""
    terms = [term for term in (*_KINDS, "head", "embedding") if _matches(model, term, trainable)]
    if len(terms) > 1 and "norm" in terms and {"batchnorm", "layernorm", "groupnorm"} & {*terms}:
        terms.remove("norm")
    return f"; it has {', '.join(terms)}" if terms else ""


def _matches(model: nn.Module, term: str, trainable: Iterable[str]) -> bool:
    names, buffers = _term(model, term, trainable)
    return bool(names or buffers)


def _term(model: nn.Module, term: str, trainable: Iterable[str]) -> tuple[set[str], set[str]]:
    """Parameters and running statistics that one term selects."""
    if term.startswith("name:"):
        pattern = term.removeprefix("name:")
        return {name for name in trainable if fnmatchcase(name, pattern)}, set()
    if term == "all":
        return set(trainable), set()
    if term == "embedding":
        return {name for name in trainable if name.rpartition(".")[2] == term}, set()
    if term == "bias":
        return {name for name in trainable if _is_bias(name.rpartition(".")[2])}, set()
    if term == "head":
        linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        prefix = f"{linear[-1]}." if linear and linear[-1] else ""
        return {n for n in trainable if linear and n.startswith(prefix)}, set()
    if term not in _KINDS:
        raise NQMError(f"select: {term!r} is unknown{suggest(term, [*TERMS, 'name:PATTERN'])}")
    names: set[str] = set()
    buffers: set[str] = set()
    for path, module in model.named_modules():
        if _KINDS[term](module):
            parameters = module.named_parameters(remove_duplicate=False)
            names |= {_join(path, name) for name, _ in parameters}
            buffers |= set(_statistics(path, module))
    return names & set(trainable), buffers


def _is_bias(name: str) -> bool:
    # Names in recurrent layers are like bias_ih_l0, in attention in_proj_bias.
    return name == "bias" or name.startswith("bias_") or name.endswith("_bias")


def _statistics(path: str, module: nn.Module) -> Iterator[str]:
    if isinstance(module, _BatchNorm | _InstanceNorm):
        for name, _ in module.named_buffers(recurse=False):
            yield _join(path, name)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
