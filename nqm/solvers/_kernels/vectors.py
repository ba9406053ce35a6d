"""Operations on rows of LANES numbers, each row one vector of the processor's instructions.

A loop over a row costs as much to begin as to run: its length is unknown, and its rows might
overlap. Here LLVM gets a load, a product, a sum and a store of LANES numbers each, and splits them
into the widest instructions that the processor has. Products are rounded before they are added, so
that the numbers are the same on any processor.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nqm.solvers._kernels.compiling import jit
from nqm.solvers._kernels.fast_normals import LANES

_WHOLE, _ZERO = ir.IntType(64), ir.Constant(ir.IntType(32), 0)
#: Bytes of a line of the cache; a vector that lies across two takes twice as long.
_LINE = 64


def _vector(kind: Any = None, width: int = LANES) -> Any:
    """Type of `width` numbers of an element type, float64 by default."""
    return ir.VectorType(kind or ir.DoubleType(), width)


def _place(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Address of an entry of a C-contiguous array, counted in entries."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _entry(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Entry of a C-contiguous array."""
    return builder.load(_place(context, builder, kind, array, index))


def _pointer(
    context: Any, builder: Any, kind: Any, array: Any, row: Any, width: int = LANES, part: Any = 0
) -> Any:
    """Address of a part of a row of an array (rows, LANES), as that of a vector."""
    first = builder.mul(row, _WHOLE(LANES))
    if part:
        first = builder.add(first, builder.mul(part, _WHOLE(width)))
    place = _place(context, builder, kind, array, first)
    return builder.bitcast(place, _vector(context.get_data_type(kind.dtype), width).as_pointer())


def _load(builder: Any, pointer: Any) -> Any:
    """Vector of float64 at an address of float64 or float32 ones."""
    vector = builder.load(pointer, align=4)
    wide = _vector(width=vector.type.count)
    return vector if vector.type == wide else builder.fpext(vector, wide)


def _spread(builder: Any, number: Any, width: int = LANES) -> Any:
    """Vector of one number."""
    undefined = ir.Constant(_vector(width=width), ir.Undefined)
    to_all = ir.Constant(_vector(ir.IntType(32), width), [0] * width)
    return builder.shuffle_vector(
        builder.insert_element(undefined, number, _ZERO), undefined, to_all
    )


