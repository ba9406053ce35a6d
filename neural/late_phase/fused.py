"""K members' minibatches in one forward pass.

Within a cycle the shared weights are constant, so their layers can run on all K minibatches
together. Layers with member weights, and layers that mix the rows of a batch (BatchNorm), run slice
by slice: each minibatch separately, with the weights of its member.

`make_plan` determines beforehand which axis of which tensor has the rows, and compares the pass
with one pass for each member. If the rows of different minibatches cannot be distinguished, there
is no plan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from neural.late_phase import rows as axes
from neural.late_phase.duplicate import duplicate
from neural.late_phase.ready import checked_statistics
from neural.late_phase.rows import Rows, Shapes, UnclearRowsError
from neural.late_phase.rows import arguments as arguments
from neural.late_phase.swap import Place, places, swapped
from nqm.errors import NQMError


@dataclass(frozen=True)
class Plan:
    """Row axes of all tensors in a forward pass, for minibatches of certain shapes.

    Attributes
    ----------
    inputs : tuple of Rows
        Row axis of every leaf of the inputs.
    output : tuple of Rows
        Row axis of every leaf of the model's output.
    layers : mapping
        Path of a layer that runs slice by slice -> shapes of its arguments with all rows together
        -> row axes of its arguments, and of its results.
    """

    inputs: tuple[Rows, ...]
    output: tuple[Rows, ...]
    layers: Mapping[str, Mapping[Shapes, tuple[tuple[Rows, ...], tuple[Rows, ...]]]]


def key(model: nn.Module, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Key of a plan: shapes and types of the inputs, and modes of all layers.

    Parameters
    ----------
    model : Module
        The model.
    inputs : sequence of K inputs
        Inputs of the members.

    Returns
    -------
    tuple of object
        Hashable.

    Raises
    ------
    UnclearRowsError
        If an input without rows differs between minibatches.
    """
    leaves, form = axes.flatten([arguments(own) for own in inputs])
    kinds = tuple(
        (tuple(x.shape), x.dtype)
        if isinstance(x, Tensor)
        else (type(x), x if isinstance(x, axes.PLAIN) else None)
        for x in leaves
    )
    modes = tuple(module.training for module in model.modules())
    return kinds, input_rows(inputs), str(form), modes


def forward(
    model: nn.Module,
    where: Mapping[str, tuple[Place, ...]],
    rows: Sequence[Mapping[str, Tensor]],
    inputs: Sequence[Any],
    plan: Plan,
    learn: Callable[[list[Any]], Any] | None = None,
) -> Any:
    """Run every member on its own inputs, in one pass.

    Parameters
    ----------
    model : Module
        The model.
    where : mapping
        Places of the members' tensors in the model (see `neural.late_phase.swap.places`).
    rows : sequence of K mappings
        Name of a parameter or buffer -> value of member k. Buffers are updated in place.
    inputs : sequence of K inputs
        Inputs of the members.
    plan : Plan
        Plan for inputs of these shapes.
    learn : callable, optional
        Takes the list of outputs and computes the loss and its backward pass, while layers still
        run slice by slice: activation checkpoints run layers again in the backward pass.

    Returns
    -------
    list of K outputs, or result of `learn`

    Raises
    ------
    NQMError
        If a layer gets arguments of shapes that the plan does not have.
    """
    sizes = [axes.count(arguments(own)) for own in inputs]
    args, kwargs = _together(inputs, plan.inputs)
    with checked_statistics(), _slice_by_slice(model, where, rows, sizes, plan):
        leaves, form = axes.flatten(model(*args, **kwargs))
        slices = axes.split(leaves, plan.output, sizes)
        outputs = [pytree.tree_unflatten(own, form) for own in slices]
        return outputs if learn is None else learn(outputs)


# --- the layers that run slice by slice ----------------------------------------------------------


