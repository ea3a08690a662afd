"""Steps of the model on the CPU as compiled functions: what :meth:`Engine.step`, :meth:`Engine.for_search` and
:meth:`Engine.begin` do, with pages read and written where they are. Importing it imports numba.

Rows stand side by side: numbers of ``tiles`` times eight rows are ``[tiles, numbers, 8]``, so that one row cannot touch
another. Attention alone goes row by row, since pages do. Places in memory are addresses.
"""
import math
from typing import Any, NamedTuple

import numpy as np

from ..cache.pages import NULL_PAGE
from .compiling import inner
from .lanes import (
    NUMBER,
    WIDTH,
    constant,
    exponential,
    larger,
    linear_1_output,
    linear_6_outputs,
    load,
    mix,
    multiply_add,
    read,
    root,
    score,
    smaller,
    splat,
    spread,
    store,
    transpose,
    where_less,
    write,
)
from .program import (
    BIAS,
    CLAMPED_EXPONENTIAL,
    GELU,
    INPUTS,
    KEY_BIAS,
    KEY_WEIGHT,
    KIND,
    LAYER_NORM,
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
    SCALE,
    SIM_NORM,
    STANDARDIZE,
    TANH,
    VALUE_BIAS,
    VALUE_WEIGHT,
    WEIGHT,
    WIDEN_BIAS,
    WIDEN_WEIGHT,
    Network,
)
from .team import FINISHED, JOB, POSTED, WORKERS, await_count, count_up, new_team

TILES = 8
"""Tiles that are worked on together: what they need fits into a core's own cache, and weights are read once for all."""

TILE = WIDTH * NUMBER


class Scratch(NamedTuple):
    memory: np.ndarray
    tokens: np.ndarray  # [rows, tokens]: addresses of what the pages hold of a row's tokens
    lengths: np.ndarray  # [rows]: tokens, the one that is asked about included
    chosen: np.ndarray  # [rows]: what is gathered from a table
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
    scores: int  # [tokens, 8]
    ends: int  # [8]: the lengths of a tile's rows
    team: np.ndarray  # of the threads that share out this one's products
    nothing: int = 0

    @property
    def bytes(self) -> int:
        return self.memory.nbytes


