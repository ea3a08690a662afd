"""The model's steps on the CPU as compiled functions: the same as :meth:`Engine.step`, :meth:`Engine.for_search` and
:meth:`Engine.begin`, but pages are read and written in place. Importing it imports numba.

Activations are laid out as in :mod:`.layers`, eight rows side by side.
"""
import math

import numpy as np

from ..cache.pages import NULL_PAGE
from .compiling import ZERO, inner
from .lanes import (
    NUMBER,
    WIDTH,
    constant,
    exponential,
    larger,
    load,
    mix,
    multiply_add,
    read,
    score,
    splat,
    store,
    transpose,
    where_less,
    write,
)
from .layers import (
    TILE,
    Scratch,
    copy,
    elementwise,
    gather,
    linear,
    norm,
    run,
    softmax,
    subtract,
)
from .program import (
    GELU,
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
    WIDEN_BIAS,
    WIDEN_WEIGHT,
    Batch,
    Network,
    PagedNetwork,
)

# ---- attention -------------------------------------------------------------------------------------------------------


@inner
def _rotate(network: Network, scratch: Scratch, tiles: int) -> None:
    """Rotate queries and keys by the angles of their positions."""
    size = network.embed // network.heads
    for tile in range(tiles):
        at, encodings = scratch.qkv + tile * 3 * network.embed * TILE, scratch.encodings + tile * size * TILE
        for _ in range(2 * network.heads):
            for i in range(0, size * WIDTH, 2 * WIDTH):
                real, imaginary = load(at, i), load(at, i + WIDTH)
                cosine, sine = load(encodings, i), load(encodings, i + WIDTH)
                store(real * cosine - imaginary * sine, at, i)
                store(real * sine + imaginary * cosine, at, i + WIDTH)
            at += size * TILE


@inner
def _mix_rest(weights: int, tokens: np.ndarray, count: int, part: int, moved: int, moved_step: int, begin: int,
              end: int, target: int) -> None:
    """:func:`mix` for the last dimensions of a head whose size is no multiple of eight."""
    for row in range(WIDTH):
        for i in range(begin, end):
            sum = np.float32(0)
            for token in range(count):
                value = read(tokens[row, token] + part, i) + read(moved + token * moved_step, i)
                sum += read(weights, token * WIDTH + row) * value
            write(sum, target, i * WIDTH + row)


@inner
def _write_page(network: Network, layer: int, shift: int, shift_step: int, scratch: Scratch, tile: int,
                rows: int) -> None:
    """Write a tile's keys and values to their pages, without what learned positions add; its queries go to
    ``scratch.rows``."""
    embed, step = network.embed, scratch.step
    lanes, part = scratch.qkv + tile * 3 * embed * TILE, layer * 2 * embed * NUMBER
    for i in range(0, 3 * embed, WIDTH):
        transpose(lanes + i * TILE, WIDTH, scratch.rows + i * NUMBER, step)
    for row in range(rows):
        last = scratch.lengths[tile * WIDTH + row] - 1
        subtract(
            scratch.rows + (row * step + embed) * NUMBER, shift + last * shift_step + part,
            scratch.tokens[tile * WIDTH + row, last] + part, 2 * embed
        )


@inner
def _attend(network: Network, layer: int, shift: int, shift_step: int, scratch: Scratch, tile: int, rows: int) -> None:
    """Attention of a tile's tokens over their contexts and themselves, into ``scratch.y``."""
    _write_page(network, layer, shift, shift_step, scratch, tile, rows)
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
        softmax(scratch.scores, longest)
        part += embed * NUMBER
        target = scratch.y + (tile * embed + head * size) * TILE
        for i in range(0, whole, WIDTH):
            at = part + i * NUMBER
            mix(scratch.scores, tokens, width, longest, at, shift + at, shift_step, target + i * TILE)
        if whole < size:
            _mix_rest(scratch.scores, table, longest, part, shift + part, shift_step, whole, size, target)


