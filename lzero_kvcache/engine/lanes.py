"""A numba type for a vector of eight float32 numbers, one for each of eight rows, and its instructions.

LLVM vectorises a loop by guesses about its length. Code written with lanes is vectorised as it stands, whatever the
sizes, and needs no flag that allows sums to be reordered or nan to be ignored. A place in memory is an address in bytes
plus an offset in float32 numbers.
"""
import inspect
import itertools
import operator
from typing import Any, Callable, List, Sequence

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once, for_range, for_range_slice, get_or_insert_function, is_not_null
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import intrinsic, overload, register_model

from .compiling import inner
from .program import WIDTH

NUMBER = 4
"""Bytes of a number."""

_FLOAT, _INT32 = ir.FloatType(), ir.IntType(32)
_VECTOR, _INTEGERS = ir.VectorType(_FLOAT, WIDTH), ir.VectorType(_INT32, WIDTH)
_PAIR, _PAIRS = ir.IntType(64), ir.VectorType(ir.IntType(64), WIDTH // 2)  # of numbers
_MAY_FUSE = ('contract', )  # a product and a sum may become one instruction


class LanesType(types.Type):
    def __init__(self) -> None:
        super().__init__('Lanes')


@register_model(LanesType)
class LanesModel(PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


LANES, PLACE, FLOAT = LanesType(), (types.intp, types.intp), types.float32


def instructions(signature: Any, build: Callable[..., Any]) -> Any:
    """A numba function made of the instructions that ``build(builder, *args)`` writes."""
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        made = build(builder, *args)
        return context.get_dummy_value() if signature.return_type is types.void else made

    def typed(context: Any, *args: Any) -> Any:
        return signature, codegen

    names = ['context', *(f'argument_{index}' for index in range(len(signature.args)))]
    typed.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # where numba counts arguments
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    return intrinsic(typed)


def _at(builder: Any, address: Any, index: Any, kind: Any) -> Any:
    place = builder.add(address, builder.shl(index, ir.Constant(index.type, 2)))
    return builder.inttoptr(place, kind.as_pointer())


def _order(*lanes: int) -> Any:
    return ir.Constant(ir.VectorType(_INT32, len(lanes)), list(lanes))


_PAIRED = _order(0, 8, 1, 9, 4, 12, 5, 13), _order(2, 10, 3, 11, 6, 14, 7, 15)
"""Two shuffles that interleave vectors a and b: to a0 b0 a1 b1 a4 b4 a5 b5, and to the rest in the same order."""

_EVERY_SECOND = _order(0, 2, 8, 10, 4, 6, 12, 14), _order(1, 3, 9, 11, 5, 7, 13, 15)
"""Their inverses: of two vectors that were interleaved so, the first shuffle gives back a, and the second b."""


def _splat(builder: Any, value: Any) -> Any:
    first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, first, _order(*[0] * WIDTH))


def _load(builder: Any, address: Any, index: Any) -> Any:
    return builder.load(_at(builder, address, index, _VECTOR), align=4)


def _store(builder: Any, value: Any, address: Any, index: Any) -> None:
    builder.store(value, _at(builder, address, index, value.type), align=4)


def _read(builder: Any, address: Any, index: Any) -> Any:
    return builder.load(_at(builder, address, index, _FLOAT), align=4)


def _spread(builder: Any, address: Any, index: Any) -> Any:
    return _splat(builder, _read(builder, address, index))


def _spread_pair(builder: Any, address: Any, index: Any) -> Any:
    """A vector of two numbers, repeated four times."""
    both = builder.load(_at(builder, address, index, _PAIR), align=4)
    first = builder.insert_element(ir.Constant(_PAIRS, ir.Undefined), both, ir.Constant(_INT32, 0))
    return builder.bitcast(builder.shuffle_vector(first, first, _order(*[0] * _PAIRS.count)), _VECTOR)


def _prefetch(builder: Any, address: Any, index: Any) -> None:
    pointer = ir.IntType(8).as_pointer()
    place = builder.bitcast(_at(builder, address, index, _FLOAT), pointer)
    kind = ir.FunctionType(ir.VoidType(), [pointer, _INT32, _INT32, _INT32])
    to_read, to_keep, data = (ir.Constant(_INT32, number) for number in (0, 3, 1))
    prefetch = builder.module.declare_intrinsic('llvm.prefetch', [pointer], kind)
    builder.call(prefetch, [place, to_read, to_keep, data])


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=_MAY_FUSE), c, flags=_MAY_FUSE)


