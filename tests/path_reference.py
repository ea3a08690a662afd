"""LightZero's answers for one environment without any cache, from its weights. No test lives here."""
import math
from typing import Any, List, NamedTuple, Tuple

import numpy as np
import torch
import torch.nn as nn
from oracle import Answer, Batch, Expand, Root
from small_models import adapter


class PathReference(Batch):
    """
    One environment's answers without any cache: every node is computed by one forward of the transformer's weights
    over all tokens of the node's true path, each token seeing the window that it had when it came. This is what
    LightZero means, computed another way; it asks by node, so equal latent states are not mixed.

    Only the arithmetic of layers and heads is LightZero's. Angles of rotary positions are those of its calls.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        assert self.world_model.env_num == 1
        self._nodes: List[Path] = []
        self._found: List[bool] = []

    def root(self, event: Root) -> Answer:
        self._timestep, = event.timesteps
        action, = event.actions
        latent = self._encode(event.obs)
        if action is None:
            path = Path(self.world_model).begin(latent, 2 * self._timestep)
        else:
            if self._found and self._found[0]:
                path = self._nodes[0]
            else:
                path = Path(self.world_model).begin(self._encode(event.last_obs), 2 * self._timestep)
            path = path.add(self._embed(action), 2 * self._timestep - 1).add(latent, 2 * self._timestep)
        answer = dict(latent=latent.view(1, 1, -1), **path.predictions())
        self._nodes, self._found, self._latents = [path.slide()], [True], [latent]
        return answer

    def expand(self, event: Expand) -> Answer:
        (parent, ), (action, ), (depth, ) = event
        if self._found[parent]:
            path = self._nodes[parent]
        else:
            path = Path(self.world_model).begin(self._latents[parent], 2 * self._timestep)
        angle = 2 * (self._timestep + depth)
        path = path.add(self._embed(action), angle + 1)
        latent, reward = path.next_latent(), path.reward()
        path = path.add(latent, angle + 2)
        answer = dict(latent=latent.view(1, 1, -1), reward=reward, **path.predictions())
        self._nodes.append(path.slide())
        self._found.append(True)
        self._latents.append(latent)
        return answer

    def clear(self, env: int) -> None:
        self._found[0] = False

    def clear_search(self) -> None:
        self._found[1:] = [False] * len(self._found[1:])

    def _encode(self, obs: np.ndarray) -> torch.Tensor:
        return self.world_model.tokenizer.encode_to_obs_embeddings(torch.from_numpy(obs)).view(-1)

    def _embed(self, action: Any) -> torch.Tensor:
        action = torch.from_numpy(np.asarray([action]))  # [1], or [1, A]
        return self.world_model.act_embedding_table(action.float() if action.ndim == 2 else action).view(-1)


class Token(NamedTuple):
    """One token of a path: its embedding [E], its rotary angle, and the first token that it could see."""
    embedding: torch.Tensor
    angle: int
    start: int


class Path:
    """All tokens from where a context was begun to a node, and the first that the next token will see."""

    def __init__(self, world_model: nn.Module, tokens: Tuple[Token, ...] = (), start: int = 0) -> None:
        self.world_model, self.tokens, self.start = world_model, tokens, start

    def begin(self, latent: torch.Tensor, angle: int) -> 'Path':
        """The path that consists of one observation."""
        return Path(self.world_model, (Token(latent, angle, 0), ))

    def add(self, embedding: torch.Tensor, angle: int) -> 'Path':
        """The path with one more token."""
        return Path(self.world_model, self.tokens + (Token(embedding, angle, self.start), ), self.start)

    def slide(self) -> 'Path':
        """The path after it was stored: a window of ``context_length - 1`` tokens loses its two oldest."""
        full = len(self.tokens) - self.start >= self.world_model.context_length - 1
        return Path(self.world_model, self.tokens, self.start + 2 if full else self.start)

    def predictions(self) -> Answer:
        """Policy and value after a path that ends with an observation, [1, ...] each."""
        x = self._output()
        return dict(policy=self.world_model.head_policy(x, num_steps=1, prev_steps=0)[:, 0],
                    value=self.world_model.head_value(x, num_steps=1, prev_steps=0)[:, 0])

    def next_latent(self) -> torch.Tensor:
        """The latent state [E] that follows a path that ends with an action."""
        return self.world_model.head_observations(self._output(), num_steps=1, prev_steps=1).view(-1)

    def reward(self) -> torch.Tensor:
        """The reward of the action with which a path ends, [1, ...]."""
        return self.world_model.head_rewards(self._output(), num_steps=1, prev_steps=1)[:, 0]

    def _output(self) -> torch.Tensor:
        """The transformer's output for the last token, [1, 1, E]."""
        model, transformer = self.world_model, self.world_model.transformer
        count = len(self.tokens)
        index = torch.arange(count)
        starts = torch.tensor([token.start for token in self.tokens])
        x = torch.stack([token.embedding for token in self.tokens])  # [T, E]
        visible = (index[None, :] >= starts[:, None]) & (index[None, :] <= index[:, None])  # [T query, T key]
        shifts = None
        if model.config.rotary_emb:
            angles = torch.tensor([token.angle for token in self.tokens]) % adapter().angles_of(model.config)
        else:
            # A token takes the position embedding of its place in the window that it came into. When the window slides,
            # its keys and values are moved to the place that it has then.
            table = model.pos_emb.weight
            places_then = index - starts
            places_now = (index[None, :] - starts[:, None]).clamp(0, len(table) - 1)  # [T query, T key]
            x = x + table[places_then]
            shifts = table[places_now] - table[places_then][None, :]  # [T query, T key, E]
        for block in transformer.blocks:
            attention, h = block.attn, block.ln1(x)
            query, key, value = attention.query(h), attention.key(h), attention.value(h)  # [T, E]
            if shifts is None:
                query, key = (self._rotate(t, angles) for t in (query, key))
                key, value = (t.expand(count, count, -1) for t in (key, value))
            else:
                key = key + shifts @ attention.key.weight.T  # [T query, T key, E]
                value = value + shifts @ attention.value.weight.T
            h = attention.proj(self._attend(query, key, value, visible))
            if block.gru_gating:
                x = block.gate1(x, h)
                x = block.gate2(x, adapter().mlp_of(block)(block.ln2(x)))
            else:
                x = x + h
                x = x + adapter().mlp_of(block)(block.ln2(x))
        return transformer.ln_f(x)[-1].view(1, 1, -1)

    def _rotate(self, t: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """Turn the pairs of every head by the tokens' angles; t is [T, E]."""
        turned = torch.view_as_complex(t.view(len(t), self.world_model.num_heads, -1, 2))
        transformer = self.world_model.transformer
        table = transformer.freqs_cis
        if adapter().ANGLES_GROW:
            longer = adapter().longer_table(transformer, int(angles.min()), int(angles.max()))
            table = table if longer is None else longer
        turned = turned * table[angles][:, None]
        return torch.view_as_real(turned).reshape(t.shape)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor
                ) -> torch.Tensor:
        """Attention in which every query sees keys and values of its own: query [T, E], key and value [T, T, E]."""
        heads = self.world_model.num_heads
        query = query.view(len(query), 1, heads, -1)
        key, value = (t.view(*t.shape[:2], heads, -1) for t in (key, value))
        scores = (query * key).sum(-1) / math.sqrt(key.shape[-1])  # [T query, T key, heads]
        weights = scores.masked_fill(~visible[..., None], float('-inf')).softmax(dim=1)
        return (weights[..., None] * value).sum(1).flatten(1)
