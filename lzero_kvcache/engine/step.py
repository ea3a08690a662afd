"""Inference of one or two tokens for every row of a batch, over pages. Takes weights, and tensors on the device.

Shapes: ``B`` rows, ``E`` embedding, ``H`` heads, ``D = E / H``, ``L`` layers, ``A`` actions, ``S`` support, ``W`` pages
of a window, at the most ``context_length / 2``: the context's, left-aligned, and in the last column the page that the
step writes. A window has ``2W`` slots ``[-, o0, a0, o1, ..., action, observation]``. Slot 0 is that of an action that
does not exist, and is never read, so that the token at position ``p`` of a context stands in slot ``p + 1``. Tables of
pages are int64 ``[B, W]``, counts of pages ``[B]``, positions of tokens ``[K, B]``. Triton is imported by the modules
that launch its kernels, not with the package.
"""
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, ContextManager, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F

from .kernel_check import KernelCheck
from .memory import MemoryPool
from .slab import Slab
from .weights import Geometry, Layer, Weights, to_scalar

SHORT_WINDOW = 64
"""Slots up to which attention of many rows is faster without a matrix product."""


class StepOutput(NamedTuple):
    """The predictions of a step for each row."""
    output_sequence: torch.Tensor  # [B, 1, E]
    latent_state: torch.Tensor  # [B, 1, E]
    logits_rewards: Optional[torch.Tensor]  # [B, 1, S]; None where no action was taken
    logits_policy: torch.Tensor  # [B, 1, A], or [B, 1, 2A]: mu and sigma
    logits_value: torch.Tensor  # [B, 1, S]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> 'StepOutput':
        """The same output with a function applied to each of its tensors."""
        return StepOutput(*(None if part is None else function(part) for part in self))  # type: ignore[arg-type]


