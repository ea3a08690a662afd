"""Layers of a model as compiled functions, and the memory that they work in. Importing it imports numba.

A tile is eight rows side by side: activations are ``[tiles, numbers, 8]``, and one row cannot affect another. Arguments
that stand for memory are addresses.
"""
import math
from typing import Any, NamedTuple

import numpy as np

from .compiling import ZERO, inner
from .lanes import (
    NUMBER,
    WIDTH,
    constant,
    exponential,
    larger,
    linear_1_output,
    linear_6_outputs,
    load,
    multiply_add,
    read,
    root,
    smaller,
    spread,
    store,
    transpose,
    write,
)
from .program import (
    BIAS,
    CLAMPED_EXPONENTIAL,
    GELU,
    INPUTS,
    KIND,
    LAYER_NORM,
    LINEAR,
    OUTPUTS,
    RELU,
    ROWS,
    SCALE,
    SIM_NORM,
    STANDARDIZE,
    TANH,
    WEIGHT,
    Network,
)
from .team import FINISHED, JOB, POSTED, WORKERS, await_count, count_up, new_team

TILE = WIDTH * NUMBER


class Scratch(NamedTuple):
    """Working memory of one thread."""
    memory: np.ndarray
    tokens: np.ndarray  # [rows, tokens]: the address of each of a row's tokens in the pages
    lengths: np.ndarray  # [rows]: how many tokens a row attends to, the newest included
    chosen: np.ndarray  # [rows]: indices for :func:`gather`
    x: int  # from here on addresses; this one: activations between two blocks, [tiles, E, 8]
    between: int
    y: int
    qkv: int  # [tiles, 3E, 8]
    hidden: int  # [tiles, widths of MLPs, 8]
    left: int  # operations of a program read one of left and right and write the other
    right: int
    encodings: int
    rows: int  # [8, step]: a tile's numbers row by row
    step: int
    scores: int  # [tokens, 8]
    ends: int  # [8]: the lengths of a tile's rows
    team: np.ndarray  # of the threads that compute products together; empty where one computes alone

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes


