"""One or two tokens for every row of a batch over gathered pages. Knows the transformer's weights; no pools.

Shapes: ``B`` rows, ``E`` embedding, ``H`` heads, ``D = E / H``, ``L`` layers, ``W`` pages of a window, at the most
``context_length / 2``: the context's, left-aligned, and in the last column the page that the step writes. A window has
``2W`` slots
``[-, o0, a0, o1, ..., action, observation]``; slot 0 belongs to an action that was never there and is never read, so
that the token at position ``p`` of a context stands in slot ``p + 1``.
"""
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F

from ..cache.pages import Rows
from .slab import Slab
from .weights import MANY_CAPTURED_ROWS, MANY_ROWS, Weights, read_weights

SHORT_WINDOW = 64
"""Slots up to which attention is cheaper without a matrix product, for many rows."""

LEAST_PAGES = 16
"""Pages of the shortest window; longer ones double, so that few CUDA graphs are captured while contexts grow."""

Packed = Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class StepOutput(NamedTuple):
    """
    Overview:
        What a step predicts for each row; the names are LightZero's.
    """
    output_sequence: torch.Tensor  # [B, 1, E]
    latent_state: torch.Tensor  # [B, 1, E]
    logits_rewards: Optional[torch.Tensor]  # [B, 1, support]; None where no action was taken
    logits_policy: torch.Tensor  # [B, 1, actions], or [B, 1, 2 x actions]: mu and sigma
    logits_value: torch.Tensor  # [B, 1, support]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> 'StepOutput':
        """
        Overview:
            The same output with a function applied to each of its tensors.
        """
        return StepOutput(*(None if part is None else function(part) for part in self))  # type: ignore[arg-type]