def _call(name: str) -> Callable[..., Any]:
    kind = ir.FunctionType(_VECTOR, [_VECTOR])
    return lambda builder, x: builder.call(get_or_insert_function(builder.module, kind, f'{name}.v{WIDTH}f32'), [x])


def _choose(comparison: str) -> Callable[..., Any]:
    """Lane by lane: ``b`` where the comparison of ``a`` with ``b`` holds, else ``a``, which may be nan."""
    return lambda builder, a, b: builder.select(builder.fcmp_ordered(comparison, a, b), b, a)


def _where_less(builder: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered('<', a, b), x, y)


def _times_power_of_two(builder: Any, x: Any, n: Any) -> Any:
    exponent = builder.shl(builder.fptosi(n, _INTEGERS), ir.Constant(_INTEGERS, [23] * WIDTH))
    return builder.bitcast(builder.add(builder.bitcast(x, _INTEGERS), exponent), _VECTOR)


def _halves(half: int) -> Any:
    """Two shuffles of vectors a and b in groups of ``half`` lanes: the even groups of both, and the odd groups of both.
    Groups of a and of b take turns."""
    lanes = range(WIDTH)
    return (_order(*[lane + (WIDTH - half if lane & half else 0) for lane in lanes]),
            _order(*[lane + (WIDTH if lane & half else half) for lane in lanes]))


def _turned(builder: Any, rows: List[Any]) -> List[Any]:
    """Eight vectors transposed."""
    for half in (4, 2, 1):
        low, high = _halves(half)
        for row in (row for row in range(WIDTH) if not row & half):
            a, b = rows[row], rows[row + half]
            rows[row], rows[row + half] = builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)
    return rows


def _totals(builder: Any, rows: List[Any]) -> Any:
    """The sum of each of eight vectors, as one vector."""
    for half in (4, 2, 1):
        low, high = _halves(half)
        pairs = zip(rows[:half], rows[half:])
        rows = [builder.fadd(builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)) for a, b in pairs]
    return rows[0]


def _transpose(builder: Any, source: Any, step: Any, target: Any, target_step: Any) -> None:
    rows = [_load(builder, source, builder.mul(step, ir.Constant(step.type, row))) for row in range(WIDTH)]
    for row, turned in enumerate(_turned(builder, rows)):
        _store(builder, turned, target, builder.mul(target_step, ir.Constant(step.type, row)))


def _tokens_of_rows(builder: Any, tokens: Any, tokens_step: Any, token: Any, part: Any) -> List[Any]:
    """The addresses of what lies ``part`` bytes into one token of each of eight rows; ``tokens`` is the address of a
    table ``[8, tokens_step]`` of the addresses of tokens."""
    found = []
    for row in range(WIDTH):
        index = builder.add(builder.mul(tokens_step, ir.Constant(token.type, row)), token)
        place = builder.add(tokens, builder.shl(index, ir.Constant(token.type, 3)))
        found.append(builder.add(builder.load(builder.inttoptr(place, token.type.as_pointer())), part))
    return found