def new_scratch(network: Network, width: int) -> Scratch:
    """Memory for one thread that simulates over tables of ``width`` pages."""
    embed, tokens = network.embed, 2 * width + 3
    step = _whole(max(3 * embed, network.widest))
    side = TILES * WIDTH
    widest = max(network.widest, embed)
    sizes = dict(
        x=embed * side, between=embed * side, y=widest * side, qkv=3 * embed * side, inner=network.inner * side,
        left=widest * side, right=widest * side, places=embed * side, rows=step * WIDTH,
        scores=tokens * WIDTH, ends=WIDTH
    )
    sizes = {name: _whole(size) + WIDTH * WIDTH for name, size in sizes.items()}  # transposes write whole blocks
    memory = np.zeros(sum(sizes.values()) + 16, dtype=np.float32)
    address = -(-memory.ctypes.data // 64) * 64
    addresses = {}
    for name, size in sizes.items():
        addresses[name] = address
        address += size * NUMBER
    lengths, chosen = np.zeros((2, side), dtype=np.int64)
    table = np.zeros((side, tokens), dtype=np.int64)
    return Scratch(memory, table, lengths, chosen, step=step, team=new_team(1), **addresses)


def _whole(size: int) -> int:
    """To the next line of memory."""
    return -(-size // 16) * 16


# ---- layers ----------------------------------------------------------------------------------------------------------


@inner
def _columns(weight: int, bias: int, source: int, source_step: int, target: int, target_step: int, inputs: int,
             begin: int, end: int, tiles: int, added: int) -> None:
    """Outputs ``begin`` to ``end - 1`` of a linear layer."""
    block = 6 if end - begin >= 6 else 1
    for n in range(begin, end, block):
        n = min(n, end - block)  # the last ones are computed twice
        row, weights = bias + n * NUMBER, weight + n * inputs * NUMBER
        for tile in range(tiles):
            x, y = source + tile * source_step * NUMBER, (tile * target_step + n * WIDTH) * NUMBER
            other = added + y if added else added
            if block == 1:
                linear_1_output(weights, row, x, target + y, inputs, other)
            else:
                linear_6_outputs(weights, row, x, target + y, inputs, other)


@inner
def _share(team: np.ndarray, worker: int) -> None:
    """One worker's columns of the product that was posted."""
    job = team[JOB:]
    outputs = job[7]
    part = -(-outputs // (team[WORKERS] * 6)) * 6  # whole blocks
    begin, end = min(part * worker, outputs), min(part * (worker + 1), outputs)
    _columns(job[0], job[1], job[2], job[3], job[4], job[5], job[6], begin, end, job[8], job[9])
    count_up(team, FINISHED)


@inner
def help_out(team: np.ndarray, worker: int) -> None:
    """Compute the columns of worker ``worker``, from 1 on, of all products until the team is dismissed."""
    posted = 0
    while True:
        posted += 1
        if await_count(team, POSTED, posted) > posted:
            return
        _share(team, worker)


@inner
def _linear(weight: int, bias: int, source: int, source_step: int, target: int, target_step: int, inputs: int,
            outputs: int, tiles: int, added: int, team: np.ndarray) -> None:
    """``target = weight source + bias``, and ``+ added``; steps lead from a tile to the next, in numbers."""
    first = outputs - outputs  # a literal is compiled anew
    if len(team) == 0:
        _columns(weight, bias, source, source_step, target, target_step, inputs, first, outputs, tiles, added)
        return
    job = team[JOB:]
    job[0], job[1], job[2], job[3], job[4] = weight, bias, source, source_step, target
    job[5], job[6], job[7], job[8], job[9] = target_step, inputs, outputs, tiles, added
    finished = team[FINISHED] + team[WORKERS]
    count_up(team, POSTED)
    _share(team, first)
    await_count(team, FINISHED, finished)


@inner
def _norm(weight: int, bias: int, source: int, target: int, size: int, tiles: int, eps: float) -> None:
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
def _standardize(mean: int, variance: int, at: int, size: int, tiles: int, eps: float) -> None:
    """In place, by numbers that training has gathered."""
    for i in range(size):
        middle, scale = spread(mean, i), constant(1.0) / root(spread(variance, i) + constant(eps))
        for tile in range(tiles):
            place = (tile * size + i) * WIDTH
            store((load(at, place) - middle) * scale, at, place)


@inner
def _scale(weight: int, bias: int, at: int, size: int, tiles: int) -> None:
    """In place, each column by numbers of its own."""
    for i in range(size):
        factor, added = spread(weight, i), spread(bias, i)
        for tile in range(tiles):
            place = (tile * size + i) * WIDTH
            store(multiply_add(load(at, place), factor, added), at, place)


@inner
def _gelu(x: Any) -> Any:
    """``x (1 + tanh(u)) / 2 = x sigmoid(2 u)``, ``u = sqrt(2 / pi) (x + 0.044715 x^3)``."""
    inner = multiply_add(x * x, constant(-2 * 0.044715 * math.sqrt(2 / math.pi)), constant(-2 * math.sqrt(2 / math.pi)))
    return x / (constant(1.0) + exponential(x * inner))


@inner
def _softmax(at: int, size: int, step: int) -> None:
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
def _elementwise(kind: int, at: int, size: int) -> None:
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
def _run(program: np.ndarray, source: int, scratch: Scratch, tiles: int, eps: float) -> int:
    """Where the output of the last operation is, which the run after the next overwrites."""
    at = source
    for operation in program:
        size = operation[OUTPUTS]
        target = scratch.right if at == scratch.left else scratch.left
        if operation[KIND] == LINEAR:
            inputs = operation[INPUTS]
            _linear(
                operation[WEIGHT], operation[BIAS], at, inputs * WIDTH, target, size * WIDTH, inputs, size, tiles,
                scratch.nothing, scratch.team
            )
            at = target
        elif operation[KIND] == LAYER_NORM:
            _norm(operation[WEIGHT], operation[BIAS], at, target, size, tiles, eps)
            at = target
        elif operation[KIND] == SIM_NORM:
            group = operation[WEIGHT]
            for i in range(0, size * tiles, group):
                _softmax(at + i * TILE, group, WIDTH)
        elif operation[KIND] == STANDARDIZE:
            _standardize(operation[WEIGHT], operation[BIAS], at, size, tiles, eps)
        elif operation[KIND] == SCALE:
            _scale(operation[WEIGHT], operation[BIAS], at, size, tiles)
        else:
            _elementwise(operation[KIND], at, size * tiles)
    return at


# ---- rows to lanes and back ------------------------------------------------------------------------------------------


@inner
def _copy(source: int, target: int, size: int) -> None:
    whole = size - size % WIDTH
    for i in range(0, whole, WIDTH):
        store(load(source, i), target, i)
    for i in range(whole, size):
        write(read(source, i), target, i)


@inner
def _subtract(source: int, other: int, target: int, size: int) -> None:
    whole = size - size % WIDTH
    for i in range(0, whole, WIDTH):
        store(load(source, i) - load(other, i), target, i)
    for i in range(whole, size):
        write(read(source, i) - read(other, i), target, i)


@inner
def _gather(table: int, size: int, target: int, scratch: Scratch, rows: int) -> None:
    """The rows of a table ``[N, size]`` that are chosen, side by side."""
    for first in range(0, rows, WIDTH):
        for row in range(first, min(first + WIDTH, rows)):
            _copy(
                table + scratch.chosen[row] * size * NUMBER, scratch.rows + (row - first) * scratch.step * NUMBER, size
            )
        for i in range(0, size, WIDTH):
            transpose(scratch.rows + i * NUMBER, scratch.step, target + (first * size + i * WIDTH) * NUMBER, WIDTH)


# ---- attention -------------------------------------------------------------------------------------------------------


@inner
def _rotate(network: Network, scratch: Scratch, tiles: int) -> None:
    """Queries and keys by the angles of their places."""
    size = network.embed // network.heads
    for tile in range(tiles):
        at, places = scratch.qkv + tile * 3 * network.embed * TILE, scratch.places + tile * size * TILE
        for _ in range(2 * network.heads):
            for i in range(0, size * WIDTH, 2 * WIDTH):
                real, imaginary = load(at, i), load(at, i + WIDTH)
                cosine, sine = load(places, i), load(places, i + WIDTH)
                store(real * cosine - imaginary * sine, at, i)
                store(real * sine + imaginary * cosine, at, i + WIDTH)
            at += size * TILE


@inner
def _mix_rest(weights: int, tokens: np.ndarray, count: int, part: int, moved: int, moved_step: int, begin: int,
              end: int, target: int) -> None:
    """What is left of a head whose size is no multiple of eight, number by number."""
    for row in range(WIDTH):
        for i in range(begin, end):
            sum = np.float32(0)
            for token in range(count):
                value = read(tokens[row, token] + part, i) + read(moved + token * moved_step, i)
                sum += read(weights, token * WIDTH + row) * value
            write(sum, target, i * WIDTH + row)


@inner
def _keep(network: Network, layer: int, shift: int, shift_step: int, scratch: Scratch, tile: int, rows: int) -> None:
    """A tile's keys and values in their pages, without what learned positions add to them; queries in ``scratch.rows``.
    """
    embed, step = network.embed, scratch.step
    lanes, part = scratch.qkv + tile * 3 * embed * TILE, layer * 2 * embed * NUMBER
    for i in range(0, 3 * embed, WIDTH):
        transpose(lanes + i * TILE, WIDTH, scratch.rows + i * NUMBER, step)
    for row in range(rows):
        last = scratch.lengths[tile * WIDTH + row] - 1
        _subtract(
            scratch.rows + (row * step + embed) * NUMBER, shift + last * shift_step + part,
            scratch.tokens[tile * WIDTH + row, last] + part, 2 * embed
        )


@inner
def _attend(network: Network, layer: int, shift: int, shift_step: int, scratch: Scratch, tile: int, rows: int) -> None:
    """Of a tile's tokens over their contexts and themselves."""
    _keep(network, layer, shift, shift_step, scratch, tile, rows)
    embed, first = network.embed, tile * WIDTH
    size = embed // network.heads
    whole = size - size % WIDTH
    scale = splat(np.float32(1 / math.sqrt(size)))
    table, width = scratch.tokens[first:first + WIDTH], scratch.tokens.shape[1]
    tokens = table.ctypes.data
    longest = scratch.lengths[first]
    for row in range(WIDTH):
        longest = max(longest, scratch.lengths[first + row])
        write(np.float32(scratch.lengths[first + row]), scratch.ends, row)
    for head in range(network.heads):
        part = (layer * 2 * embed + head * size) * NUMBER
        queries = scratch.rows + head * size * NUMBER
        for token in range(longest):
            x = score(queries, scratch.step, tokens, width, token, part, shift + token * shift_step + part, size)
            x = where_less(splat(np.float32(token)), load(scratch.ends, 0), x * scale, constant(-np.inf))
            store(x, scratch.scores, token * WIDTH)
        _softmax(scratch.scores, longest, WIDTH)
        part += embed * NUMBER
        target = scratch.y + (tile * embed + head * size) * TILE
        for i in range(0, whole, WIDTH):
            at = part + i * NUMBER
            mix(scratch.scores, tokens, width, longest, at, shift + at, shift_step, target + i * TILE)
        if whole < size:
            _mix_rest(scratch.scores, table, longest, part, shift + part, shift_step, whole, size, target)


@inner
def _token(network: Network, shift: int, shift_step: int, scratch: Scratch, rows: int, predicts: bool) -> None:
    """Takes the tokens in ``scratch.x`` through all layers, for their keys and values; what they predict from comes to
    be in ``scratch.y``, if they predict."""
    embed, tiles, nothing, team = network.embed, (rows + WIDTH - 1) // WIDTH, scratch.nothing, scratch.team
    step = embed * WIDTH
    for layer in range(len(network.blocks)):
        block = network.blocks[layer]
        _norm(block[NORM1_WEIGHT], block[NORM1_BIAS], scratch.x, scratch.y, embed, tiles, network.eps)
        _linear(block[QUERY_WEIGHT], block[QUERY_BIAS], scratch.y, step, scratch.qkv, 3 * step, embed, embed, tiles,
                nothing, team)
        _linear(
            block[KEY_WEIGHT], block[KEY_BIAS], scratch.y, step, scratch.qkv + step * NUMBER, 3 * step, embed, embed,
            tiles, nothing, team
        )
        _linear(
            block[VALUE_WEIGHT], block[VALUE_BIAS], scratch.y, step, scratch.qkv + 2 * step * NUMBER, 3 * step, embed,
            embed, tiles, nothing, team
        )
        if network.rotary:
            _rotate(network, scratch, tiles)
        if layer == len(network.blocks) - 1 and not predicts:
            for tile in range(tiles):
                _keep(network, layer, shift, shift_step, scratch, tile, min(WIDTH, rows - tile * WIDTH))
            return
        for tile in range(tiles):
            _attend(network, layer, shift, shift_step, scratch, tile, min(WIDTH, rows - tile * WIDTH))
        _linear(
            block[PROJ_WEIGHT], block[PROJ_BIAS], scratch.y, step, scratch.between, step, embed, embed, tiles,
            scratch.x, team
        )
        _norm(block[NORM2_WEIGHT], block[NORM2_BIAS], scratch.between, scratch.y, embed, tiles, network.eps)
        wide = network.inner * WIDTH
        _linear(
            block[WIDEN_WEIGHT], block[WIDEN_BIAS], scratch.y, step, scratch.inner, wide, embed, network.inner, tiles,
            nothing, team
        )
        _elementwise(GELU, scratch.inner, network.inner * tiles)
        _linear(
            block[NARROW_WEIGHT], block[NARROW_BIAS], scratch.inner, wide, scratch.x, step, network.inner, embed, tiles,
            scratch.between, team
        )
    _norm(network.norm_weight, network.norm_bias, scratch.x, scratch.y, embed, tiles, network.eps)


# ---- a simulation ----------------------------------------------------------------------------------------------------


@inner
def _find_tokens(network: Network, slab: int, tables: np.ndarray, counts: np.ndarray, pages: np.ndarray,
                 scratch: Scratch, start: int, rows: int) -> None:
    """Addresses of the rows' tokens, the first layer's key: of the contexts, and of the token that follows on each, an
    observation where there is no context. All others are the null page's, which is zeros: what a new page held before
    may be no numbers, and no mask hides that."""
    half = len(network.blocks) * 2 * network.embed * NUMBER
    for row in range((rows + WIDTH - 1) // WIDTH * WIDTH):
        count = counts[start + row] if row < rows else -1
        scratch.lengths[row] = max(2 * count, 1)
        for token in range(scratch.tokens.shape[1]):
            slot = token + 1
            page = tables[start + row, slot // 2] if slot // 2 < count else NULL_PAGE
            if row < rows and token == scratch.lengths[row] - 1:
                page = pages[start + row]
            scratch.tokens[row, token] = slab + (2 * page + slot % 2) * half


@inner
def _find_observations(network: Network, slab: int, counts: np.ndarray, pages: np.ndarray, scratch: Scratch, start: int,
                       rows: int) -> None:
    """Go on to the observations that follow on the actions."""
    half = len(network.blocks) * 2 * network.embed * NUMBER
    for row in range(rows):
        token = 2 * counts[start + row]
        scratch.lengths[row] = token + 1
        scratch.tokens[row, token] = slab + (2 * pages[start + row] + 1) * half


@inner
def _enter(network: Network, source: int, places: np.ndarray, scratch: Scratch, start: int, rows: int) -> None:
    """The tokens in ``source``, and where they are."""
    numbers = (rows + WIDTH - 1) // WIDTH * network.embed * WIDTH
    for row in range(rows):
        scratch.chosen[row] = places[start + row] % network.rotary if network.rotary else scratch.lengths[row] - 1
    if network.rotary:
        _gather(network.places, network.embed // network.heads, scratch.places, scratch, rows)
        _copy(source, scratch.x, numbers)
        return
    _gather(network.places, network.embed, scratch.places, scratch, rows)
    for i in range(0, numbers, WIDTH):
        store(load(source, i) + load(scratch.places, i), scratch.x, i)


@inner
def _embed(network: Network, actions: np.ndarray, scratch: Scratch, start: int, rows: int) -> int:
    """Where the tokens of the actions are."""
    if network.discrete:
        for row in range(rows):
            scratch.chosen[row] = actions[start + row, 0]
        _gather(network.actions, network.embed, scratch.y, scratch, rows)
        return scratch.y
    size = actions.shape[1]
    for row in range(rows):
        for i in range(size):
            at = ((row // WIDTH) * size + i) * WIDTH + row % WIDTH
            write(actions[start + row, i], scratch.y, at)
    return _run(network.continuous, scratch.y, scratch, (rows + WIDTH - 1) // WIDTH, network.eps)


@inner
def _scalars(logits: int, size: int, scratch: Scratch, start: int, rows: int, out: np.ndarray) -> None:
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
def _spread_out(source: int, begin: int, end: int, start: int, rows: int, out: np.ndarray) -> None:
    size = end - begin
    for row in range(rows):
        for i in range(size):
            out[start + row, begin + i] = read(source, ((row // WIDTH) * size + i) * WIDTH + row % WIDTH)


@inner
def _policy(network: Network, scratch: Scratch, tiles: int, start: int, rows: int, policy: np.ndarray) -> None:
    """What is predicted from ``scratch.y``, which does not stay."""
    trunk = _run(network.trunk, scratch.y, scratch, tiles, network.eps)
    if len(network.trunk):
        _copy(trunk, scratch.y, tiles * network.trunk[-1, OUTPUTS] * WIDTH)
    size = network.first[-1, OUTPUTS]
    _spread_out(_run(network.first, scratch.y, scratch, tiles, network.eps), size - size, size, start, rows, policy)
    if len(network.second):
        sigma = _run(network.second, scratch.y, scratch, tiles, network.eps)
        _spread_out(sigma, size, network.policy, start, rows, policy)


@inner
def _simulate_rows(network: Network, shift: np.ndarray, slab: np.ndarray, tables: np.ndarray, counts: np.ndarray,
                   pages: np.ndarray, actions: np.ndarray, places: np.ndarray, scratch: Scratch, start: int, rows: int,
                   reward: np.ndarray, value: np.ndarray, policy: np.ndarray, latent: np.ndarray) -> None:
    tiles = (rows + WIDTH - 1) // WIDTH
    shift_at = shift.ctypes.data
    shift_step = 0 if network.rotary else len(network.blocks) * 2 * network.embed * NUMBER
    _find_tokens(network, slab.ctypes.data, tables, counts, pages, scratch, start, rows)
    _enter(network, _embed(network, actions, scratch, start, rows), places[0], scratch, start, rows)
    _token(network, shift_at, shift_step, scratch, rows, True)
    rewards = _run(network.rewards, scratch.y, scratch, tiles, network.eps)
    _scalars(rewards, network.rewards[-1, OUTPUTS], scratch, start, rows, reward)
    _find_observations(network, slab.ctypes.data, counts, pages, scratch, start, rows)
    observed = _run(network.observations, scratch.y, scratch, tiles, network.eps)
    if len(latent):
        _spread_out(observed, tiles - tiles, network.embed, start, rows, latent)
    _enter(network, observed, places[1], scratch, start, rows)
    _token(network, shift_at, shift_step, scratch, rows, True)
    values = _run(network.value, scratch.y, scratch, tiles, network.eps)
    _scalars(values, network.value[-1, OUTPUTS], scratch, start, rows, value)
    _policy(network, scratch, tiles, start, rows, policy)


@inner
def simulate(network: Network, shift: np.ndarray, slab: np.ndarray, tables: np.ndarray, counts: np.ndarray,
             pages: np.ndarray, actions: np.ndarray, places: np.ndarray, scratch: Scratch, low: int, high: int,
             reward: np.ndarray, value: np.ndarray, policy: np.ndarray, latent: np.ndarray) -> None:
    """Expands a node in each of the rows ``low`` to ``high - 1``.

    ``shift`` is that of :class:`Weights` ``[T, L, 2, E]``, or zeros ``[L, 2, E]`` with rotary positions; ``slab`` the
    pages as one array; ``tables [B, R]``, ``counts [B]`` the contexts, ``pages [B]`` what is written; ``actions`` in
    float32, ``[B, 1]`` indices or ``[B, A]``; ``places [2, B]`` the rotary positions of the two tokens. Predicts
    ``reward [B]``, ``value [B]``, ``policy [B, P]`` and, unless it is empty, ``latent [B, E]``.
    """
    side = TILES * WIDTH
    for start in range(low, high, side):
        _simulate_rows(
            network, shift, slab, tables, counts, pages, actions, places, scratch, start, min(side, high - start),
            reward, value, policy, latent
        )


@inner
def begin_contexts(network: Network, shift: np.ndarray, slab: np.ndarray, tables: np.ndarray,
                   counts: np.ndarray, pages: np.ndarray, places: np.ndarray, scratch: Scratch, low: int, high: int,
                   latent: np.ndarray) -> None:
    """Starts contexts that hold the observations ``latent [B, E]`` alone, in ``pages [B]``, at rotary positions
    ``places [B]``; ``counts [B]`` are zeros."""
    side = TILES * WIDTH
    shift_step = 0 if network.rotary else len(network.blocks) * 2 * network.embed * NUMBER
    for start in range(low, high, side):
        rows = min(side, high - start)
        _find_tokens(network, slab.ctypes.data, tables, counts, pages, scratch, start, rows)
        for row in range(rows):
            scratch.chosen[row] = start + row
        _gather(latent.ctypes.data, network.embed, scratch.y, scratch, rows)
        _enter(network, scratch.y, places, scratch, start, rows)
        _token(network, shift.ctypes.data, shift_step, scratch, rows, False)


# ---- roots -----------------------------------------------------------------------------------------------------------


@inner
def _observe(network: Network, observations: np.ndarray, latent: np.ndarray, scratch: Scratch, start: int,
             rows: int) -> int:
    """Where the observations' tokens are."""
    tiles = (rows + WIDTH - 1) // WIDTH
    for row in range(rows):
        scratch.chosen[row] = start + row
    if not len(observations):
        _gather(latent.ctypes.data, network.embed, scratch.y, scratch, rows)
        return scratch.y
    _gather(observations.ctypes.data, observations.shape[1], scratch.y, scratch, rows)
    observed = _run(network.encoder, scratch.y, scratch, tiles, network.eps)
    _spread_out(observed, tiles - tiles, network.embed, start, rows, latent)
    return observed


@inner
def _observe_rows(network: Network, shift: int, slab: int, tables: np.ndarray, counts: np.ndarray, pages: np.ndarray,
                  actions: np.ndarray, places: np.ndarray, observations: np.ndarray, scratch: Scratch, start: int,
                  rows: int, sequence: np.ndarray, latent: np.ndarray, value: np.ndarray, policy: np.ndarray) -> None:
    tiles = (rows + WIDTH - 1) // WIDTH
    shift_step = 0 if network.rotary else len(network.blocks) * 2 * network.embed * NUMBER
    _find_tokens(network, slab, tables, counts, pages, scratch, start, rows)
    if counts[start:start + rows].any():  # what it writes where an episode begins, the observation overwrites
        _enter(network, _embed(network, actions, scratch, start, rows), places[0], scratch, start, rows)
        _token(network, shift, shift_step, scratch, rows, False)
    _find_observations(network, slab, counts, pages, scratch, start, rows)
    _enter(network, _observe(network, observations, latent, scratch, start, rows), places[1], scratch, start, rows)
    _token(network, shift, shift_step, scratch, rows, True)
    first = tiles - tiles
    _spread_out(scratch.y, first, network.embed, start, rows, sequence)
    values = _run(network.value, scratch.y, scratch, tiles, network.eps)
    _spread_out(values, first, network.value[-1, OUTPUTS], start, rows, value)
    _policy(network, scratch, tiles, start, rows, policy)


@inner
def observe_roots(network: Network, shift: np.ndarray, slab: np.ndarray, tables: np.ndarray, counts: np.ndarray,
                  pages: np.ndarray, actions: np.ndarray, places: np.ndarray, observations: np.ndarray,
                  scratch: Scratch, low: int, high: int, sequence: np.ndarray, latent: np.ndarray, value: np.ndarray,
                  policy: np.ndarray) -> None:
    """What follows on contexts, as :func:`simulate` takes them: an action, and an observation that is given. Where a
    count is 0, an episode begins, and the action is not looked at.

    ``observations [B, O]`` are encoded into ``latent [B, E]``; if they are empty, it is ``latent`` that is given.
    Predicts what heads predict from, ``sequence [B, E]``, and the logits ``value [B, S]`` and ``policy [B, P]``.
    """
    side = TILES * WIDTH
    for start in range(low, high, side):
        _observe_rows(
            network, shift.ctypes.data, slab.ctypes.data, tables, counts, pages, actions, places, observations, scratch,
            start, min(side, high - start), sequence, latent, value, policy
        )
