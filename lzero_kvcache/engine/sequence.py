"""The transformer over whole sequences of observations and actions, without pages, for the targets of a training batch.

Shapes: ``B`` rows, ``L`` observations of a sequence, ``E`` embedding, ``A`` numbers of a continuous action,
``T = 2L - 1`` tokens ``[o0, a0, o1, ..., oL-1]``.
"""
from typing import Optional

import torch
import torch.nn.functional as F

from .step import with_residuals
from .weights import Geometry, Weights


def observe(geometry: Geometry, weights: Weights, latents: torch.Tensor, actions: torch.Tensor,
            positions: Optional[torch.Tensor]) -> torch.Tensor:
    """Outputs ``[B, L, E]`` of observations ``latents [B, L, E]``. The actions between them are ``[B, L - 1]`` or
    ``[B, L - 1, A]``; ``positions [B]`` are the rotary positions of the first observations."""
    rows, steps, dim = latents.shape
    tokens = 2 * steps - 1
    x = latents.new_empty(rows, tokens, dim)
    x[:, ::2] = latents
    x[:, 1::2] = weights.embed_action(actions.flatten(0, 1)).view(rows, steps - 1, dim)
    place = torch.arange(tokens, device=x.device)
    if positions is None:
        x += weights.position_table[:tokens]
    else:
        factors = weights.position_table[positions.unsqueeze(1) + place].unsqueeze(2)  # [B, T, 1, D / 2]
    causal = place.unsqueeze(1) >= place
    x = x.view(rows * tokens, dim)
    for layer in weights.layers:
        qkv = layer.qkv(layer.norm1(x)).view(rows, tokens, 3, geometry.heads, geometry.head_dim)
        query, key, value = qkv.unbind(2)
        if positions is not None:
            query, key = _rotated(query, factors), _rotated(key, factors)
        if layer is weights.layers[-1]:  # nobody needs its outputs for actions
            query, causal, x = query[:, ::2], causal[::2], x.view(rows, tokens, dim)[:, ::2].reshape(-1, dim)
        y = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=causal
        )
        x = with_residuals(layer, x, layer.proj(y.transpose(1, 2).reshape(-1, dim)))
    return weights.norm(x).view(rows, steps, dim)


def _rotated(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * factors).flatten(-2)