def _combine(
    typing: Any, x: Any, to: Any, p: Any, other: Any, q: Any, rows: Any, first: Any, terms: Any,
    a: Any,
) -> Any:  # fmt: skip
    """Set row `to` of x to a[p] times row rows[first] + a[p + 1] times rows[first + 1] + ...

    Over `terms` rows of x (rows, LANES). If `other` is a row and not -1, it is set to a[q] times
    row rows[first] + ... on the way: each row is loaded once. Neither is one of the rows. One loop
    in place of a function: numba counts a function's arrays as used at each call, which takes
    longer than the sum.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args

        def add(term: Any, totals: Any, coefficients: Any, begin: bool) -> None:
            row = _entry(context, builder, kinds[5], args[5], builder.add(args[6], term))
            vector = _load(builder, _pointer(context, builder, kinds[0], args[0], row))
            for total, p in zip(totals, coefficients, strict=True):
                factor = _entry(context, builder, kinds[8], args[8], builder.add(p, term))
                product = builder.fmul(_spread(builder, factor), vector)
                before = None if begin else builder.load(total)
                builder.store(product if begin else builder.fadd(before, product), total)

        def write(rows: Any, coefficients: Any) -> None:
            totals = [cgutils.alloca_once(builder, _vector()) for _ in rows]
            for total in totals:
                builder.store(ir.Constant(_vector(), [0.0] * LANES), total)
            with builder.if_then(builder.icmp_signed(">", args[7], _WHOLE(0))):
                add(_WHOLE(0), totals, coefficients, begin=True)
                with cgutils.for_range_slice(builder, _WHOLE(1), args[7], _WHOLE(1)) as (term, _):
                    add(term, totals, coefficients, begin=False)
            for row, total in zip(rows, totals, strict=True):
                out = _pointer(context, builder, kinds[0], args[0], row)
                builder.store(builder.load(total), out, align=8)

        with builder.if_else(builder.icmp_signed("<", args[3], _WHOLE(0))) as (single, pair):
            with single:
                write([args[1]], [args[2]])
            with pair:
                write([args[1], args[3]], [args[2], args[4]])
        return context.get_dummy_value()

    index = types.intp
    return types.void(x, index, index, index, index, rows, index, index, a), generate


def _add_loss(
    typing: Any, loss: Any, to: Any, x: Any, at: Any, here: Any, form: Any, first: Any, n: Any,
    weight: Any,
) -> Any:  # fmt: skip
    """Add weight times (sum over j < n of form[first + j] times row at[here + j] of x)^2.

    To row `to` of `loss`. Entries of `form` that are zero are left out.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        total = cgutils.alloca_once(builder, _vector())
        # Minus zero changes no number that is added to it, not even the sign of zero.
        builder.store(ir.Constant(_vector(), [-0.0] * LANES), total)
        with cgutils.for_range(builder, args[7]) as loop:
            factor = _entry(context, builder, kinds[5], args[5], builder.add(args[6], loop.index))
            with builder.if_then(builder.fcmp_unordered("!=", factor, factor.type(0.0))):
                row = _entry(context, builder, kinds[3], args[3], builder.add(args[4], loop.index))
                vector = _load(builder, _pointer(context, builder, kinds[2], args[2], row))
                product = builder.fmul(_spread(builder, factor), vector)
                builder.store(builder.fadd(builder.load(total), product), total)
        read = builder.load(total)
        square = builder.fmul(_spread(builder, args[8]), builder.fmul(read, read))
        out = _pointer(context, builder, kinds[0], args[0], args[1])
        builder.store(builder.fadd(builder.load(out, align=8), square), out, align=8)
        return context.get_dummy_value()

    index = types.intp
    return types.void(loss, index, x, at, index, form, index, index, types.float64), generate


def _move(typing: Any, x: Any, to: Any, source: Any, row: Any) -> Any:
    """Set row `to` of x to a row of another array, of float64 or float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out = _pointer(context, builder, signature.args[0], args[0], args[1])
        vector = _load(builder, _pointer(context, builder, signature.args[2], *args[2:]))
        builder.store(vector, out, align=8)
        return context.get_dummy_value()

    return types.void(x, types.intp, source, types.intp), generate


#: Coordinates and normals of a step that `advance` can take.
SIZES = ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1))
#: Bits of the code of one row of a step, and code of the first row that only moves.
CODE_BITS, MOVED = 5, 16


def _advance(
    typing: Any, size: Any, x: Any, at: Any, z: Any, row: Any, begin: Any, end: Any, code: Any,
    a: Any, entry: Any,
) -> Any:  # fmt: skip
    """Take steps of a method of few coordinates, which stay in the processor's registers.

    Parameters, in the order of compiled calls: index in `SIZES` of (n, m); x, whose row at[j] is
    coordinate j; `z`, of float64 or float32, with m normals of step t from row `row` + m t on;
    `begin`, `end`: steps; `code` and `entry`: of each step the code of its rows and its first
    entry in a. A row's code, `CODE_BITS` of them, has a bit for each column that it combines, in
    the order of its entries in a; `MOVED` + c for a row that takes over c (`same` of
    `sample_linear`).
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        done = builder.append_basic_block("advanced")
        switch = builder.switch(args[0], done)
        for case, (n, m) in enumerate(SIZES):
            block = builder.append_basic_block("advance")
            switch.add_case(_WHOLE(case), block)
            builder.position_at_end(block)
            _steps(context, builder, signature.args, args, n, m)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    index = types.intp
    return types.void(index, x, at, z, index, index, index, code, a, entry), generate