class Engine:
    """
    Overview:
        The transformer's inference over pages. It reads the world model's own modules and holds no weights.
    Arguments:
        - world_model (:obj:`Any`): A LightZero world model that :func:`check_served` lets pass.
    """

    def __init__(self, world_model: Any) -> None:
        config = world_model.config
        self._wm = world_model
        self.heads, self.embed_dim = config.num_heads, config.embed_dim
        self.head_dim = self.embed_dim // self.heads
        self.layers = config.num_layers
        self.rotary = config.rotary_emb
        self.width = config.context_length // 2
        self.max_seq_len = config.max_seq_len if self.rotary else 0
        self._masks: Dict[Tuple[int, torch.device], Tuple[torch.Tensor, torch.Tensor]] = {}
        self._action_rows = (config.action_space_size + 1) // 2 if config.continuous_action_space else 1

    @property
    def training(self) -> bool:
        """Whether dropout is live."""
        return self._wm.training

    def addresses(self) -> Tuple[int, ...]:
        """
        Overview:
            Where every weight is that a step reads; it changes when storage moves, not when values do.
        """
        wm = self._wm
        modules = [wm.transformer, wm.act_embedding_table, wm.head_rewards, wm.head_observations, wm.head_policy,
                   wm.head_value] + ([] if self.rotary else [wm.pos_emb])
        return tuple(
            tensor.data_ptr() for module in modules for group in (module.parameters(), module.buffers())
            for tensor in group
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are now."""
        return self._wm.transformer.ln_f.weight.device

    def weights(self, captured: bool = False) -> Weights:
        """
        Overview:
            The model as it is now.
        Arguments:
            - captured (:obj:`bool`): For a CUDA graph, where more launches cost little.
        """
        many_rows = MANY_CAPTURED_ROWS if captured else MANY_ROWS.get(self.device.type, MANY_ROWS['cpu'])
        return read_weights(self._wm, 0 if self.rotary else 2 * self.width, many_rows)

    def embed_action(self, action: torch.Tensor) -> torch.Tensor:
        """
        Overview:
            The tokens of actions.
        Arguments:
            - action (:obj:`torch.Tensor`): ``[B]`` or ``[B, 1]`` indices, or ``[B, A]`` continuous actions.
        Returns:
            - token (:obj:`torch.Tensor`): ``[B, E]``.
        """
        if self._wm.continuous_action_space:
            # SimNorm needs the time dimension that LightZero gives it.
            return self._wm.act_embedding_table(action.float().reshape(action.shape[0], 1, -1)).squeeze(1)
        return self._wm.act_embedding_table(action.reshape(-1))

    # ---- numbers that travel to the device together ----------------------------------------------------------------

    def pack(self, rows: Rows, pages: np.ndarray, angles: Tuple[np.ndarray, np.ndarray],
             action: Optional[np.ndarray]) -> np.ndarray:
        """
        Overview:
            Everything that a step needs from the host as one array.
        Arguments:
            - rows (:obj:`Rows`): The contexts, tables ``[B, W - 1]`` and counts ``[B]``.
            - pages (:obj:`np.ndarray`): The page that each row writes ``[B]``.
            - angles (:obj:`Tuple`): Rotary positions of the action and the observation, ``[B]`` each.
            - action (:obj:`Optional[np.ndarray]`): ``[B]`` or ``[B, A]``; None if it is on the device already.
        Returns:
            - numbers (:obj:`np.ndarray`): ``[N, B]``, int64; ``N`` goes by the longest context.
        """
        tables, counts = rows
        width = self._pages_of_window(int(counts.max()))
        self._masks_of(2 * width, self.device)  # here, and not within a step that is captured
        numbers = np.zeros((width + 3 + self._action_rows, len(counts)), dtype=np.int64)
        numbers[:width - 1], numbers[width - 1], numbers[width] = tables.T[:width - 1], pages, counts
        if self.rotary:
            numbers[width + 1], numbers[width + 2] = angles[0] % self.max_seq_len, angles[1] % self.max_seq_len
        else:
            numbers[width + 1], numbers[width + 2] = np.maximum(2 * counts - 1, 0), 2 * counts
        if action is None:
            return numbers
        if not self._wm.continuous_action_space:
            numbers[width + 3] = np.asarray(action).reshape(-1)
        else:  # two float32 in one int64
            padded = np.zeros((len(counts), 2 * self._action_rows), dtype=np.float32)
            padded[:, :self._wm.action_space_size] = np.asarray(action).reshape(len(counts), -1)
            numbers[width + 3:] = padded.view(np.int64).T
        return numbers

    def unpack(self, numbers: torch.Tensor) -> Packed:
        """
        Overview:
            Tables ``[B, W]``, counts ``[B]``, positions ``[2, B]`` and actions of what :meth:`pack` made.
        """
        width = len(numbers) - 3 - self._action_rows
        action = numbers[width + 3]
        if self._wm.continuous_action_space:
            pairs = numbers[width + 3:].T.clone(memory_format=torch.contiguous_format)
            action = pairs.view(torch.float32)[:, :self._wm.action_space_size]
        return numbers[:width].T, numbers[width], numbers[width + 1:width + 3], action

    def filler(self, page: int, count: int) -> np.ndarray:
        """
        Overview:
            A column ``[N, 1]`` of packed numbers for rows that only fill up a batch, writing to ``page``.
        """
        column = np.zeros((count, 1), dtype=np.int64)
        width = count - 3 - self._action_rows
        column[width - 1], column[width] = page, 1
        return column

    def _pages_of_window(self, longest: int) -> int:
        """For a context of ``longest`` pages and the one that a step writes."""
        pages = LEAST_PAGES
        while pages <= longest:
            pages *= 2
        return min(pages, self.width)

    def for_search(self, output: StepOutput) -> torch.Tensor:
        """
        Overview:
            What a search takes to the host: reward and value as scalars, and policy logits.
        Returns:
            - packed (:obj:`torch.Tensor`): ``[B, 2 + P]``.
        """
        assert output.logits_rewards is not None
        rows = output.logits_value.shape[0]
        logits = torch.cat([output.logits_rewards.squeeze(1), output.logits_value.squeeze(1)])  # [2B, support]
        size = logits.shape[1]
        support = torch.arange(size, device=logits.device, dtype=logits.dtype) - (size - 1) // 2
        value = logits.softmax(1) @ support
        # The inverse of the value rescaling: MuZero (https://arxiv.org/abs/1911.08265), appendix F.
        root = ((value.abs() * 0.004 + 1.004004).sqrt() - 1) * 500  # with epsilon = 0.001
        scalars = value.sign() * (root * root - 1)
        return torch.cat([scalars.view(2, rows).T, output.logits_policy.squeeze(1)], dim=1)

    # ---- steps -----------------------------------------------------------------------------------------------------

    def begin(self, weights: Weights, slab: Slab, pages: torch.Tensor, latent: torch.Tensor,
              angle: Optional[torch.Tensor]) -> None:
        """
        Overview:
            Start contexts anew: write one page for each row that holds its observation alone.
        Arguments:
            - weights (:obj:`Weights`): From :meth:`weights`.
            - slab (:obj:`Slab`): Where the pages are.
            - pages (:obj:`torch.Tensor`): Page ids ``[B]``.
            - latent (:obj:`torch.Tensor`): Observation tokens ``[B, E]``.
            - angle (:obj:`Optional[torch.Tensor]`): Rotary positions ``[B]``; unused with learned ones.
        """
        self._observe_alone(weights, slab, pages, latent, angle, predicts=False)

    def first(self, weights: Weights, slab: Slab, pages: torch.Tensor, latent: torch.Tensor,
              angle: Optional[torch.Tensor]) -> StepOutput:
        """
        Overview:
            The first observations of episodes: as :meth:`begin`, with predictions.
        """
        x = self._observe_alone(weights, slab, pages, latent, angle, predicts=True)
        return self._predict(weights, x, latent, None)

    def _observe_alone(self, weights: Weights, slab: Slab, pages: torch.Tensor, latent: torch.Tensor,
                       angle: Optional[torch.Tensor], predicts: bool) -> torch.Tensor:
        window = latent.new_zeros(latent.shape[0], 2, self.layers, 2, self.embed_dim)
        positions = angle if self.rotary and angle is not None else torch.zeros_like(pages)
        x = self._tokens(weights, window, 2, latent.unsqueeze(1), self._places(positions.unsqueeze(0)), None, predicts)
        if weights.shift is not None:
            window[:, 1] -= weights.shift[0]
        slab.write(pages, window)
        return x

    def step(self, weights: Weights, slab: Slab, tables: torch.Tensor, counts: torch.Tensor, action: torch.Tensor,
             positions: torch.Tensor, latent: Optional[torch.Tensor] = None) -> StepOutput:
        """
        Overview:
            An action and an observation token for each row; the new page is written to the last column's ids.
        Arguments:
            - weights (:obj:`Weights`): From :meth:`weights`.
            - slab (:obj:`Slab`): Where the pages are.
            - tables (:obj:`torch.Tensor`): Page ids ``[B, W]``, the context's left-aligned, the new page last.
            - counts (:obj:`torch.Tensor`): Pages of each context ``[B]``; 0 starts one, its action is not looked at.
            - action (:obj:`torch.Tensor`): Actions as :meth:`embed_action` takes them.
            - positions (:obj:`torch.Tensor`): Positions of both tokens ``[2, B]``.
            - latent (:obj:`Optional[torch.Tensor]`): Observed tokens ``[B, E]``; None: the predicted ones.
        Returns:
            - output (:obj:`StepOutput`): The predictions; no reward where the observation is given.
        """
        window = slab.read(tables)
        last = window.shape[1] - 1
        if weights.shift is not None:
            window[:, 1:last - 1] += weights.shift[:last - 2]
        output = self._two_tokens(weights, window, counts, action, positions, latent)
        page = window[:, last - 1:]
        if weights.shift is not None:
            page = page - weights.shift[positions.T]
        slab.write(tables[:, -1], page)
        return output

    def step_alone(self, weights: Weights, state: torch.Tensor, action: torch.Tensor,
                   positions: Optional[torch.Tensor]) -> StepOutput:
        """
        Overview:
            A state, an action and the predicted observation, with no context and nothing stored: reanalysis.
        Arguments:
            - weights (:obj:`Weights`): From :meth:`weights`.
            - state (:obj:`torch.Tensor`): Observation tokens ``[B, E]``.
            - action (:obj:`torch.Tensor`): Actions as :meth:`embed_action` takes them.
            - positions (:obj:`Optional[torch.Tensor]`): Rotary positions of the three tokens ``[3, B]``.
        Returns:
            - output (:obj:`StepOutput`): The predictions.
        """
        rows = state.shape[0]
        window = state.new_empty(rows, 4, self.layers, 2, self.embed_dim)
        if positions is None:
            positions = torch.arange(3, device=state.device).unsqueeze(1).expand(3, rows)
        places = self._places(positions)
        pair = torch.stack([state, self.embed_action(action)], dim=1)
        causal = self._masks_of(3, state.device)[1][1:, :, :, :2]  # of a context of one page, the state's
        x = self._tokens(weights, window, 3, pair, places[:, :2], causal)
        return self._observe_predicted(weights, window, x, places[:, 2:], None)

    def _two_tokens(self, weights: Weights, window: torch.Tensor, counts: torch.Tensor, action: torch.Tensor,
                    positions: torch.Tensor, latent: Optional[torch.Tensor]) -> StepOutput:
        slots = window.shape[1]
        seen, given = self._masks_of(slots, window.device)
        token, places = self.embed_action(action), self._places(positions)
        if latent is not None:
            pair = torch.stack([token, latent], dim=1)
            x = self._tokens(weights, window, slots, pair, places, given.index_select(0, counts)[..., :slots - 1])
            return self._predict(weights, x, latent, None)
        bias = seen.index_select(0, counts)
        x = self._tokens(weights, window, slots - 1, token.unsqueeze(1), places[:, :1], bias[..., :slots - 2])
        return self._observe_predicted(weights, window, x, places[:, 1:], bias[..., :slots - 1])

    def _observe_predicted(self, weights: Weights, window: torch.Tensor, x: torch.Tensor, places: torch.Tensor,
                           bias: Optional[torch.Tensor]) -> StepOutput:
        token = x.unsqueeze(1)
        rewards, latent = weights.rewards(token), weights.observations(token)
        x = self._tokens(weights, window, window.shape[1], latent, places, bias)
        return self._predict(weights, x, latent.squeeze(1), rewards)

    def _predict(self, weights: Weights, x: torch.Tensor, latent: torch.Tensor,
                 rewards: Optional[torch.Tensor]) -> StepOutput:
        x = x.unsqueeze(1)
        policy = weights.policy(x)
        if isinstance(policy, dict):
            policy = torch.cat([policy['mu'], policy['sigma']], dim=-1)
        return StepOutput(x, latent.unsqueeze(1), rewards, policy, weights.value(x))

    def _tokens(self, weights: Weights, window: torch.Tensor, end: int, x: torch.Tensor, places: torch.Tensor,
                bias: Optional[torch.Tensor], predicts: bool = True) -> torch.Tensor:
        """``K`` tokens ``x [B, K, E]`` in slots ``end - K`` to ``end - 1``, over slots 1 to ``end - 1`` and ``bias``
        ``[B, 1, K, end - 1]``; writes their keys and values there. The last one's output ``[B, E]``, where it predicts.
        """
        rows, tokens, dim = x.shape
        heads, head_dim = self.heads, self.head_dim
        training = self._wm.training
        if not self.rotary:
            x = x + places
        x = x.reshape(rows * tokens, dim)
        if training:
            x = self._wm.transformer.drop(x)
        alone = end == 2 and not training  # attention of a token over itself is its value
        elementwise = not training and end <= SHORT_WINDOW and rows >= weights.many_rows
        by_head = window.view(rows, -1, self.layers, 2, heads, head_dim)
        slots = by_head[:, end - tokens:end].unbind(2)
        contexts = by_head[:, 1:end].permute(2, 3, 0, 4, 1, 5).unbind(0)  # [2, B, H, T, D] each
        for layer, slot, context in zip(weights.layers, slots, contexts):
            qkv = layer.qkv(layer.norm1(x))
            vectors = qkv.view(rows, tokens, 3, heads, head_dim)
            if self.rotary:
                pairs = torch.view_as_complex(qkv.view(rows, tokens, 3 * heads, head_dim // 2, 2)[:, :, :2 * heads])
                query, key = torch.view_as_real(pairs * places).view(rows, tokens, 2, heads, head_dim).unbind(2)
                key_slot, value_slot = slot.unbind(2)
                key_slot.copy_(key)
                value_slot.copy_(vectors[:, :, 2])
            else:
                query = vectors[:, :, 0]
                slot.copy_(vectors[:, :, 1:])
            if slot is slots[-1]:  # from here on only what predicts is wanted
                if not predicts:
                    break
                if bias is not None and tokens > 1:
                    query, x, bias, tokens = query[:, -1:], x.view(rows, tokens, dim)[:, -1], bias[:, :, -1:], 1
            if alone:
                y = qkv[:, 2 * dim:]
            else:
                keys, values = context.unbind(0)
                query = query.transpose(1, 2)
                if elementwise:
                    y = _attend(query, keys, values, bias)
                else:
                    y = F.scaled_dot_product_attention(
                        query, keys, values, attn_mask=bias,
                        dropout_p=self._wm.config.attn_pdrop if training else 0.0
                    )
                y = y.transpose(1, 2)
            y = layer.proj(y.reshape(rows * tokens, dim))
            if layer.gates is None:
                x = x + y
                x = x + layer.mlp(layer.norm2(x))
            else:
                x = layer.gates[0](x, y)
                x = layer.gates[1](x, layer.mlp(layer.norm2(x)))
        return weights.norm(x) if predicts else x

    def _places(self, positions: torch.Tensor) -> torch.Tensor:
        """What tells tokens at positions ``[K, B]`` where they are: rotary factors ``[B, K, 1, D / 2]`` for queries and
        keys, or learned embeddings ``[B, K, E]`` to add."""
        if self.rotary:
            return self._wm.transformer.freqs_cis[positions].transpose(0, 1).unsqueeze(-2)
        return F.embedding(positions, self._wm.pos_emb.weight).transpose(0, 1)

    def _masks_of(self, slots: int, device: torch.device) -> Tuple[torch.Tensor, torch.Tensor]:
        """Additive masks by count of pages, padded: of one token ``[W, 1, 1, T]``, and of an action with an observation
        that is given ``[W, 1, 2, T]``."""
        masks = self._masks.get((slots, device))
        if masks is None:
            slot = torch.arange(1, slots, device=device)
            count = torch.arange((slots + 1) // 2, device=device).unsqueeze(1)
            seen = (slot < 2 * count) | (slot >= slots - 2)
            # An action does not see what follows it, and what starts an episode sees no action before it.
            given = seen & ((slot != slots - 2) | (count > 0))
            hidden = ~torch.stack([seen, seen & (slot != slots - 1), given], dim=1)
            # CUDA's attention reads masks eight numbers at a time.
            padded = torch.zeros(len(count), 1, 3, -(-(slots - 1) // 8) * 8, device=device)
            padded[:, 0, :, :slots - 1].masked_fill_(hidden, float('-inf'))
            self._masks[slots, device] = masks = (padded[:, :, :1].contiguous(), padded[:, :, 1:].contiguous())
        return masks


def _attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
            bias: Optional[torch.Tensor]) -> torch.Tensor:
    """Attention of a token or two over a few, without a matrix product: faster for many rows (docs/results.md).

    ``query [B, H, K, D]``, ``keys`` and ``values [B, H, T, D]``, ``bias [B, 1, K, T]``; returns ``[B, H, K, D]``.
    """
    scores = (query.unsqueeze(3) * keys.unsqueeze(2)).sum(-1) * query.shape[-1] ** -0.5  # [B, H, K, T]
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(3).unsqueeze(-1) * values.unsqueeze(2)).sum(3)