@contextmanager
def _replaced(
    owners: Mapping[str, nn.Module], make: Callable[[str, nn.Module], Callable[..., Any]]
) -> Iterator[None]:
    """Replace the forward passes of some layers inside the block; hooks run around them."""
    own = {path: vars(module).get("forward") for path, module in owners.items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # In evaluation mode the fast path of a transformer block does not call its layers.
        torch.backends.mha.set_fastpath_enabled(False)
        for path, module in owners.items():
            module.forward = make(path, module)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for path, module in owners.items():
            before = own[path]
            if before is not None:
                module.forward = before
            else:
                del module.forward


@contextmanager
def _slice_by_slice(
    model: nn.Module,
    where: Mapping[str, tuple[Place, ...]],
    rows: Sequence[Mapping[str, Tensor]],
    sizes: Sequence[int],
    plan: Plan,
) -> Iterator[None]:
    """Let layers with member weights, or that mix rows, run slice by slice inside the block."""

    def make(path: str, module: nn.Module) -> Callable[..., Any]:
        inside = {id(submodule) for submodule in module.modules()}
        names = [n for n in rows[0] if any(id(holder) in inside for holder, _ in where[n])]
        own = [{name: row[name] for name in names} for row in rows]
        return _Sliced(module, path, module.forward, where, own, sizes, plan.layers[path])

    with axes.uncompiled(), _replaced(owners(model, where), make):
        yield


@dataclass
class _Sliced:
    """Forward pass of a layer, slice by slice. Its hooks run once, around all slices."""

    module: nn.Module
    path: str
    own_forward: Callable[..., Any]
    where: Mapping[str, tuple[Place, ...]]
    rows: Sequence[Mapping[str, Tensor]]
    sizes: Sequence[int]
    known: Mapping[Shapes, tuple[tuple[Rows, ...], tuple[Rows, ...]]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, form = axes.flatten((args, kwargs))
        shapes = axes.shapes(leaves)
        if shapes not in self.known:
            raise NQMError(
                f"fused: {_named(self.path, self.module)} is given shapes that depend on the data; "
                "set fused to False"
            )
        before, after = self.known[shapes]
        outputs = []
        for row, own in zip(self.rows, axes.split(leaves, before, self.sizes), strict=True):
            own_args, own_kwargs = pytree.tree_unflatten(own, form)
            tensors = dict(row)
            with swapped(self.where, tensors):
                outputs.append(axes.flatten(self.own_forward(*own_args, **own_kwargs)))
            for name, value in row.items():
                if tensors[name] is not value:  # the layer has replaced a buffer
                    value.copy_(tensors[name])
        joined = axes.join([own_leaves for own_leaves, _ in outputs], after)
        return pytree.tree_unflatten(joined, outputs[0][1])


def _named(path: str, module: nn.Module) -> str:
    return f"{path} ({type(module).__name__})" if path else type(module).__name__


def owners(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """List the outermost modules that have member weights themselves or mix the rows of a batch.

    Parameters
    ----------
    model : Module
        The model.
    names : collection of str
        Names of the replicated parameters and buffers.

    Returns
    -------
    dict of str to Module
        Modules by their paths.
    """
    replicated = {id(p) for name, p in model.named_parameters() if name in names}
    replicated |= {id(b) for name, b in model.named_buffers() if name in names}
    outermost: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if any(not outer or path.startswith(f"{outer}.") for outer in outermost):
            continue
        if _mixes_rows(module) or any(id(own) in replicated for own in _own_tensors(module)):
            outermost[path] = module
    return outermost


def _mixes_rows(module: nn.Module) -> bool:
    if isinstance(module, _InstanceNorm):
        return module.training and module.track_running_stats
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers that the module itself computes with."""
    # Attention reads its output layer's weight without calling that layer.
    yield from module.parameters(recurse=isinstance(module, nn.MultiheadAttention))
    yield from module.buffers(recurse=False)
    if parametrize.is_parametrized(module):
        # A parametrized weight is computed by the layer to which it belongs.
        parametrizations = module.get_submodule("parametrizations")
        yield from parametrizations.parameters()
        yield from parametrizations.buffers()


# --- a plan --------------------------------------------------------------------------------------


@dataclass
class _Recorder:
    """Forward pass of a layer that records the shapes of its arguments and results."""

    own_forward: Callable[..., Any]
    mode: axes.WithoutChance
    calls: list[tuple[Shapes, Shapes]] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reads = self.mode.reads
        output = self.own_forward(*args, **kwargs)
        # The layer will run on one minibatch at a time, so it may read numbers of its tensors.
        self.mode.reads = reads
        inputs, _ = axes.flatten((args, kwargs))
        results, _ = axes.flatten(output)
        self.calls.append((axes.shapes(inputs), axes.shapes(results)))
        return output


@checked_statistics()
def make_plan(
    model: nn.Module, rows: Sequence[Mapping[str, Tensor]], inputs: Sequence[Any]
) -> Plan:
    """Determine the row axes of a pass, and check it against one pass for each member.

    Copies of the model run, with displaced weights and without random numbers. The model itself is
    not changed.

    Parameters
    ----------
    model : Module
        The model.
    rows : sequence of K mappings
        See `forward`.
    inputs : sequence of K inputs
        Inputs of the members, with examples along the first axis.

    Returns
    -------
    Plan
        For inputs of these shapes.

    Raises
    ------
    UnclearRowsError
        If the row axis of a tensor cannot be determined, or rows of one minibatch change the
        results of another.
    """
    device = next(iter(rows[0].values())).device
    with axes.without_chance(device) as mode:
        known = _find_rows(model, list(rows[0]), inputs, mode)
    if mode.reads:
        raise UnclearRowsError(
            f"{type(model).__name__} decides by numbers in its tensors, which another minibatch "
            "may change"
        )
    for size in axes.DISPLACEMENTS:
        if _same(model, rows, inputs, known, size, device):
            return known
    raise UnclearRowsError("outputs are not finite when weights are displaced")


def _together(
    inputs: Sequence[Any], rows: Sequence[Rows]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Join the arguments of all minibatches."""
    flat = [axes.flatten(arguments(own)) for own in inputs]
    joined = axes.join([leaves for leaves, _ in flat], rows)
    args, kwargs = pytree.tree_unflatten(joined, flat[0][1])
    return args, kwargs


def input_rows(inputs: Sequence[Any]) -> tuple[Rows, ...]:
    """Determine the row axes of the inputs: the first axis, or none.

    Parameters
    ----------
    inputs : sequence of K inputs
        Inputs of the members.

    Returns
    -------
    tuple of Rows
        One entry per leaf of an input; None for leaves that are equal in all minibatches.

    Raises
    ------
    UnclearRowsError
        If inputs differ in structure, or an input without rows differs between minibatches.
    """
    flat = [axes.flatten(arguments(own)) for own in inputs]
    if any(form != flat[0][1] for _, form in flat):
        raise UnclearRowsError("inputs differ in structure")
    sizes = [axes.count(arguments(own)) for own in inputs]
    where: list[Rows] = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if len(tensors) == len(leaves) and all(
            x.ndim and len(x) == n for x, n in zip(tensors, sizes, strict=True)
        ):
            where.append((0, 1))
        elif all(axes.alike(x, leaves[0], 0.0) for x in leaves):
            where.append(None)
        else:
            raise UnclearRowsError(
                "an input without the rows of its minibatch differs between minibatches"
            )
    return tuple(where)


def _find_rows(
    model: nn.Module, names: Sequence[str], inputs: Sequence[Any], mode: axes.WithoutChance
) -> Plan:
    """Determine row axes by running a copy on one minibatch and on all of them."""
    known = input_rows(inputs)
    n, m = axes.count(arguments(inputs[0])), sum(axes.count(arguments(own)) for own in inputs)
    model = duplicate(model)
    if "" in owners(model, names):
        raise UnclearRowsError(f"{type(model).__name__} itself uses members' weights")
    seen: list[dict[str, _Recorder]] = []
    outputs: list[tuple[list[Any], Any]] = []
    for args, kwargs in (arguments(inputs[0]), _together(inputs, known)):
        recorders: dict[str, _Recorder] = {}

        def record(path: str, module: nn.Module, into: dict[str, _Recorder] = recorders) -> Any:
            into[path] = _Recorder(module.forward, mode)
            return into[path]

        with _replaced(owners(model, names), record):
            try:
                outputs.append(axes.flatten(model(*args, **kwargs)))
            except Exception as error:  # a model may fail on an unexpected number of rows
                if not seen:
                    raise  # it fails on a single minibatch, too
                raise UnclearRowsError(axes.reason("all rows together", error)) from None
        seen.append(recorders)
    layers: dict[str, dict[Shapes, tuple[tuple[Rows, ...], tuple[Rows, ...]]]] = {}
    for path, recorder in seen[0].items():
        what = _named(path, model.get_submodule(path))
        calls, more = recorder.calls, seen[1][path].calls
        if len(calls) != len(more):
            raise UnclearRowsError(f"{what} runs another number of times on more rows")
        layers[path] = {}
        for (few_in, few_out), (many_in, many_out) in zip(calls, more, strict=True):
            before = axes.find(few_in, many_in, n, m, f"an argument of {what}")
            after = axes.find(few_out, many_out, n, m, f"the output of {what}")
            if not any(before):
                raise UnclearRowsError(f"{what} is used by position: no argument has rows")
            if any(r is None and s is not None for r, s in zip(after, many_out, strict=True)):
                raise UnclearRowsError(f"the output of {what} holds a tensor without rows")
            if layers[path].setdefault(many_in, (before, after)) != (before, after):
                raise UnclearRowsError(f"{what} has its rows along different axes in its calls")
    (few_leaves, few_form), (many_leaves, many_form) = outputs
    if few_form != many_form:
        raise UnclearRowsError("the model's output changes its structure with the number of rows")
    output = axes.find(
        axes.shapes(few_leaves), axes.shapes(many_leaves), n, m, "the model's output"
    )
    for where, leaf in zip(output, many_leaves, strict=True):
        if where is None and not isinstance(leaf, axes.PLAIN):
            what = "a tensor without rows" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise UnclearRowsError(f"the model's output holds {what}")
    return Plan(known, output, layers)


def _same(
    model: nn.Module,
    rows: Sequence[Mapping[str, Tensor]],
    inputs: Sequence[Any],
    plan: Plan,
    size: float,
    device: torch.device,
) -> bool:
    """Compare one pass with a pass for each member; False if outputs are not finite.

    All weights are displaced, differently for every member: if members were equal, or factors still
    zero, a pass that applies them to wrong rows would give the same outputs.

    Raises
    ------
    UnclearRowsError
        If outputs or buffers differ.
    """
    apart, states = [], []
    for fused in (False, True):
        copy = duplicate(model)
        where = places(copy, rows[0])
        axes.displace_model_(copy, size)
        members = _displaced(rows, size)
        with axes.without_chance(device):
            if fused:
                outputs = _try(copy, where, members, inputs, plan)
            else:
                outputs = [_alone(copy, where, *pair) for pair in zip(members, inputs, strict=True)]
        apart.append([axes.flatten(output)[0] for output in outputs])
        states.append({f"{k} {n}": v for k, row in enumerate(members) for n, v in row.items()})
        states[-1] |= dict(copy.named_buffers())
    if not all(axes.mostly_finite(leaves) for leaves in apart[0]):
        return False
    tolerance = axes.precision(model, apart[0][0], device)
    for together, separate in zip(apart[1], apart[0], strict=True):
        for leaf, expected in zip(together, separate, strict=True):
            if not axes.alike(leaf, expected, tolerance):
                raise UnclearRowsError("rows of one minibatch change the output of another")
    for name, value in states[0].items():
        if not axes.alike(states[1][name], value, tolerance):
            raise UnclearRowsError(f"the buffer {name.split()[-1]} would take other values")
    return True


def _try(
    model: nn.Module,
    where: Mapping[str, tuple[Place, ...]],
    rows: Sequence[Mapping[str, Tensor]],
    inputs: Sequence[Any],
    plan: Plan,
) -> list[Any]:
    try:
        outputs: list[Any] = forward(model, where, rows, inputs, plan)
    except NQMError:
        raise UnclearRowsError("the shapes of its layers depend on the data") from None
    except Exception as error:  # a model may fail on an unexpected number of rows
        raise UnclearRowsError(axes.reason("all rows together", error)) from None
    return outputs


def _alone(
    model: nn.Module,
    where: Mapping[str, tuple[Place, ...]],
    row: dict[str, Tensor],
    inputs: Any,
) -> Any:
    args, kwargs = arguments(inputs)
    with swapped(where, row):
        return model(*args, **kwargs)


def _displaced(rows: Sequence[Mapping[str, Tensor]], size: float) -> list[dict[str, Tensor]]:
    """Displace the members' tensors, differently for each; variances stay positive."""
    generator = torch.Generator().manual_seed(1)
    members = []
    for row in rows:
        moved = {}
        for name, value in row.items():
            moved[name] = value.detach().clone()
            if name.endswith("running_var"):
                factor = 0.5 + torch.rand(value.shape, generator=generator)
                moved[name].mul_(factor.to(value))
            else:
                axes.displace_(moved[name], size, generator)
        members.append(moved)
    return members