def new_scratch(network: Network, context_pages: int) -> Scratch:
    """Memory for steps over tables of ``context_pages`` pages."""
    embed, tokens = network.embed, 2 * context_pages + 3
    step = _whole(max(3 * embed, network.widest))
    widest = max(network.widest, embed)
    sizes = dict(
        x=embed * ROWS, between=embed * ROWS, y=widest * ROWS, qkv=3 * embed * ROWS, hidden=network.mlp_width * ROWS,
        left=widest * ROWS, right=widest * ROWS, encodings=embed * ROWS, rows=step * WIDTH,
        scores=tokens * WIDTH, ends=WIDTH
    )
    sizes = {name: _whole(size) + WIDTH * WIDTH for name, size in sizes.items()}  # transposes write whole blocks
    memory = np.zeros(sum(sizes.values()) + 16, dtype=np.float32)
    address = -(-memory.ctypes.data // 64) * 64
    addresses = {}
    for name, size in sizes.items():
        addresses[name] = address
        address += size * NUMBER
    lengths, chosen = np.zeros((2, ROWS), dtype=np.int64)
    table = np.zeros((ROWS, tokens), dtype=np.int64)
    return Scratch(memory, table, lengths, chosen, step=step, team=new_team(1), **addresses)


def _whole(size: int) -> int:
    """Rounded up to a cache line of 16 numbers."""
    return -(-size // 16) * 16


# ---- layers ----------------------------------------------------------------------------------------------------------


@inner
def _columns(weight: int, bias: int, source: int, target: int, target_step: int, inputs: int, begin: int, end: int,
             tiles: int, added: int) -> None:
    """Outputs ``begin`` to ``end - 1`` of a linear layer; see :func:`linear`."""
    block = 6 if end - begin >= 6 else 1
    for n in range(begin, end, block):
        n = min(n, end - block)  # the last block overlaps the one before, and computes some columns twice
        row, weights = bias + n * NUMBER, weight + n * inputs * NUMBER
        for tile in range(tiles):
            x, y = source + tile * inputs * TILE, (tile * target_step + n * WIDTH) * NUMBER
            other = added + y if added else added
            following = weights + block * inputs * NUMBER if tile == 0 else weights  # the first tile fetches them
            if block == 1:
                linear_1_output(weights, following, row, x, target + y, inputs, other)
            else:
                linear_6_outputs(weights, following, row, x, target + y, inputs, other)


@inner
def _share(team: np.ndarray, worker: int) -> None:
    """Compute one worker's columns of the product that was posted."""
    job = team[JOB:]
    outputs = job[6]
    part = -(-outputs // (team[WORKERS] * 6)) * 6  # whole blocks
    begin, end = min(part * worker, outputs), min(part * (worker + 1), outputs)
    _columns(job[0], job[1], job[2], job[3], job[4], job[5], begin, end, job[7], job[8])
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
def linear(weight: int, bias: int, source: int, target: int, target_step: int, inputs: int, outputs: int, tiles: int,
           added: int, team: np.ndarray) -> None:
    """``target = weight source + bias``, ``+ added`` unless that is 0; ``target_step`` numbers from tile to tile."""
    if len(team) == 0:
        _columns(weight, bias, source, target, target_step, inputs, ZERO, outputs, tiles, added)
        return
    job = team[JOB:]
    job[0], job[1], job[2], job[3], job[4] = weight, bias, source, target, target_step
    job[5], job[6], job[7], job[8] = inputs, outputs, tiles, added
    finished = team[FINISHED] + team[WORKERS]
    count_up(team, POSTED)
    _share(team, ZERO)
    await_count(team, FINISHED, finished)


@inner
def norm(weight: int, bias: int, source: int, target: int, size: int, tiles: int, eps: float) -> None:
    """LayerNorm."""
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
    """Subtract running means and divide by running deviations, in place: the first half of a BatchNorm."""
    for i in range(size):
        middle, scale = spread(mean, i), constant(1.0) / root(spread(variance, i) + constant(eps))
        for tile in range(tiles):
            place = (tile * size + i) * WIDTH
            store((load(at, place) - middle) * scale, at, place)


@inner
def _scale(weight: int, bias: int, at: int, size: int, tiles: int) -> None:
    """Multiply by weights and add biases, in place: the second half of a BatchNorm."""
    for i in range(size):
        factor, added = spread(weight, i), spread(bias, i)
        for tile in range(tiles):
            place = (tile * size + i) * WIDTH
            store(multiply_add(load(at, place), factor, added), at, place)


@inner
def _gelu(x: Any) -> Any:
    """``x (1 + tanh(u)) / 2 = x sigmoid(2 u)``, ``u = sqrt(2 / pi) (x + 0.044715 x^3)``."""
    slope = multiply_add(x * x, constant(-2 * 0.044715 * math.sqrt(2 / math.pi)), constant(-2 * math.sqrt(2 / math.pi)))
    return x / (constant(1.0) + exponential(x * slope))


@inner
def softmax(at: int, size: int) -> None:
    """Over ``size`` numbers of each of eight rows, in place."""
    top, sum = constant(-np.inf), constant(0.0)
    for i in range(size):
        top = larger(top, load(at, i * WIDTH))
    for i in range(size):
        power = exponential(load(at, i * WIDTH) - top)
        store(power, at, i * WIDTH)
        sum = sum + power
    share = constant(1.0) / sum
    for i in range(size):
        store(load(at, i * WIDTH) * share, at, i * WIDTH)


@inner
def elementwise(kind: int, at: int, size: int) -> None:
    """Apply an activation to ``size`` times eight numbers, in place."""
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
def run(program: np.ndarray, source: int, scratch: Scratch, tiles: int, eps: float) -> int:
    """Run the operations of a program. Returns the address of the output; the run after the next one overwrites it."""
    at = source
    for operation in program:
        size = operation[OUTPUTS]
        target = scratch.right if at == scratch.left else scratch.left
        if operation[KIND] == LINEAR:
            inputs = operation[INPUTS]
            linear(
                operation[WEIGHT], operation[BIAS], at, target, size * WIDTH, inputs, size, tiles, ZERO, scratch.team
            )
            at = target
        elif operation[KIND] == LAYER_NORM:
            norm(operation[WEIGHT], operation[BIAS], at, target, size, tiles, eps)
            at = target
        elif operation[KIND] == SIM_NORM:
            group = operation[WEIGHT]
            for i in range(0, size * tiles, group):
                softmax(at + i * TILE, group)
        elif operation[KIND] == STANDARDIZE:
            _standardize(operation[WEIGHT], operation[BIAS], at, size, tiles, eps)
        elif operation[KIND] == SCALE:
            _scale(operation[WEIGHT], operation[BIAS], at, size, tiles)
        else:
            elementwise(operation[KIND], at, size * tiles)
    return at


# ---- rows to lanes and back ------------------------------------------------------------------------------------------


@inner
def copy(source: int, target: int, size: int) -> None:
    whole = size - size % WIDTH
    for i in range(0, whole, WIDTH):
        store(load(source, i), target, i)
    for i in range(whole, size):
        write(read(source, i), target, i)


@inner
def subtract(source: int, other: int, target: int, size: int) -> None:
    whole = size - size % WIDTH
    for i in range(0, whole, WIDTH):
        store(load(source, i) - load(other, i), target, i)
    for i in range(whole, size):
        write(read(source, i) - read(other, i), target, i)


@inner
def gather(table: int, size: int, target: int, scratch: Scratch, rows: int) -> None:
    """Rows ``scratch.chosen`` of a table ``[N, size]``, side by side."""
    for first in range(0, rows, WIDTH):
        for row in range(first, min(first + WIDTH, rows)):
            copy(
                table + scratch.chosen[row] * size * NUMBER, scratch.rows + (row - first) * scratch.step * NUMBER, size
            )
        for i in range(0, size, WIDTH):
            transpose(scratch.rows + i * NUMBER, scratch.step, target + (first * size + i * WIDTH) * NUMBER, WIDTH)
