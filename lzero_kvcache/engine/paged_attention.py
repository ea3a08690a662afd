"""Paged attention on a GPU, in Triton: keys and values are read from their pages. Importing it imports Triton.

Shapes as in :mod:`.step`. A row's context has tokens ``0`` to ``2 count - 2``; a step adds the action and the
observation of the page in the last column of its table. A long context is split over ``S`` programs.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .kernel_launch import launch, wait
from .linear_kernels import multiply
from .slab import Slab
from .weights import Geometry, Weights

MOST_PROGRAMS = 512
"""Programs that are enough to keep a GPU busy: the more rows and heads, the less contexts are split."""

LEAST_TOKENS = 32
"""Tokens of a context per program, at least."""


class Splitting(NamedTuple):
    """How a context is split over programs."""
    splits: int
    tokens: int  # that a program loads at once
    warps: int


def splitting(tokens: int, programs: int) -> Splitting:
    """The splitting of contexts of at most ``tokens`` tokens, for ``programs`` rows times heads."""
    most = min(tokens // LEAST_TOKENS, MOST_PROGRAMS // programs)
    return Splitting(1, 16, 2) if most < 2 else Splitting(1 << most.bit_length() - 1, LEAST_TOKENS, 4)


@triton.jit
def _added(parts, bias, part_step, column, there, PARTS: tl.constexpr):
    """Columns of a product whose parts are still to be added, plus the bias; see :func:`.linear_kernels.multiply`."""
    total = tl.load(bias + column, mask=there, other=0.)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * part_step + column, mask=there, other=0.)
    return total


@triton.jit
def _query_key_value(parts, bias, part_step, moved, position, layer, head, d, there, LAYERS: tl.constexpr,
                     EMBED: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, ROTARY: tl.constexpr):
    """A head's query, key and value at a position, and key and value as its page keeps them."""
    column = head * SIZE + d
    query = _added(parts, bias, part_step, column, there, PARTS)
    key = _added(parts, bias, part_step, EMBED + column, there, PARTS)
    value = _added(parts, bias, part_step, 2 * EMBED + column, there, PARTS)
    if ROTARY:
        factors = moved + position * SIZE + d // 2 * 2
        cosine = tl.load(factors, mask=there, other=0.)
        sine = tl.load(factors + 1, mask=there, other=0.)
        pair, turned = head * SIZE + (d ^ 1), tl.where(d % 2 == 0, -sine, sine)
        query = query * cosine + _added(parts, bias, part_step, pair, there, PARTS) * turned
        key = key * cosine + _added(parts, bias, part_step, EMBED + pair, there, PARTS) * turned
        kept, kept_value = key, value
    else:
        shift = moved + (position * LAYERS + layer) * 2 * EMBED + column
        kept = key - tl.load(shift, mask=there, other=0.)
        kept_value = value - tl.load(shift + EMBED, mask=there, other=0.)
    return query, key, value, kept, kept_value


