"""Operations on rows of LANES numbers, each row one vector of the processor's instructions.

A loop over a row costs as much to begin as to run: its length is unknown, and its rows might
overlap. Here LLVM gets a load, a product, a sum and a store of LANES numbers each, and splits them
into the widest instructions that the processor has. Products are rounded before they are added, so
that the numbers are the same on any processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nqm.solvers._kernels.compiling import jit
from nqm.solvers._kernels.fast_normals import LANES

_VECTOR, _ZERO = ir.VectorType(ir.DoubleType(), LANES), ir.Constant(ir.IntType(32), 0)
_TO_ALL = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
#: Bytes of a line of the cache; a vector that lies across two takes twice as long.
_LINE = 64


def _pointer(context: Any, builder: Any, kind: Any, array: Any, row: Any) -> Any:
    """Address of a row of a C-contiguous array (rows, LANES), as that of a vector."""
    data = context.make_array(kind)(context, builder, array).data
    vector = ir.VectorType(context.get_data_type(kind.dtype), LANES)
    place = builder.gep(data, [builder.mul(row, ir.Constant(row.type, LANES))])
    return builder.bitcast(place, vector.as_pointer())


def _spread(builder: Any, number: Any) -> Any:
    """Vector of one number."""
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    one = builder.insert_element(undefined, number, _ZERO)
    return builder.shuffle_vector(one, undefined, _TO_ALL)


#: Most terms of one call of `combine`.
TERMS = 4


def _combine(typing: Any, x: Any, adds: Any, terms: Any, to: Any, rows: Any, a: Any, p: Any) -> Any:
    """Set row `to` of x to, or add to it, a[p] times row rows[0] + a[p + 1] times rows[1] + ...

    x is (rows, LANES), `terms` of the `TERMS` rows count (more than 0 where it `adds`), and `to` is
    none of them. One branch in place of a function: numba counts a function's arrays as used at
    each call, which takes longer than the sum.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        whole = ir.IntType(64)
        out = _pointer(context, builder, kind, args[0], args[3])
        entry = context.make_array(signature.args[5])(context, builder, args[5]).data
        chosen = builder.select(args[1], builder.add(args[2], whole(TERMS)), args[2])
        done = builder.append_basic_block("combined")
        switch = builder.switch(chosen, done)
        for case in range(2 * TERMS + 1):
            count = case if case <= TERMS else case - TERMS
            switch.add_case(whole(case), block := builder.append_basic_block("combine"))
            builder.position_at_end(block)
            total = builder.load(out, align=8) if case > TERMS else None
            for i in range(count):
                row = builder.extract_value(args[4], i)
                place = builder.gep(entry, [builder.add(args[6], whole(i))])
                factor = _spread(builder, builder.load(place))
                vector = builder.load(_pointer(context, builder, kind, args[0], row), align=8)
                product = builder.fmul(factor, vector)
                total = product if total is None else builder.fadd(total, product)
            builder.store(total or ir.Constant(_VECTOR, [0.0] * LANES), out, align=8)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    indices, index = types.UniTuple(types.intp, TERMS), types.intp
    return types.void(x, types.boolean, index, index, indices, a, index), generate


def _add_square(typing: Any, total: Any, to: Any, x: Any, row: Any, weight: Any) -> Any:
    """Add weight times the square of a row of x to row `to` of another array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out = _pointer(context, builder, signature.args[0], args[0], args[1])
        vector = builder.load(_pointer(context, builder, signature.args[2], *args[2:4]), align=8)
        square = builder.fmul(_spread(builder, args[4]), builder.fmul(vector, vector))
        builder.store(builder.fadd(builder.load(out, align=8), square), out, align=8)
        return context.get_dummy_value()

    return types.void(total, types.intp, x, types.intp, types.float64), generate


def _move(typing: Any, x: Any, to: Any, source: Any, row: Any) -> Any:
    """Set row `to` of x to a row of another array, of float64 or float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out = _pointer(context, builder, signature.args[0], args[0], args[1])
        vector = builder.load(_pointer(context, builder, signature.args[2], *args[2:]), align=4)
        if signature.args[2].dtype == types.float32:
            vector = builder.fpext(vector, _VECTOR)
        builder.store(vector, out, align=8)
        return context.get_dummy_value()

    return types.void(x, types.intp, source, types.intp), generate


#: The three as compiled code calls them.
combine: Any = intrinsic(_combine)
add_square: Any = intrinsic(_add_square)
move: Any = intrinsic(_move)


@jit
def aligned(rows):
    """Zeros (rows, LANES) whose rows begin with a line of the cache."""
    memory = np.zeros(rows * LANES + _LINE // 8)
    first = (-memory.ctypes.data % _LINE) // 8
    return memory[first : first + rows * LANES].reshape(rows, LANES)