def _steps(context: Any, builder: Any, kinds: Any, args: Any, n: int, m: int) -> None:
    """Write the steps of `advance` for n coordinates and m normals.

    So many lanes at once that there are enough independent sums, and enough registers for them.
    """
    width = LANES if n == 1 else LANES // 2
    read = partial(_entry, context, builder, kinds[8], args[8])
    held = [cgutils.alloca_once(builder, _vector(width=width)) for _ in range(n)]
    with cgutils.for_range(builder, _WHOLE(LANES // width)) as part:
        places = []
        for j in range(n):
            row = _entry(context, builder, kinds[2], args[2], _WHOLE(j))
            place = _pointer(context, builder, kinds[1], args[1], row, width, part.index)
            builder.store(_load(builder, place), held[j])
            places.append(place)
        with cgutils.for_range_slice(builder, args[5], args[6], _WHOLE(1)) as (t, _):
            values = [builder.load(one) for one in held]
            for c in range(m):
                row = builder.add(args[4], builder.add(builder.mul(t, _WHOLE(m)), _WHOLE(c)))
                place = _pointer(context, builder, kinds[3], args[3], row, width, part.index)
                values.append(_load(builder, place))
            code = _entry(context, builder, kinds[7], args[7], t)
            entry = _entry(context, builder, kinds[9], args[9], t)
            new: list[Any] = []
            for j in range(n):
                shifted = builder.lshr(code, _WHOLE(CODE_BITS * j))
                chosen = builder.and_(shifted, _WHOLE(2**CODE_BITS - 1))
                value, entry = _row(builder, read, entry, chosen, values, values[:n] + new)
                new.append(value)
            for one, value in zip(held, new, strict=True):
                builder.store(value, one)
        for one, place in zip(held, places, strict=True):
            builder.store(builder.load(one), place, align=8)


def _row(builder: Any, read: Any, entry: Any, code: Any, values: Any, kept: Any) -> tuple[Any, Any]:
    """Write one row of a step by its code; give its vector and the next row's first entry.

    `read` writes the load of an entry; the row combines `values`, or takes over one of `kept`.
    """
    kind = values[0].type
    done, none = (builder.append_basic_block("row") for _ in range(2))
    switch, ends = builder.switch(code, none), []
    for case in range(1, 2 ** len(values)):
        block = builder.append_basic_block("terms")
        switch.add_case(_WHOLE(case), block)
        builder.position_at_end(block)
        total, after = None, entry
        for c, value in enumerate(values):
            if case >> c & 1:
                product = builder.fmul(_spread(builder, read(after), kind.count), value)
                total = product if total is None else builder.fadd(total, product)
                after = builder.add(after, _WHOLE(1))
        ends.append((total, after, block))
        builder.branch(done)
    for c, value in enumerate(kept):
        block = builder.append_basic_block("moved")
        switch.add_case(_WHOLE(MOVED + c), block)
        builder.position_at_end(block)
        ends.append((value, entry, block))
        builder.branch(done)
    builder.position_at_end(none)
    ends.append((ir.Constant(kind, [0.0] * kind.count), entry, none))
    builder.branch(done)
    builder.position_at_end(done)
    result, following = builder.phi(kind), builder.phi(_WHOLE)
    for total, after, block in ends:
        result.add_incoming(total, block)
        following.add_incoming(after, block)
    return result, following


#: These as compiled code calls them.
combine: Any = intrinsic(_combine)
add_loss: Any = intrinsic(_add_loss)
move: Any = intrinsic(_move)
advance: Any = intrinsic(_advance)


@jit
def aligned(rows):
    """Zeros (rows, LANES) whose rows begin with a line of the cache."""
    memory = np.zeros(rows * LANES + _LINE // 8)
    first = (-memory.ctypes.data % _LINE) // 8
    return memory[first : first + rows * LANES].reshape(rows, LANES)