@triton.jit
def _attend(parts, bias, part_step, row_of_parts, slab, tables, counts, positions, moved, out, sums, layer, scale, rows,
            row_step, page_step, width, PARTS: tl.constexpr, LAYERS: tl.constexpr, HEADS: tl.constexpr,
            SIZE: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr, ROTARY: tl.constexpr, SPLITS: tl.constexpr,
            TOKENS: tl.constexpr, OVERLAP: tl.constexpr):
    """Write a token's key and value to its half of the page, and attend from it: each program has a row, a head and a
    split of the context. Query, key and value come in ``parts`` that are still to be added, as ``bias`` is. ``moved``
    is what learned positions add ``[2W, L, 2, E]``, or rotary factors ``[positions, D / 2, 2]``. Of several splits,
    weighted sums go to ``out [S, B, E]``, and the maxima and totals of weights to ``sums [S, B, H, 2]``."""
    wait(OVERLAP)
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    is_first = split == 0  # the split that has the token itself and, before an observation, its action
    d = tl.arange(0, PADDED)
    there = d < SIZE
    embed = HEADS * SIZE
    parts += row * row_of_parts
    count = tl.load(counts + row)
    position = tl.load(positions + HALF * rows + row)
    query, key, value, kept, kept_value = _query_key_value(
        parts, bias, part_step, moved, position, layer, head, d, there, LAYERS, HEADS * SIZE, SIZE, PARTS, ROTARY)
    page = tl.load(tables + row * row_step + (width - 1) * page_step)
    own = slab + ((page * 2 + HALF) * LAYERS + layer) * 2 * embed + head * SIZE + d
    tl.store(own, kept.to(slab.dtype.element_ty), mask=there & is_first)
    tl.store(own + embed, kept_value.to(slab.dtype.element_ty), mask=there & is_first)
    query *= scale
    top = tl.sum(query * key, 0)
    total = top * 0 + 1
    mixed = value
    if HALF == 1:  # the action of the same page, which the launch before has written
        before = own - LAYERS * 2 * embed
        key = tl.load(before, mask=there, other=0.).to(tl.float32)
        value = tl.load(before + embed, mask=there, other=0.).to(tl.float32)
        if not ROTARY:
            shift = moved + (tl.load(positions + row) * LAYERS + layer) * 2 * embed + head * SIZE + d
            key += tl.load(shift, mask=there, other=0.)
            value += tl.load(shift + embed, mask=there, other=0.)
        score = tl.where(count > 0, tl.sum(query * key, 0), -float('inf'))  # there is none where an episode begins
        higher = tl.maximum(top, score)
        old, new = tl.exp(top - higher), tl.exp(score - higher)
        top, total, mixed = higher, old + new, mixed * old + value * new
    top = tl.where(is_first, top, -float('inf'))
    total, mixed = tl.where(is_first, total, 0.), tl.where(is_first, mixed, 0.)
    tokens = (2 * count - 1).to(tl.int32)
    share = tl.cdiv(tokens, SPLITS * TOKENS) * TOKENS
    tokens = tl.minimum(tokens, (split + 1) * share)
    for start in range(split * share, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        seen = token < tokens
        both = seen[:, None] & there[None, :]
        pages = tl.load(tables + row * row_step + (token + 1) // 2 * page_step, mask=seen, other=0)
        places = ((pages * 2 + (token + 1) % 2) * LAYERS + layer) * 2 * embed + head * SIZE
        keys = tl.load(slab + places[:, None] + d[None, :], mask=both, other=0.).to(tl.float32)
        values = tl.load(slab + embed + places[:, None] + d[None, :], mask=both, other=0.).to(tl.float32)
        if not ROTARY:
            shifts = moved + ((token * LAYERS + layer) * 2 * embed + head * SIZE)[:, None] + d[None, :]
            keys += tl.load(shifts, mask=both, other=0.)
            values += tl.load(shifts + embed, mask=both, other=0.)
        scores = tl.where(seen, tl.sum(query[None, :] * keys, 1), -float('inf'))
        higher = tl.maximum(top, tl.max(scores, 0))
        old, weights = tl.exp(top - higher), tl.exp(scores - higher)
        total = total * old + tl.sum(weights, 0)
        mixed = mixed * old + tl.sum(values * weights[:, None], 0)
        top = higher
    if SPLITS == 1:
        mixed = mixed / total
    else:
        at = sums + ((split * rows + row) * HEADS + head) * 2
        tl.store(at, top)
        tl.store(at + 1, total)
    tl.store(out + (split * rows + row) * embed + head * SIZE + d, mixed, mask=there)


@triton.jit
def _join(parts, sums, out, rows, HEADS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr,
          OVERLAP: tl.constexpr):
    """Join the splits to attention ``[B, E]``."""
    wait(OVERLAP)
    row, head = tl.program_id(0), tl.program_id(1)
    d, split = tl.arange(0, PADDED), tl.arange(0, SPLITS)
    at = (split * rows + row) * HEADS + head
    top, total = tl.load(sums + at * 2), tl.load(sums + at * 2 + 1)
    weights = tl.exp(top - tl.max(top, 0))
    mixed = tl.load(parts + at[:, None] * SIZE + d[None, :], mask=(d < SIZE)[None, :], other=0.)
    joined = tl.sum(mixed * weights[:, None], 0) / tl.sum(total * weights, 0)
    tl.store(out + (row * HEADS + head) * SIZE + d, joined, mask=d < SIZE)


def attend(geometry: Geometry, weights: Weights, slab: Slab, layer: int, half: int, x: torch.Tensor,
           tables: torch.Tensor, counts: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Attention ``[B, E]`` of a page's action (``half`` 0) or observation (1) ``x [B, E]``, whose key and value are
    written into the page. Without a context, an observation has no action before it."""
    rows, embed = len(x), geometry.embed_dim
    qkv, bias = multiply(weights.layers[layer].qkv, x), weights.layers[layer].qkv.bias
    moved = torch.view_as_real(weights.position_table) if geometry.rotary else weights.shift
    assert moved is not None and slab.data is not None and moved.is_contiguous() and positions.is_contiguous()
    heads, size, padded = geometry.heads, geometry.head_dim, triton.next_power_of_2(geometry.head_dim)
    splits, tokens, warps = splitting(2 * tables.shape[1], rows * heads)
    out = x.new_empty(splits, rows, embed)
    sums = out if splits == 1 else x.new_empty(splits, rows, heads, 2)
    launch(
        _attend, (rows, heads, splits), qkv, bias, *qkv.stride()[:2], slab.data, tables, counts, positions, moved, out,
        sums, layer, size ** -0.5, rows, *tables.stride(), tables.shape[1], PARTS=len(qkv), LAYERS=geometry.layers,
        HEADS=heads, SIZE=size, PADDED=padded, HALF=half, ROTARY=geometry.rotary, SPLITS=splits, TOKENS=tokens,
        num_warps=warps
    )
    if splits == 1:
        return out[0]
    joined = x.new_empty(rows, embed)
    launch(_join, (rows, heads), out, sums, joined, rows, HEADS=heads, SIZE=size, PADDED=padded, SPLITS=splits,
           num_warps=2)
    return joined
