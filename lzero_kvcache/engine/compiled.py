"""A simulation of the model on the CPU as one compiled function: what :meth:`Engine.step` and :meth:`Engine.for_search`
do, with pages read and written where they are. Importing it imports numba.

Rows stand side by side: numbers of ``tiles`` times eight rows are ``[tiles, numbers, 8]``, so that one row cannot touch
another. Attention alone goes row by row, since pages do. Places in memory are addresses.
"""
import math
from typing import Any, NamedTuple

import numpy as np

from .compiling import entry, inner
from .lanes import (
    WIDTH,
    constant,
    exponential,
    larger,
    linear_1_output_1_tile,
    linear_6_outputs_2_tiles,
    linear_8_outputs_1_tile,
    load,
    multiply_add,
    nearest,
    read,
    root,
    smaller,
    splat,
    spread,
    store,
    total,
    transpose,
    write,
)
from .program import (
    BIAS,
    CLAMPED_EXPONENTIAL,
    EXPONENTIAL,
    GELU,
    INPUTS,
    KEY_BIAS,
    KEY_WEIGHT,
    KIND,
    LINEAR,
    NARROW_BIAS,
    NARROW_WEIGHT,
    NORM1_BIAS,
    NORM1_WEIGHT,
    NORM2_BIAS,
    NORM2_WEIGHT,
    OUTPUTS,
    PROJ_BIAS,
    PROJ_WEIGHT,
    QUERY_BIAS,
    QUERY_WEIGHT,
    RELU,
    SIM_NORM,
    TANH,
    VALUE_BIAS,
    VALUE_WEIGHT,
    WEIGHT,
    WIDEN_BIAS,
    WIDEN_WEIGHT,
    Network,
)

TILES = 8
"""Tiles that are worked on together: what they need fits into a core's own cache, and weights are read once for all."""

NUMBER = 4
"""Bytes of a number."""

TILE = WIDTH * NUMBER


class Scratch(NamedTuple):
    memory: np.ndarray
    tokens: np.ndarray  # [rows, tokens]: addresses of what the pages hold of a row's tokens
    lengths: np.ndarray  # [rows]: tokens, the one that is asked about included
    x: int  # from here on addresses: tokens on their way through the layers, [tiles, E, 8]
    between: int
    y: int
    qkv: int  # [tiles, 3E, 8]
    inner: int
    left: int  # what operations of programs read and write in turn
    right: int
    places: int
    rows: int  # [8, step]: a tile's numbers row by row
    step: int
    scores: int  # [heads, tokens, 8]