def _score(builder: Any, queries: Any, step: Any, tokens: Any, tokens_step: Any, token: Any, part: Any, moved: Any,
           size: Any) -> Any:
    """For each of eight rows, the product of its query, of ``[8, step]``, with the key of one of its tokens, to which
    ``moved`` is added first."""
    kind = size.type
    keys = _tokens_of_rows(builder, tokens, tokens_step, token, part)
    places = [builder.add(queries, builder.mul(step, ir.Constant(kind, NUMBER * row))) for row in range(WIDTH)]
    sums = [alloca_once(builder, _VECTOR) for _ in range(WIDTH)]
    for sum in sums:
        builder.store(ir.Constant(_VECTOR, [0.0] * WIDTH), sum)
    whole = builder.and_(size, ir.Constant(kind, -WIDTH))
    with for_range_slice(builder, ir.Constant(kind, 0), whole, ir.Constant(kind, WIDTH), kind) as (at, _):
        shift = _load(builder, moved, at)
        for query, key, sum in zip(places, keys, sums):
            shifted = builder.fadd(_load(builder, key, at), shift)
            builder.store(_multiply_add(builder, _load(builder, query, at), shifted, builder.load(sum)), sum)
    with for_range_slice(builder, whole, size, ir.Constant(kind, 1), kind) as (at, _):
        shift = _read(builder, moved, at)
        for query, key, sum in zip(places, keys, sums):
            first, both = ir.Constant(_INT32, 0), builder.load(sum)
            product = builder.fmul(_read(builder, query, at), builder.fadd(_read(builder, key, at), shift))
            both = builder.insert_element(both, builder.fadd(builder.extract_element(both, first), product), first)
            builder.store(both, sum)
    return _totals(builder, [builder.load(sum) for sum in sums])


def _mix(builder: Any, weights: Any, tokens: Any, tokens_step: Any, count: Any, part: Any, moved: Any, moved_step: Any,
         target: Any) -> None:
    """Eight dimensions of the weighted sum of eight rows' values, to which ``moved`` is added, by weights
    ``[count, 8]``; written as ``[8 dimensions, 8 rows]``."""
    kind = count.type
    sums = [alloca_once(builder, _VECTOR) for _ in range(WIDTH)]
    for sum in sums:
        builder.store(ir.Constant(_VECTOR, [0.0] * WIDTH), sum)
    with for_range(builder, count) as loop:
        shift = _load(builder, builder.add(moved, builder.mul(moved_step, loop.index)), ir.Constant(kind, 0))
        first = builder.mul(loop.index, ir.Constant(kind, WIDTH))
        for row, value in enumerate(_tokens_of_rows(builder, tokens, tokens_step, loop.index, part)):
            weight = _spread(builder, weights, builder.add(first, ir.Constant(kind, row)))
            shifted = builder.fadd(_load(builder, value, ir.Constant(kind, 0)), shift)
            builder.store(_multiply_add(builder, weight, shifted, builder.load(sums[row])), sums[row])
    for row, turned in enumerate(_turned(builder, [builder.load(sum) for sum in sums])):
        _store(builder, turned, target, ir.Constant(kind, row * WIDTH))


def _linear(outputs: int) -> Callable[..., Any]:
    """``outputs`` outputs of a linear layer for eight rows; the weights are ``[outputs, inputs]``. Sums stay in
    registers. Two weights are loaded at once, since loads take longer than products: each output has two sums of four
    rows each, in which the sum over even inputs lies beside that over odd ones. The weights from ``following`` on are
    prefetched."""
    def build(builder: Any, weight: Any, following: Any, bias: Any, source: Any, target: Any, inputs: Any,
              added: Any) -> None:
        def number(n: int) -> Any:
            return ir.Constant(inputs.type, n)

        def x_at(index: Any) -> Any:
            return _load(builder, source, builder.mul(index, number(WIDTH)))

        def both(one: Any, other: Any, orders: Sequence[Any]) -> List[Any]:
            return [builder.shuffle_vector(one, other, order) for order in orders]

        def add(index: Any, spread: Callable[..., Any], one: Any, other: Any) -> None:
            x = both(one, other, _PAIRED)
            for row, places in zip(rows, sums):
                factor = spread(builder, weight, builder.add(row, index))
                for numbers, place in zip(x, places):
                    builder.store(_multiply_add(builder, factor, numbers, builder.load(place)), place)

        zeros = ir.Constant(_VECTOR, [0.0] * WIDTH)
        sums = [[alloca_once(builder, _VECTOR) for _ in _PAIRED] for _ in range(outputs)]
        for place in itertools.chain(*sums):
            builder.store(zeros, place)
        rows = [builder.mul(number(output), inputs) for output in range(outputs)]
        even = builder.and_(inputs, number(-2))
        with for_range_slice(builder, number(0), even, number(2), inputs.type) as (at, _):
            _prefetch(builder, following, builder.mul(at, number(outputs)))
            add(at, _spread_pair, x_at(at), x_at(builder.add(at, number(1))))
        with builder.if_then(builder.icmp_signed('<', even, inputs)):
            add(even, _spread, x_at(even), zeros)
        for n, (low, high) in enumerate(sums):
            total = builder.fadd(*both(builder.load(low), builder.load(high), _EVERY_SECOND))
            builder.store(builder.fadd(total, _spread(builder, bias, number(n))), low)
        with builder.if_then(is_not_null(builder, added)):
            for n, (place, _) in enumerate(sums):
                other = _load(builder, added, number(n * WIDTH))
                builder.store(builder.fadd(builder.load(place), other), place)
        for n, (place, _) in enumerate(sums):
            _store(builder, builder.load(place), target, number(n * WIDTH))

    return build