class Engine:
    """The transformer's inference over pages. It holds no weights."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.windows = MemoryPool()
        self.kernels = KernelCheck()
        self._masks: Dict[Tuple[int, torch.device], Tuple[torch.Tensor, torch.Tensor]] = {}

    def for_search(self, weights: Weights, output: StepOutput) -> torch.Tensor:
        """The numbers that a search copies to the CPU: reward, value and policy logits ``[B, 2 + P]``."""
        assert output.logits_rewards is not None
        rows = output.logits_value.shape[0]
        if weights.captured and self.has_kernels(output.logits_value.device):
            from .scalars import for_search

            return for_search(output, output.logits_value.new_empty(rows, 2 + output.logits_policy.shape[-1]))
        scalars = to_scalar(torch.cat([output.logits_rewards.squeeze(1), output.logits_value.squeeze(1)]))
        return torch.cat([scalars.view(2, rows).T, output.logits_policy.squeeze(1)], dim=1)

    def has_kernels(self, device: torch.device) -> bool:
        """Whether the device is a GPU that runs Triton's kernels."""
        return device.type == 'cuda' and self.kernels.why_not(device) is None

    # ---- steps -----------------------------------------------------------------------------------------------------

    def begin(self, weights: Weights, slab: Slab, pages: torch.Tensor, latent: torch.Tensor, positions: torch.Tensor,
              predicts: bool = False) -> torch.Tensor:
        """Begin contexts: write to one page ``[B]`` of each row its observation ``[B, E]`` alone, at rotary positions
        ``[B]``. Returns the outputs ``[B, E]``, if it predicts."""
        geometry = self.geometry
        window = latent.new_zeros(latent.shape[0], 2, geometry.layers, 2, geometry.embed_dim)
        positions = positions if geometry.rotary else torch.zeros_like(pages)
        encodings = self._encodings(weights, positions.unsqueeze(0))
        x = self._tokens(weights, window, 2, latent.unsqueeze(1), encodings, None, predicts)
        if weights.shift is not None:
            window[:, 1] -= weights.shift[0]
        slab.write(pages, window)
        return x

    def first(self, weights: Weights, slab: Slab, pages: torch.Tensor, latent: torch.Tensor,
              positions: torch.Tensor) -> StepOutput:
        """The first observations of episodes: as :meth:`begin`, with predictions."""
        x = self.begin(weights, slab, pages, latent, positions, predicts=True)
        return self._predict(weights, x, latent, None)

    def step(self, weights: Weights, slab: Slab, tables: torch.Tensor, counts: torch.Tensor, action: torch.Tensor,
             positions: torch.Tensor, latent: Optional[torch.Tensor] = None) -> StepOutput:
        """An action and an observation token for each row; the new page is written to the last column's ids.

        A count of 0 begins a context, and its action is ignored. ``positions [2, B]`` are those of both tokens. With
        ``latent [B, E]`` the observation is given, and no reward is predicted; without it the observation is predicted.
        """
        if weights.captured and self.has_kernels(tables.device):
            return self.simulate(weights, slab, tables, counts, action, positions, latent)
        with self._room(slab, tables.numel()) as [room]:
            window = slab.read(tables, room)
            last = window.shape[1] - 1
            if weights.shift is not None:
                window[:, 1:last - 1] += weights.shift[:last - 2]
            output = self._two_tokens(weights, window, counts, action, positions, latent)
            page = window[:, last - 1:]
            if weights.shift is not None:
                page = page - weights.shift[positions.T]
            slab.write(tables[:, -1], page)
        return output

    def _room(self, slab: Slab, pages: int) -> ContextManager[List[Any]]:
        """Room for a window, which steps on a CPU reuse: allocating it takes several times as long as the gather. On a
        GPU, whose allocator keeps memory itself, None."""
        assert slab.data is not None
        if slab.data.device.type != 'cpu':
            return nullcontext([None])
        make = partial(slab.data.new_empty, (pages, *slab.page_shape))
        return self.windows.lease((slab.page_shape, slab.dtype), 1, make, lambda room: len(room) >= pages)

    def simulate(self, weights: Weights, slab: Slab, tables: torch.Tensor, counts: torch.Tensor, action: torch.Tensor,
                 positions: torch.Tensor, latent: Optional[torch.Tensor] = None) -> StepOutput:
        """:meth:`step` without gathering a window: Triton reads pages in place."""
        from .linear_kernels import apply_both

        token, rewards = weights.embed_action(action), None
        x = self._over_pages(weights, slab, tables, counts, positions, 0, token)
        if latent is None:
            rewards, latent = apply_both(weights.rewards, weights.observations, x)
            rewards = rewards.unsqueeze(1)
        x = self._over_pages(weights, slab, tables, counts, positions, 1, latent)
        policy, value = apply_both(weights.policy, weights.value, x)
        return StepOutput(x.unsqueeze(1), latent.unsqueeze(1), rewards, policy.unsqueeze(1), value.unsqueeze(1))

    def begin_in_place(self, weights: Weights, slab: Slab, pages: torch.Tensor, positions: torch.Tensor,
                       latent: torch.Tensor) -> None:
        """:meth:`begin` by Triton; the rotary positions are the second row of ``positions [2, B]``."""
        none = torch.zeros_like(pages)
        self._over_pages(weights, slab, pages[:, None], none, positions, 1, latent, predicts=False)

    def _over_pages(self, weights: Weights, slab: Slab, tables: torch.Tensor, counts: torch.Tensor,
                    positions: torch.Tensor, half: int, x: torch.Tensor, predicts: bool = True) -> torch.Tensor:
        """The output ``[B, E]`` of a page's action (``half`` 0) or observation (1) ``x [B, E]``, if it predicts."""
        from .linear_kernels import apply, position_norm, residual_norm
        from .paged_attention import attend

        norm, *norms = [layer.norm1 for layer in weights.layers] + [weights.norm]
        if self.geometry.rotary:
            normed = norm(x)
        else:
            x, normed = position_norm(x, weights.position_table, positions[half], norm)
        for index, (layer, next_norm) in enumerate(zip(weights.layers, norms)):
            y = attend(self.geometry, weights, slab, index, half, normed, tables, counts, positions)
            if layer is weights.layers[-1] and not predicts:
                break
            if layer.gates is None:
                x, normed = residual_norm(layer.proj, y, x, layer.norm2)
                x, normed = residual_norm(layer.mlp, normed, x, next_norm)
            else:
                x = layer.gates[0](x, apply(layer.proj, y))
                x = layer.gates[1](x, apply(layer.mlp, layer.norm2(x)))
                normed = next_norm(x)
        return normed

    def step_alone(self, weights: Weights, state: torch.Tensor, action: torch.Tensor,
                   positions: Optional[torch.Tensor]) -> StepOutput:
        """A state ``[B, E]``, an action and the predicted observation, without a context and without pages, for
        reanalyses. ``positions [3, B]`` are rotary ones."""
        rows, geometry = state.shape[0], self.geometry
        window = state.new_empty(rows, 4, geometry.layers, 2, geometry.embed_dim)
        if positions is None:
            positions = torch.arange(3, device=state.device).unsqueeze(1).expand(3, rows)
        encodings = self._encodings(weights, positions)
        pair = torch.stack([state, weights.embed_action(action)], dim=1)
        causal = self._masks_of(3, state.device)[1][1:, :, :, :2]  # of a context of one page, the state's
        x = self._tokens(weights, window, 3, pair, encodings[:, :2], causal)
        return self._observe_predicted(weights, window, x, encodings[:, 2:], None)

    def _two_tokens(self, weights: Weights, window: torch.Tensor, counts: torch.Tensor, action: torch.Tensor,
                    positions: torch.Tensor, latent: Optional[torch.Tensor]) -> StepOutput:
        slots = window.shape[1]
        seen, given = self._masks_of(slots, window.device)
        token, encodings = weights.embed_action(action), self._encodings(weights, positions)
        if latent is not None:
            pair = torch.stack([token, latent], dim=1)
            x = self._tokens(weights, window, slots, pair, encodings, given.index_select(0, counts)[..., :slots - 1])
            return self._predict(weights, x, latent, None)
        bias = seen.index_select(0, counts)
        x = self._tokens(weights, window, slots - 1, token.unsqueeze(1), encodings[:, :1], bias[..., :slots - 2])
        return self._observe_predicted(weights, window, x, encodings[:, 1:], bias[..., :slots - 1])

    def _observe_predicted(self, weights: Weights, window: torch.Tensor, x: torch.Tensor, encodings: torch.Tensor,
                           bias: Optional[torch.Tensor]) -> StepOutput:
        token = x.unsqueeze(1)
        rewards, latent = weights.rewards(token), weights.observations(token)
        x = self._tokens(weights, window, window.shape[1], latent, encodings, bias)
        return self._predict(weights, x, latent.squeeze(1), rewards)

    def _predict(self, weights: Weights, x: torch.Tensor, latent: torch.Tensor,
                 rewards: Optional[torch.Tensor]) -> StepOutput:
        x = x.unsqueeze(1)
        return StepOutput(x, latent.unsqueeze(1), rewards, weights.policy(x), weights.value(x))

    def _tokens(self, weights: Weights, window: torch.Tensor, end: int, x: torch.Tensor, encodings: torch.Tensor,
                bias: Optional[torch.Tensor], predicts: bool = True) -> torch.Tensor:
        """Run ``K`` tokens ``x [B, K, E]`` through all layers. Their keys and values go to slots ``end - K`` to
        ``end - 1``; they attend to slots 1 to ``end - 1``, masked by ``bias [B, 1, K, end - 1]``. Returns the output
        ``[B, E]`` of the last token, if it predicts."""
        rows, tokens, dim = x.shape
        if not self.geometry.rotary:
            x = x + encodings
        x = x.reshape(rows * tokens, dim)
        if weights.embed_dropout is not None:
            x = weights.embed_dropout(x)
        by_head = window.view(rows, -1, self.geometry.layers, 2, self.geometry.heads, self.geometry.head_dim)
        slots = by_head[:, end - tokens:end].unbind(2)  # [B, K, 2, H, D] each
        contexts = by_head[:, 1:end].permute(2, 3, 0, 4, 1, 5).unbind(0)  # [2, B, H, T, D] each
        for layer, slot, context in zip(weights.layers, slots, contexts):
            qkv = layer.qkv(layer.norm1(x))
            query = self._write(qkv, slot, encodings)
            if slot is slots[-1]:  # in the last layer, only the output is needed that heads predict from
                if not predicts:
                    break
                if bias is not None and tokens > 1:
                    query, x, bias, tokens = query[:, -1:], x.view(rows, tokens, dim)[:, -1], bias[:, :, -1:], 1
            if end == 2 and not weights.training:  # attention of a token over itself is its value
                y = qkv[:, 2 * dim:]
            else:
                y = self._attend(weights, query, context, bias)
            x = with_residuals(layer, x, layer.proj(y.reshape(rows * tokens, dim)))
        return weights.norm(x) if predicts else x

    def _write(self, qkv: torch.Tensor, slot: torch.Tensor, encodings: torch.Tensor) -> torch.Tensor:
        """Write the keys and values of ``qkv [B x K, 3E]`` into their slots; returns the queries ``[B, K, H, D]``."""
        rows, tokens, _, heads, head_dim = slot.shape
        if self.geometry.rotary:  # turn queries and keys where they are
            pairs = qkv.view(rows, tokens, 3 * heads, head_dim // 2, 2)[:, :, :2 * heads]
            torch.view_as_complex(pairs).mul_(encodings)
        vectors = qkv.view(rows, tokens, 3, heads, head_dim)
        slot.copy_(vectors[:, :, 1:])
        return vectors[:, :, 0]

    def _attend(self, weights: Weights, query: torch.Tensor, context: torch.Tensor,
                bias: Optional[torch.Tensor]) -> torch.Tensor:
        """Attention of queries ``[B, K, H, D]`` over keys and values ``[2, B, H, T, D]``: ``[B, K, H, D]``."""
        keys, values = context.unbind(0)
        query = query.transpose(1, 2)
        many = query.shape[0] >= weights.many_rows and keys.shape[2] < SHORT_WINDOW
        if many and not weights.training:
            return _attend_elementwise(query, keys, values, bias).transpose(1, 2)
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=bias, dropout_p=weights.attention_dropout
        ).transpose(1, 2)

    def _encodings(self, weights: Weights, positions: torch.Tensor) -> torch.Tensor:
        """Rotary factors ``[B, K, 1, D / 2]`` of positions ``[K, B]``, for queries and keys; or learned embeddings
        ``[B, K, E]``, to add to tokens."""
        if self.geometry.rotary:
            return weights.position_table[positions].transpose(0, 1).unsqueeze(-2)
        return F.embedding(positions, weights.position_table).transpose(0, 1)

    def _masks_of(self, slots: int, device: torch.device) -> Tuple[torch.Tensor, torch.Tensor]:
        """Additive masks by count of pages, padded: for one token ``[W, 1, 1, T]``, and for an action with a given
        observation ``[W, 1, 2, T]``."""
        masks = self._masks.get((slots, device))
        if masks is None:
            slot = torch.arange(1, slots, device=device)
            count = torch.arange((slots + 1) // 2, device=device).unsqueeze(1)
            seen = (slot < 2 * count) | (slot >= slots - 2)
            # An action does not see the observation after it, and a first observation sees no action before it.
            given = seen & ((slot != slots - 2) | (count > 0))
            hidden = ~torch.stack([seen, seen & (slot != slots - 1), given], dim=1)
            # CUDA's attention reads masks eight numbers at a time.
            padded = torch.zeros(len(count), 1, 3, -(-(slots - 1) // 8) * 8, device=device)
            padded[:, 0, :, :slots - 1].masked_fill_(hidden, float('-inf'))
            self._masks[slots, device] = masks = (padded[:, :, :1].contiguous(), padded[:, :, 1:].contiguous())
        return masks


def checksum(output: StepOutput) -> torch.Tensor:
    """A sum ``[B, 1]`` that is finite where reward, value and policy are; then the keys and values that they were
    computed from are finite too."""
    parts = output.logits_rewards, output.logits_value, output.logits_policy
    return torch.cat([part for part in parts if part is not None], dim=-1).sum(-1)


def with_residuals(layer: Layer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The rest of a block after its attention, ``y``."""
    if layer.gates is None:
        x = x + y
        return x + layer.mlp(layer.norm2(x))
    x = layer.gates[0](x, y)
    return layer.gates[1](x, layer.mlp(layer.norm2(x)))


def _attend_elementwise(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                        bias: Optional[torch.Tensor]) -> torch.Tensor:
    """Attention of a token or two over a few, without a matrix product: faster for many rows (docs/results.md).

    ``query [B, H, K, D]``, ``keys`` and ``values [B, H, T, D]``, ``bias [B, 1, K, T]``; returns ``[B, H, K, D]``.
    """
    scores = (query.unsqueeze(3) * keys.unsqueeze(2)).sum(-1) * query.shape[-1] ** -0.5  # [B, H, K, T]
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(3).unsqueeze(-1) * values.unsqueeze(2)).sum(3)