def new_scratch(network: Network, width: int) -> Scratch:
    """Memory for one thread that simulates over tables of ``width`` pages."""
    embed, tokens = network.embed, 2 * width + 3
    step = _whole(max(3 * embed, network.widest))
    side = TILES * WIDTH
    widest = max(network.widest, embed)
    sizes = dict(
        x=embed * side, between=embed * side, y=widest * side, qkv=3 * embed * side, inner=network.inner * side,
        left=widest * side, right=widest * side, places=embed * side, rows=step * WIDTH,
        scores=network.heads * tokens * WIDTH
    )
    sizes = {name: _whole(size) + WIDTH * WIDTH for name, size in sizes.items()}  # transposes write whole blocks
    memory = np.zeros(sum(sizes.values()) + 16, dtype=np.float32)
    address = -(-memory.ctypes.data // 64) * 64
    addresses = {}
    for name, size in sizes.items():
        addresses[name] = address
        address += size * NUMBER
    return Scratch(
        memory, np.zeros((side, tokens), dtype=np.int64), np.zeros(side, dtype=np.int64), step=step, **addresses
    )


def _whole(size: int) -> int:
    """To the next line of memory."""
    return -(-size // 16) * 16


# ---- layers ----------------------------------------------------------------------------------------------------------


@inner
def _linear(weight, bias, source, source_step, target, target_step, inputs, outputs, tiles, added):
    """``target = weight source + bias``, and ``+ added``; steps lead from a tile to the next, in numbers."""
    paired = 0
    if outputs >= 6:
        paired = tiles - tiles % 2
        for n in range(0, outputs, 6):
            n = min(n, outputs - 6)  # the last ones are computed twice
            for tile in range(0, paired, 2):
                linear_6_outputs_2_tiles(
                    weight + n * inputs * NUMBER, bias + n * NUMBER, source + tile * source_step * NUMBER, source_step,
                    target + (tile * target_step + n * WIDTH) * NUMBER, target_step, inputs,
                    added + (tile * target_step + n * WIDTH) * NUMBER if added else added
                )
    for tile in range(paired, tiles):
        x, y = source + tile * source_step * NUMBER, target + tile * target_step * NUMBER
        other = added + tile * target_step * NUMBER if added else added
        if outputs >= 8:
            for n in range(0, outputs, 8):
                n = min(n, outputs - 8)
                linear_8_outputs_1_tile(
                    weight + n * inputs * NUMBER, bias + n * NUMBER, x, source_step, y + n * TILE, target_step, inputs,
                    other + n * TILE if added else added
                )
        else:
            for n in range(outputs):
                linear_1_output_1_tile(
                    weight + n * inputs * NUMBER, bias + n * NUMBER, x, source_step, y + n * TILE, target_step, inputs,
                    other + n * TILE if added else added
                )


@inner
def _norm(weight, bias, source, target, size, tiles, eps):
    share = constant(1.0 / size)
    for tile in range(tiles):
        x, y = source + tile * size * TILE, target + tile * size * TILE
        mean, variance = constant(0.0), constant(0.0)
        for i in range(size):
            mean = mean + load(x, i * WIDTH)
        mean = mean * share
        for i in range(size):
            off = load(x, i * WIDTH) - mean
            variance = multiply_add(off, off, variance)
        scale = constant(1.0) / root(multiply_add(variance, share, constant(eps)))
        for i in range(size):
            store(multiply_add((load(x, i * WIDTH) - mean) * scale, spread(weight, i), spread(bias, i)), y, i * WIDTH)


@inner
def _gelu(x):
    """``x (1 + tanh(u)) / 2 = x sigmoid(2 u)``, ``u = sqrt(2 / pi) (x + 0.044715 x^3)``."""
    inner = multiply_add(x * x, constant(-2 * 0.044715 * math.sqrt(2 / math.pi)), constant(-2 * math.sqrt(2 / math.pi)))
    return x / (constant(1.0) + exponential(x * inner))


@inner
def _softmax(at, size, step):
    """Of ``size`` numbers for each of eight rows, ``step`` apart."""
    top, sum = constant(-np.inf), constant(0.0)
    for i in range(size):
        top = larger(top, load(at, i * step))
    for i in range(size):
        power = exponential(load(at, i * step) - top)
        store(power, at, i * step)
        sum = sum + power
    share = constant(1.0) / sum
    for i in range(size):
        store(load(at, i * step) * share, at, i * step)


@inner
def _elementwise(kind, at, size):
    """In place, for ``size`` times eight numbers."""
    for i in range(0, size * WIDTH, WIDTH):
        x = load(at, i)
        if kind == GELU:
            x = _gelu(x)
        elif kind == RELU:
            x = larger(x, constant(0.0))
        elif kind == TANH:
            x = constant(1.0) - constant(2.0) / (constant(1.0) + exponential(x + x))
        elif kind == CLAMPED_EXPONENTIAL:
            x = exponential(smaller(larger(x, constant(-20.0)), constant(2.0)))
        else:
            x = exponential(x)
        store(x, at, i)


@inner
def _run(program, source, scratch, tiles):
    """Where the output of the last operation is, which the run after the next overwrites."""
    at = source
    for operation in program:
        size = operation[OUTPUTS]
        if operation[KIND] == LINEAR:
            target = scratch.right if at == scratch.left else scratch.left
            inputs = operation[INPUTS]
            _linear(
                operation[WEIGHT], operation[BIAS], at, inputs * WIDTH, target, size * WIDTH, inputs, size, tiles, 0
            )
            at = target
        elif operation[KIND] == SIM_NORM:
            group = operation[WEIGHT]
            for i in range(0, size * tiles, group):
                _softmax(at + i * TILE, group, WIDTH)
        else:
            _elementwise(operation[KIND], at, size * tiles)
    return at


# ---- rows to lanes and back ------------------------------------------------------------------------------------------


@inner
def _copy(source, target, size):
    whole = size - size % WIDTH
    for i in range(0, whole, WIDTH):
        store(load(source, i), target, i)
    for i in range(whole, size):
        write(read(source, i), target, i)


@inner
def _subtract(source, other, target, size):
    whole = size - size % WIDTH
    for i in range(0, whole, WIDTH):
        store(load(source, i) - load(other, i), target, i)
    for i in range(whole, size):
        write(read(source, i) - read(other, i), target, i)


@inner
def _gather(table, indices, start, rows, size, target, scratch):
    """Rows ``indices[start:]`` of a table ``[N, size]`` side by side, ``[tiles, size, 8]``."""
    for first in range(0, rows, WIDTH):
        for row in range(first, min(first + WIDTH, rows)):
            _copy(table + indices[start + row] * size * NUMBER, scratch.rows + (row - first) * scratch.step * NUMBER, size)
        for i in range(0, size, WIDTH):
            transpose(scratch.rows + i * NUMBER, scratch.step, target + (first * size + i * WIDTH) * NUMBER, WIDTH)


# ---- attention -------------------------------------------------------------------------------------------------------


@inner
def _rotate(network, scratch, tiles):
    """Queries and keys by the angles of their places."""
    size = network.embed // network.heads
    for tile in range(tiles):
        at, places = scratch.qkv + tile * 3 * network.embed * TILE, scratch.places + tile * size * TILE
        for head in range(2 * network.heads):
            for i in range(0, size * WIDTH, 2 * WIDTH):
                real, imaginary = load(at, i), load(at, i + WIDTH)
                cosine, sine = load(places, i), load(places, i + WIDTH)
                store(real * cosine - imaginary * sine, at, i)
                store(real * sine + imaginary * cosine, at, i + WIDTH)
            at += size * TILE


@inner
def _score(query, key, moved, size):
    whole = size - size % WIDTH
    sum = constant(0.0)
    for i in range(0, whole, WIDTH):
        sum = multiply_add(load(query, i), load(key, i) + load(moved, i), sum)
    score = total(sum)
    for i in range(whole, size):
        score += read(query, i) * (read(key, i) + read(moved, i))
    return score


@inner
def _mix(network, scratch, row, row_in_tile, longest, target, layer, shift, shift_step):
    """The values of a row's tokens by their weights."""
    size = network.embed // network.heads
    whole = size - size % WIDTH
    length = scratch.lengths[row]
    for head in range(network.heads):
        part = (layer * 2 * network.embed + network.embed + head * size) * NUMBER
        scores = scratch.scores + (head * longest * WIDTH + row_in_tile) * NUMBER
        for i in range(0, whole, WIDTH):
            sum = constant(0.0)
            for token in range(length):
                value = load(scratch.tokens[row, token] + part, i) + load(shift + token * shift_step + part, i)
                sum = multiply_add(spread(scores, token * WIDTH), value, sum)
            store(sum, target + head * size * NUMBER, i)
        for i in range(whole, size):
            rest = np.float32(0)
            for token in range(length):
                value = read(scratch.tokens[row, token] + part, i) + read(shift + token * shift_step + part, i)
                rest += read(scores, token * WIDTH) * value
            write(rest, target + head * size * NUMBER, i)


@inner
def _attend(network, layer, shift, shift_step, scratch, tile, rows):
    """Of a tile's tokens over their contexts and themselves; their keys and values go to their pages."""
    embed, heads = network.embed, network.heads
    size = embed // heads
    scale = np.float32(1 / math.sqrt(size))
    lanes, step = scratch.qkv + tile * 3 * embed * TILE, scratch.step
    for i in range(0, 3 * embed, WIDTH):
        transpose(lanes + i * TILE, WIDTH, scratch.rows + i * NUMBER, step)
    longest = 0
    for row in range(rows):
        longest = max(longest, scratch.lengths[tile * WIDTH + row])
    for i in range(heads * longest):
        store(constant(-np.inf), scratch.scores, i * WIDTH)
    part = layer * 2 * embed * NUMBER
    for row in range(rows):
        at, length = scratch.rows + row * step * NUMBER, scratch.lengths[tile * WIDTH + row]
        _subtract(
            at + embed * NUMBER, shift + (length - 1) * shift_step + part,
            scratch.tokens[tile * WIDTH + row, length - 1] + part, 2 * embed
        )
        for token in range(length):
            key, moved = scratch.tokens[tile * WIDTH + row, token] + part, shift + token * shift_step + part
            for head in range(heads):
                offset = head * size * NUMBER
                score = _score(at + offset, key + offset, moved + offset, size) * scale
                write(score, scratch.scores, (head * longest + token) * WIDTH + row)
    for head in range(heads):
        _softmax(scratch.scores + head * longest * TILE, longest, WIDTH)
    for row in range(rows):
        at = scratch.rows + row * step * NUMBER  # in place of the query
        _mix(network, scratch, tile * WIDTH + row, row, longest, at, layer, shift, shift_step)
    for i in range(0, embed, WIDTH):
        transpose(scratch.rows + i * NUMBER, step, scratch.y + (tile * embed + i) * TILE, WIDTH)


@inner
def _token(network, shift, shift_step, scratch, rows):
    """Takes the tokens in ``scratch.x`` through all layers; what they predict from is in ``scratch.y``."""
    embed, tiles = network.embed, (rows + WIDTH - 1) // WIDTH
    step = embed * WIDTH
    for layer in range(len(network.blocks)):
        block = network.blocks[layer]
        _norm(block[NORM1_WEIGHT], block[NORM1_BIAS], scratch.x, scratch.y, embed, tiles, network.eps)
        _linear(block[QUERY_WEIGHT], block[QUERY_BIAS], scratch.y, step, scratch.qkv, 3 * step, embed, embed, tiles, 0)
        _linear(
            block[KEY_WEIGHT], block[KEY_BIAS], scratch.y, step, scratch.qkv + step * NUMBER, 3 * step, embed, embed,
            tiles, 0
        )
        _linear(
            block[VALUE_WEIGHT], block[VALUE_BIAS], scratch.y, step, scratch.qkv + 2 * step * NUMBER, 3 * step, embed,
            embed, tiles, 0
        )
        if network.rotary:
            _rotate(network, scratch, tiles)
        for tile in range(tiles):
            _attend(network, layer, shift, shift_step, scratch, tile, min(WIDTH, rows - tile * WIDTH))
        _linear(
            block[PROJ_WEIGHT], block[PROJ_BIAS], scratch.y, step, scratch.between, step, embed, embed, tiles, scratch.x
        )
        _norm(block[NORM2_WEIGHT], block[NORM2_BIAS], scratch.between, scratch.y, embed, tiles, network.eps)
        wide = network.inner * WIDTH
        _linear(
            block[WIDEN_WEIGHT], block[WIDEN_BIAS], scratch.y, step, scratch.inner, wide, embed, network.inner, tiles, 0
        )
        _elementwise(GELU, scratch.inner, network.inner * tiles)
        _linear(
            block[NARROW_WEIGHT], block[NARROW_BIAS], scratch.inner, wide, scratch.x, step, network.inner, embed, tiles,
            scratch.between
        )
    _norm(network.norm_weight, network.norm_bias, scratch.x, scratch.y, embed, tiles, network.eps)


# ---- a simulation ----------------------------------------------------------------------------------------------------


@inner
def _find_tokens(network, slab, tables, counts, pages, scratch, start, rows):
    """Addresses of all tokens of the rows, the first layer's key: of the contexts, of the action and the observation."""
    half = len(network.blocks) * 2 * network.embed * NUMBER
    for row in range(rows):
        count = counts[start + row]
        for token in range(2 * count + 1):
            slot = token + 1
            page = tables[start + row, slot // 2] if slot // 2 < count else pages[start + row]
            scratch.tokens[row, token] = slab + (2 * page + slot % 2) * half


@inner
def _enter(network, source, places, which, scratch, start, rows):
    """The tokens in ``source``, and where they are."""
    tiles = (rows + WIDTH - 1) // WIDTH
    numbers = tiles * network.embed * WIDTH
    if network.rotary:
        angles = places[which, start:start + rows] % network.rotary
        _gather(network.places, angles, 0, rows, network.embed // network.heads, scratch.places, scratch)
        _copy(source, scratch.x, numbers)
        return
    _gather(network.places, scratch.lengths[:rows] - 1, 0, rows, network.embed, scratch.places, scratch)
    for i in range(0, numbers, WIDTH):
        store(load(source, i) + load(scratch.places, i), scratch.x, i)


@inner
def _embed(network, actions, scratch, start, rows):
    """Where the tokens of the actions are."""
    if network.discrete:
        chosen = actions[start:start + rows, 0].astype(np.int64)
        _gather(network.actions, chosen, 0, rows, network.embed, scratch.y, scratch)
        return scratch.y
    size = actions.shape[1]
    for row in range(rows):
        for i in range(size):
            at = ((row // WIDTH) * size + i) * WIDTH + row % WIDTH
            write(actions[start + row, i], scratch.y, at)
    return _run(network.continuous, scratch.y, scratch, (rows + WIDTH - 1) // WIDTH)


@inner
def _scalars(logits, size, scratch, start, rows, out):
    """The mean of a support, and the inverse of the value rescaling: MuZero (https://arxiv.org/abs/1911.08265),
    appendix F, with epsilon = 0.001."""
    for first in range(0, rows, WIDTH):
        at = logits + first * size * NUMBER
        top, sum, mean = constant(-np.inf), constant(0.0), constant(0.0)
        for i in range(size):
            top = larger(top, load(at, i * WIDTH))
        for i in range(size):
            power = exponential(load(at, i * WIDTH) - top)
            sum = sum + power
            mean = multiply_add(power, splat(np.float32(i - (size - 1) // 2)), mean)
        store(mean / sum, scratch.rows, 0)
        for row in range(first, min(first + WIDTH, rows)):
            value = np.float64(read(scratch.rows, row - first))
            inner = (math.sqrt(abs(value) * 0.004 + 1.004004) - 1) * 500
            out[start + row] = np.sign(value) * (inner * inner - 1)


@inner
def _spread_out(source, size, column, start, rows, out):
    for row in range(rows):
        for i in range(size):
            out[start + row, column + i] = read(source, ((row // WIDTH) * size + i) * WIDTH + row % WIDTH)


@inner
def _simulate_rows(network, shift, slab, tables, counts, pages, actions, places, scratch, start, rows, reward, value,
                   policy):
    tiles = (rows + WIDTH - 1) // WIDTH
    shift_at = shift.ctypes.data
    shift_step = 0 if network.rotary else len(network.blocks) * 2 * network.embed * NUMBER
    _find_tokens(network, slab.ctypes.data, tables, counts, pages, scratch, start, rows)
    for row in range(rows):
        scratch.lengths[row] = 2 * counts[start + row]
    _enter(network, _embed(network, actions, scratch, start, rows), places, 0, scratch, start, rows)
    _token(network, shift_at, shift_step, scratch, rows)
    rewards = _run(network.rewards, scratch.y, scratch, tiles)
    _scalars(rewards, network.rewards[-1, OUTPUTS], scratch, start, rows, reward)
    for row in range(rows):
        scratch.lengths[row] += 1
    _enter(network, _run(network.observations, scratch.y, scratch, tiles), places, 1, scratch, start, rows)
    _token(network, shift_at, shift_step, scratch, rows)
    values = _run(network.value, scratch.y, scratch, tiles)
    _scalars(values, network.value[-1, OUTPUTS], scratch, start, rows, value)
    trunk = _run(network.trunk, scratch.y, scratch, tiles)
    if len(network.trunk):
        _copy(trunk, scratch.y, tiles * network.trunk[-1, OUTPUTS] * WIDTH)
    size = network.first[-1, OUTPUTS]
    _spread_out(_run(network.first, scratch.y, scratch, tiles), size, 0, start, rows, policy)
    if len(network.second):
        _spread_out(_run(network.second, scratch.y, scratch, tiles), size, size, start, rows, policy)


@inner
def simulate(network: Any, shift: Any, slab: Any, tables: Any, counts: Any, pages: Any, actions: Any, places: Any,
             scratch: Any, low: int, high: int, reward: Any, value: Any, policy: Any) -> None:
    """Expands a node in each of the rows ``low`` to ``high - 1``.

    ``shift`` is that of :class:`Weights` ``[T, L, 2, E]``, or zeros ``[L, 2, E]`` with rotary positions; ``slab`` the
    pages as one array; ``tables [B, R]``, ``counts [B]`` the contexts, ``pages [B]`` what is written; ``actions`` in
    float32, ``[B, 1]`` indices or ``[B, A]``; ``places [2, B]`` the rotary positions of the two tokens. Predicts
    ``reward [B]``, ``value [B]`` and ``policy [B, P]``.
    """
    side = TILES * WIDTH
    for start in range(low, high, side):
        _simulate_rows(
            network, shift, slab, tables, counts, pages, actions, places, scratch, start, min(side, high - start),
            reward, value, policy
        )


simulate_once = entry(simulate.py_func)
"""The same, called from Python."""