@inner
def _run_layers(network: Network, shift: int, scratch: Scratch, rows: int, predicts: bool) -> None:
    """Run the tokens in ``scratch.x`` through all layers and write their keys and values; the outputs go to
    ``scratch.y``, if it predicts."""
    embed, tiles, team = network.embed, (rows + WIDTH - 1) // WIDTH, scratch.team
    step = embed * WIDTH
    shift_step = 0 if network.rotary else len(network.blocks) * 2 * network.embed * NUMBER
    for layer in range(len(network.blocks)):
        block = network.blocks[layer]
        norm(block[NORM1_WEIGHT], block[NORM1_BIAS], scratch.x, scratch.y, embed, tiles, network.eps)
        for part in range(3):  # queries, keys and values
            linear(
                block[QUERY_WEIGHT + 2 * part], block[QUERY_BIAS + 2 * part], scratch.y,
                scratch.qkv + part * step * NUMBER, 3 * step, embed, embed, tiles, ZERO, team
            )
        if network.rotary:
            _rotate(network, scratch, tiles)
        if layer == len(network.blocks) - 1 and not predicts:
            for tile in range(tiles):
                _write_page(network, layer, shift, shift_step, scratch, tile, min(WIDTH, rows - tile * WIDTH))
            return
        for tile in range(tiles):
            _attend(network, layer, shift, shift_step, scratch, tile, min(WIDTH, rows - tile * WIDTH))
        linear(
            block[PROJ_WEIGHT], block[PROJ_BIAS], scratch.y, scratch.between, step, embed, embed, tiles, scratch.x, team
        )
        norm(block[NORM2_WEIGHT], block[NORM2_BIAS], scratch.between, scratch.y, embed, tiles, network.eps)
        linear(
            block[WIDEN_WEIGHT], block[WIDEN_BIAS], scratch.y, scratch.hidden, network.mlp_width * WIDTH, embed,
            network.mlp_width, tiles, ZERO, team
        )
        elementwise(GELU, scratch.hidden, network.mlp_width * tiles)
        linear(
            block[NARROW_WEIGHT], block[NARROW_BIAS], scratch.hidden, scratch.x, step, network.mlp_width, embed, tiles,
            scratch.between, team
        )
    norm(network.norm_weight, network.norm_bias, scratch.x, scratch.y, embed, tiles, network.eps)


# ---- a simulation ----------------------------------------------------------------------------------------------------


@inner
def _half_page(network: Network) -> int:
    """Bytes of one token of a page."""
    return len(network.blocks) * 2 * network.embed * NUMBER


