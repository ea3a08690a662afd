"""The recurrent step over pages where they lie: no window is gathered. Importing it imports Triton.

Shapes as in ``step.py``. Rows of ``tables [B, W]`` hold a context's pages, left-aligned, and after them the page that
the step writes. The token at position ``p`` of a context stands in slot ``p + 1``: slot ``s`` is token ``s % 2`` of the
row's page ``s // 2``.
"""
import torch
import triton
import triton.language as tl

from .products import apply, residual_norm
from .slab import Slab
from .step import StepOutput
from .weights import Geometry, Weights

BLOCK = 16
"""Tokens that a program looks at together."""


@triton.jit
def _attend(qkv, slab, tables, counts, positions, places, shift, out, rows, heads, layers, layer, width, scale,
            TOKEN: tl.constexpr, HEAD_DIM: tl.constexpr, LANES: tl.constexpr, ROTARY: tl.constexpr,
            TOKENS: tl.constexpr):
    """One row and head: write the token's key and value to its page, and attend over the context and the token."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = heads * HEAD_DIM
    lane = tl.arange(0, LANES)
    there = lane < HEAD_DIM
    own = head * HEAD_DIM + lane
    query = tl.load(qkv + row * 3 * dim + own, mask=there, other=0.0)
    key = tl.load(qkv + row * 3 * dim + dim + own, mask=there, other=0.0)
    value = tl.load(qkv + row * 3 * dim + 2 * dim + own, mask=there, other=0.0)
    position = tl.load(positions + TOKEN * rows + row)
    count = tl.load(counts + row)
    page = tl.load(tables + row * width + count)
    token_size = layers * 2 * dim
    written = slab + (page * 2 + TOKEN) * token_size + layer * 2 * dim + own
    if ROTARY:
        other = head * HEAD_DIM + (lane ^ 1)
        turned_query = tl.load(qkv + row * 3 * dim + other, mask=there, other=0.0)
        turned_key = tl.load(qkv + row * 3 * dim + dim + other, mask=there, other=0.0)
        factor = places + position * HEAD_DIM + (lane // 2) * 2
        cosine = tl.load(factor, mask=there, other=0.0)
        sine = tl.load(factor + 1, mask=there, other=0.0) * tl.where(lane % 2 == 0, -1.0, 1.0)
        query = query * cosine + turned_query * sine
        key = key * cosine + turned_key * sine
        tl.store(written, key, mask=there)
        tl.store(written + dim, value, mask=there)
    else:
        moved = shift + (position * layers + layer) * 2 * dim + own
        tl.store(written, key - tl.load(moved, mask=there, other=0.0), mask=there)
        tl.store(written + dim, value - tl.load(moved + dim, mask=there, other=0.0), mask=there)
    largest = tl.sum(query * key, 0) * scale
    total = largest * 0 + 1
    mixed = value
    earlier = tl.maximum(2 * count - 1 + TOKEN, 0)
    begin = earlier * 0
    while begin < earlier:
        at = begin + tl.arange(0, TOKENS)
        seen = at < earlier
        both = seen[:, None] & there[None, :]
        pages = tl.load(tables + row * width + (at + 1) // 2, mask=seen, other=0)
        place = ((pages * 2 + (at + 1) % 2) * token_size + layer * 2 * dim)[:, None] + own[None, :]
        keys = tl.load(slab + place, mask=both, other=0.0).to(tl.float32)
        values = tl.load(slab + place + dim, mask=both, other=0.0).to(tl.float32)
        if not ROTARY:
            moves = ((at * layers + layer) * 2 * dim)[:, None] + own[None, :]
            keys += tl.load(shift + moves, mask=both, other=0.0)
            values += tl.load(shift + moves + dim, mask=both, other=0.0)
        scores = tl.where(seen, tl.sum(keys * query[None, :], 1) * scale, float('-inf'))
        most = tl.maximum(largest, tl.max(scores, 0))
        weights = tl.exp(scores - most)
        kept = tl.exp(largest - most)
        total = total * kept + tl.sum(weights, 0)
        mixed = mixed * kept + tl.sum(weights[:, None] * values, 0)
        largest = most
        begin += TOKENS
    tl.store(out + row * dim + own, mixed / total, mask=there)


class PagedStep:
    """:meth:`Engine.step` for a search, whose observations are predicted, over pages where they lie. Its layers have no
    gates."""

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry

    def __call__(self, weights: Weights, slab: Slab, tables: torch.Tensor, counts: torch.Tensor, action: torch.Tensor,
                 positions: torch.Tensor) -> StepOutput:
        places = weights.places[positions]
        x = self._token(weights, slab, tables, counts, positions, weights.embed_action(action), places[0], 0)
        rewards, latent = apply(weights.rewards, x), apply(weights.observations, x)
        x = self._token(weights, slab, tables, counts, positions, latent, places[1], 1)
        parts = x, latent, rewards, apply(weights.policy, x), apply(weights.value, x)
        return StepOutput(*(part.unsqueeze(1) for part in parts))

    def _token(self, weights: Weights, slab: Slab, tables: torch.Tensor, counts: torch.Tensor, positions: torch.Tensor,
               x: torch.Tensor, places: torch.Tensor, token: int) -> torch.Tensor:
        """The output ``[B, E]`` of a page's first (0) or second (1) token ``x [B, E]``."""
        geometry = self._geometry
        rotary, rows = geometry.rotary, len(x)
        if not rotary:
            x = x + places
        factors = torch.view_as_real(weights.places) if rotary else weights.places
        next_norms = [layer.norm1 for layer in weights.layers[1:]] + [weights.norm]
        normed = weights.layers[0].norm1(x)
        for number, (layer, next_norm) in enumerate(zip(weights.layers, next_norms)):
            attended = torch.empty_like(x)
            _attend[(rows, geometry.heads)](
                apply(layer.qkv, normed), slab.data, tables, counts, positions, factors,
                factors if rotary else weights.shift, attended, rows, geometry.heads, geometry.layers, number,
                tables.shape[1], geometry.head_dim ** -0.5, TOKEN=token, HEAD_DIM=geometry.head_dim,
                LANES=triton.next_power_of_2(geometry.head_dim), ROTARY=rotary, TOKENS=BLOCK, num_warps=2
            )
            x, normed = residual_norm(layer.proj, attended, x, layer.norm2)
            x, normed = residual_norm(layer.mlp, normed, x, next_norm)
        return normed
