"""The transformer's weights laid out for inference, made anew for each search. Knows LightZero's modules."""
import functools
import math
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from lzero.model.common import SimNorm
from torch import nn

Function = Callable[..., Any]

MANY_ROWS = {'cpu': 128, 'cuda': 512}
"""From here on more, but faster kernels pay although each is launched from Python (docs/results.md)."""

MANY_CAPTURED_ROWS = 32
"""The same inside a CUDA graph, where launches cost little."""

MANY_NUMBERS = 4096
"""From here on the passes of :func:`_gelu` over memory cost less than PyTorch's tanh on a CPU."""

_GELU_SLOPE = torch.tensor(2 * (2 / math.pi) ** 0.5)


class Layer(NamedTuple):
    norm1: Function
    qkv: Function  # [B, E] -> [B, 3E]: query, key, value
    proj: Function
    norm2: Function
    mlp: Function
    gates: Optional[Tuple[Function, Function]]


class Weights(NamedTuple):
    """
    Overview:
        The model as it is now, laid out for one search: fused projections, and modules as plain functions.
    """
    layers: List[Layer]
    norm: Function
    rewards: Function
    observations: Function
    policy: Function
    value: Function
    many_rows: int
    shift: Optional[torch.Tensor]  # [2W, L, 2, E]: what learned positions add to keys and values; None with rotary


def _function(module: nn.Module, many_rows: int) -> Function:
    """A module without the cost of calling modules, which is as long as a small layer takes: its hooks do not run."""
    if type(module) is nn.Sequential:
        parts = [part for part in module if module.training or not isinstance(part, nn.Dropout)]
        functions = [_function(part, many_rows) for part in parts]

        def run(x: torch.Tensor) -> torch.Tensor:
            for function in functions:
                x = function(x)
            return x

        return run
    if type(module) is nn.Linear:
        return _linear(module.weight, module.bias, many_rows)
    if type(module) is nn.LayerNorm:
        shape, weight, bias, eps = module.normalized_shape, module.weight, module.bias, module.eps
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)
    if type(module) is nn.GELU and module.approximate == 'tanh':
        return _gelu
    if type(module) is SimNorm:
        return functools.partial(_sim_norm, dim=module.dim)  # type: ignore[arg-type]
    return module.forward


def _linear(weight: torch.Tensor, bias: Optional[torch.Tensor], many_rows: int) -> Function:
    if bias is None or not weight.is_cuda:
        return lambda x: F.linear(x, weight, bias)
    # With the bias fused in, cuBLAS picks float32 kernels that take up to twice as long for many rows.
    return lambda x: F.linear(x, weight, bias) if x.shape[0] < many_rows else F.linear(x, weight).add_(bias)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU's tanh approximation (https://arxiv.org/abs/1606.08415, section 2), written with the sigmoid that it equals:
    ``x (1 + tanh(u)) / 2 = x sigmoid(2 u)``, ``u = sqrt(2 / pi) (x + 0.044715 x^3)``."""
    if x.is_cuda or x.numel() < MANY_NUMBERS:
        return F.gelu(x, approximate='tanh')
    twice_u = torch.addcmul(_GELU_SLOPE, x, x, value=0.044715 * _GELU_SLOPE.item()).mul_(x)
    return twice_u.sigmoid_().mul_(x)


def _sim_norm(x: torch.Tensor, dim: int) -> torch.Tensor:
    """SimNorm's softmax over groups; PyTorch's own takes four times as long for short groups on a CPU."""
    groups = x.reshape(x.shape[:-1] + (-1, dim))
    if x.is_cuda:
        return groups.softmax(-1).view(x.shape)
    groups = (groups - groups.amax(-1, keepdim=True)).exp_()
    return groups.div_(groups.sum(-1, keepdim=True)).view(x.shape)


def read_weights(world_model: Any, positions: int, many_rows: int) -> Weights:
    """
    Overview:
        The model as it is now.
    Arguments:
        - world_model (:obj:`Any`): A LightZero world model.
        - positions (:obj:`int`): Learned positions that a window has; 0 with rotary ones.
        - many_rows (:obj:`int`): From how many rows on to launch more, but faster kernels.
    Returns:
        - weights (:obj:`Weights`): Fused copies of the projections, and functions on everything else in place.
    """
    def read(module: nn.Module) -> Function:
        return _function(module, many_rows)

    layers, shifts = [], []
    for block in world_model.transformer.blocks:
        attn = block.attn
        layers.append(Layer(
            norm1=read(block.ln1),
            qkv=_linear(
                torch.cat([attn.query.weight, attn.key.weight, attn.value.weight]),
                torch.cat([attn.query.bias, attn.key.bias, attn.value.bias]), many_rows
            ),
            proj=read(nn.Sequential(attn.proj, attn.resid_drop) if attn.training else attn.proj),
            norm2=read(block.ln2),
            mlp=read(block.mlp),
            gates=(block.gate1.forward, block.gate2.forward) if block.gru_gating else None,
        ))
        if positions:
            embeddings = world_model.pos_emb.weight[:positions]
            shifts += [F.linear(embeddings, attn.key.weight), F.linear(embeddings, attn.value.weight)]
    shift = None
    if positions:
        # LightZero moves a kept key from position p to p - 2 by adding W pos(p - 2) - W pos(p), ``pos_emb_diff_k``.
        # These differences telescope: pages hold k - W pos(p), and W pos(p) is added for the place a token has now.
        shift = torch.stack(shifts, dim=1).view(positions, len(layers), 2, -1)
    return Weights(
        layers, read(world_model.transformer.ln_f), read(world_model.head_rewards.head_module),
        read(world_model.head_observations.head_module), read(world_model.head_policy.head_module),
        read(world_model.head_value.head_module), many_rows, shift
    )