load = instructions(LANES(*PLACE), _load)
store = instructions(types.void(LANES, *PLACE), _store)
read = instructions(FLOAT(*PLACE), _read)
write = instructions(types.void(FLOAT, *PLACE), _store)
multiply_add = instructions(LANES(LANES, LANES, LANES), _multiply_add)
splat = instructions(LANES(FLOAT), _splat)
spread = instructions(LANES(*PLACE), _spread)
larger, smaller = (instructions(LANES(LANES, LANES), _choose(comparison)) for comparison in '<>')
where_less = instructions(LANES(LANES, LANES, LANES, LANES), _where_less)
root = instructions(LANES(LANES), _call('llvm.sqrt'))
rounded = instructions(LANES(LANES), _call('llvm.rint'))
times_power_of_two = instructions(LANES(LANES, LANES), _times_power_of_two)
transpose = instructions(types.void(types.intp, types.intp, types.intp, types.intp), _transpose)
"""Eight rows of eight numbers from one address to another, ``(source, step, target, step)``."""
score = instructions(LANES(*[types.intp] * 8), _score)
mix = instructions(types.void(*[types.intp] * 8), _mix)

linear_1_output, linear_6_outputs = (
    instructions(types.void(*[types.intp] * 7), _linear(outputs)) for outputs in (1, 6)
)


def _operator(sign: Any, instruction: str) -> None:
    operate = instructions(
        LANES(LANES, LANES), lambda builder, a, b: getattr(builder, instruction)(a, b, flags=_MAY_FUSE)
    )
    are_lanes = (LANES, LANES)
    overload(sign)(lambda a, b: (lambda a, b: operate(a, b)) if (a, b) == are_lanes else None)


for _sign, _instruction in ((operator.add, 'fadd'), (operator.sub, 'fsub'), (operator.mul, 'fmul'),
                            (operator.truediv, 'fdiv')):
    _operator(_sign, _instruction)


@inner
def constant(value: float) -> Any:
    return splat(np.float32(value))


@inner
def exponential(x: Any) -> Any:
    """``exp``, with a relative error of 6e-7 within +-10; clamped to what a float32 holds, and nan for nan."""
    x = smaller(larger(x, constant(-87.0)), constant(88.0)) * constant(1.4426950408889634)
    whole = rounded(x)
    x = x - whole
    y = multiply_add(x, constant(1.5403530e-4), constant(1.3333558e-3))
    y = multiply_add(x, y, constant(9.6181291e-3))
    y = multiply_add(x, y, constant(5.5504109e-2))
    y = multiply_add(x, y, constant(2.4022651e-1))
    y = multiply_add(x, y, constant(6.9314718e-1))
    return times_power_of_two(multiply_add(x, y, constant(1.0)), whole)