@inner
def _locate_tokens(paged: PagedNetwork, batch: Batch, scratch: Scratch, start: int, rows: int) -> None:
    """Write the addresses of the first layer's keys to ``scratch.tokens``: of each context's tokens, then of the action
    to append, or of the observation where there is no context. The rest point at the null page, which is zeros: a page
    that is not yet written may hold nan, and nan times a weight of 0 is nan."""
    half, slab = _half_page(paged.network), paged.slab.ctypes.data
    for row in range((rows + WIDTH - 1) // WIDTH * WIDTH):
        count = batch.counts[start + row] if row < rows else -1
        scratch.lengths[row] = max(2 * count, 1)
        for token in range(scratch.tokens.shape[1]):
            slot = token + 1
            page = batch.tables[start + row, slot // 2] if slot // 2 < count else NULL_PAGE
            if row < rows and token == scratch.lengths[row] - 1:
                page = batch.pages[start + row]
            scratch.tokens[row, token] = slab + (2 * page + slot % 2) * half


@inner
def _locate_observations(paged: PagedNetwork, batch: Batch, scratch: Scratch, start: int, rows: int) -> None:
    """Append the observations to the contexts that :func:`_locate_tokens` found."""
    half, slab = _half_page(paged.network), paged.slab.ctypes.data
    for row in range(rows):
        token = 2 * batch.counts[start + row]
        scratch.lengths[row] = token + 1
        scratch.tokens[row, token] = slab + (2 * batch.pages[start + row] + 1) * half


@inner
def _side_by_side(source: np.ndarray, scratch: Scratch, start: int, rows: int) -> int:
    """Rows of an array ``[B, N]``, side by side in ``scratch.y``, whose address is returned."""
    for row in range(rows):
        scratch.chosen[row] = start + row
    gather(source.ctypes.data, source.shape[1], scratch.y, scratch, rows)
    return scratch.y


@inner
def _load_tokens(network: Network, source: int, positions: np.ndarray, scratch: Scratch, start: int, rows: int) -> None:
    """Embeddings in ``source`` to ``scratch.x``, with learned positions added; or rotary factors to
    ``scratch.encodings``."""
    numbers = (rows + WIDTH - 1) // WIDTH * network.embed * WIDTH
    for row in range(rows):
        scratch.chosen[row] = positions[start + row] % network.rotary if network.rotary else scratch.lengths[row] - 1
    if network.rotary:
        gather(network.position_table, network.embed // network.heads, scratch.encodings, scratch, rows)
        copy(source, scratch.x, numbers)
        return
    gather(network.position_table, network.embed, scratch.encodings, scratch, rows)
    for i in range(0, numbers, WIDTH):
        store(load(source, i) + load(scratch.encodings, i), scratch.x, i)


@inner
def _embed(network: Network, actions: np.ndarray, scratch: Scratch, start: int, rows: int) -> int:
    """Embed the actions; returns the address."""
    if network.discrete:
        for row in range(rows):
            scratch.chosen[row] = actions[start + row, 0]
        gather(network.actions, network.embed, scratch.y, scratch, rows)
        return scratch.y
    size = actions.shape[1]
    for row in range(rows):
        for i in range(size):
            at = ((row // WIDTH) * size + i) * WIDTH + row % WIDTH
            write(actions[start + row, i], scratch.y, at)
    return run(network.continuous, scratch.y, scratch, (rows + WIDTH - 1) // WIDTH, network.eps)


@inner
def _scalars(logits: int, size: int, scratch: Scratch, start: int, rows: int, out: np.ndarray) -> None:
    """Numbers from logits over a support: its mean, then the inverse of MuZero's value rescaling
    (https://arxiv.org/abs/1911.08265, appendix F) with epsilon = 0.001."""
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
            root = (math.sqrt(abs(value) * 0.004 + 1.004004) - 1) * 500
            out[start + row] = np.sign(value) * (root * root - 1)


@inner
def _spread_out(source: int, size: int, start: int, rows: int, out: np.ndarray) -> None:
    """Copy ``[tiles, size, 8]`` to rows of ``out``."""
    for row in range(rows):
        for i in range(size):
            out[start + row, i] = read(source, ((row // WIDTH) * size + i) * WIDTH + row % WIDTH)


@inner
def _policy(network: Network, scratch: Scratch, tiles: int, start: int, rows: int, policy: np.ndarray) -> None:
    """The policy head on ``scratch.y``, which it overwrites."""
    trunk = run(network.trunk, scratch.y, scratch, tiles, network.eps)
    if len(network.trunk):
        copy(trunk, scratch.y, tiles * network.trunk[-1, OUTPUTS] * WIDTH)
    size = network.first[-1, OUTPUTS]
    _spread_out(run(network.first, scratch.y, scratch, tiles, network.eps), size, start, rows, policy[:, :size])
    if len(network.second):
        sigma = run(network.second, scratch.y, scratch, tiles, network.eps)
        _spread_out(sigma, network.policy - size, start, rows, policy[:, size:])


@inner
def simulate(paged: PagedNetwork, batch: Batch, scratch: Scratch, start: int, rows: int) -> None:
    """The step of one simulation for ``rows`` rows from ``start`` on, at most :data:`ROWS`. Predicts reward, value,
    policy and, unless it is empty, ``latent``."""
    network, shift, tiles = paged.network, paged.shift.ctypes.data, (rows + WIDTH - 1) // WIDTH
    _locate_tokens(paged, batch, scratch, start, rows)
    token = _embed(network, batch.actions, scratch, start, rows)
    _load_tokens(network, token, batch.positions[0], scratch, start, rows)
    _run_layers(network, shift, scratch, rows, True)
    rewards = run(network.rewards, scratch.y, scratch, tiles, network.eps)
    _scalars(rewards, network.rewards[-1, OUTPUTS], scratch, start, rows, batch.reward)
    _locate_observations(paged, batch, scratch, start, rows)
    observed = run(network.observations, scratch.y, scratch, tiles, network.eps)
    if len(batch.latent):
        _spread_out(observed, network.embed, start, rows, batch.latent)
    _load_tokens(network, observed, batch.positions[1], scratch, start, rows)
    _run_layers(network, shift, scratch, rows, True)
    values = run(network.value, scratch.y, scratch, tiles, network.eps)
    _scalars(values, network.value[-1, OUTPUTS], scratch, start, rows, batch.value)
    _policy(network, scratch, tiles, start, rows, batch.policy)


@inner
def begin_contexts(paged: PagedNetwork, batch: Batch, scratch: Scratch, start: int, rows: int) -> None:
    """Begin contexts that hold only the observations ``latent``; ``counts`` are zeros."""
    _locate_tokens(paged, batch, scratch, start, rows)
    observed = _side_by_side(batch.latent, scratch, start, rows)
    _load_tokens(paged.network, observed, batch.positions[1], scratch, start, rows)
    _run_layers(paged.network, paged.shift.ctypes.data, scratch, rows, False)


# ---- roots -----------------------------------------------------------------------------------------------------------


@inner
def _observe(network: Network, observations: np.ndarray, latent: np.ndarray, scratch: Scratch, start: int,
             rows: int) -> int:
    """Encode the observations, if there are any; returns the address of their embeddings."""
    if not len(observations):
        return _side_by_side(latent, scratch, start, rows)
    source = _side_by_side(observations, scratch, start, rows)
    observed = run(network.encoder, source, scratch, (rows + WIDTH - 1) // WIDTH, network.eps)
    _spread_out(observed, network.embed, start, rows, latent)
    return observed


@inner
def observe_roots(paged: PagedNetwork, batch: Batch, scratch: Scratch, start: int, rows: int) -> None:
    """Appends an action and a given observation to the context of each row, as in :func:`simulate`. Where a count is 0,
    an episode begins, and the action is ignored.

    ``observations`` are encoded into ``latent``; if there are none, ``latent`` is given. Predicts ``sequence`` and the
    logits of value and policy.
    """
    network, shift, tiles = paged.network, paged.shift.ctypes.data, (rows + WIDTH - 1) // WIDTH
    _locate_tokens(paged, batch, scratch, start, rows)
    if batch.counts[start:start + rows].any():  # what it writes where an episode begins, the observation overwrites
        token = _embed(network, batch.actions, scratch, start, rows)
        _load_tokens(network, token, batch.positions[0], scratch, start, rows)
        _run_layers(network, shift, scratch, rows, False)
    _locate_observations(paged, batch, scratch, start, rows)
    observed = _observe(network, batch.observations, batch.latent, scratch, start, rows)
    _load_tokens(network, observed, batch.positions[1], scratch, start, rows)
    _run_layers(network, shift, scratch, rows, True)
    _spread_out(scratch.y, network.embed, start, rows, batch.sequence)
    values = run(network.value, scratch.y, scratch, tiles, network.eps)
    _spread_out(values, network.value[-1, OUTPUTS], start, rows, batch.value)
    _policy(network, scratch, tiles, start, rows, batch.policy)
