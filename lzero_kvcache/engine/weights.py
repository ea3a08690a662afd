"""A model's weights as the host hands them to the engine, which needs nothing else of the host.

``E`` embedding, ``L`` layers, ``W`` pages of a window, ``A`` actions.
"""
import math
from dataclasses import dataclass
from typing import Any, Callable, List, NamedTuple, Optional, Protocol, Tuple

import torch
import torch.nn.functional as F

Function = Callable[..., Any]

MANY_NUMBERS = 4096
"""From so many numbers on, :func:`gelu` by sigmoid is faster than PyTorch's tanh on a CPU."""

_GELU_SLOPE = torch.tensor(2 * (2 / math.pi) ** 0.5)


@dataclass(frozen=True)
class Linear:
    """A product with a matrix, and a bias."""
    weight: torch.Tensor
    bias: Optional[torch.Tensor]
    many_rows: int  # for so many rows or more, a product and then the bias are faster than both in one
    matmul: str = 'float32'  # precision of this product in searches on a GPU; or 'tf32', 'bfloat16'

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # With the bias fused in, cuBLAS picks float32 kernels that take up to twice as long for many rows.
        if not x.is_cuda or self.bias is None or x.shape[0] < self.many_rows:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight).add_(self.bias)


@dataclass(frozen=True)
class Norm:
    """A LayerNorm."""
    shape: Tuple[int, ...]
    weight: Optional[torch.Tensor]
    bias: Optional[torch.Tensor]
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Chain:
    """One function after another."""
    functions: Tuple[Function, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for function in self.functions:
            x = function(x)
        return x


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU's tanh approximation (https://arxiv.org/abs/1606.08415, section 2), written with the sigmoid that it equals:
    ``x (1 + tanh(u)) / 2 = x sigmoid(2 u)``, ``u = sqrt(2 / pi) (x + 0.044715 x^3)``."""
    if x.is_cuda or x.numel() < MANY_NUMBERS:
        return F.gelu(x, approximate='tanh')
    twice_u = torch.addcmul(_GELU_SLOPE, x, x, value=0.044715 * _GELU_SLOPE.item()).mul_(x)
    return twice_u.sigmoid_().mul_(x)


def to_scalar(logits: torch.Tensor) -> torch.Tensor:
    """Logits over a support ``[N, S]`` as numbers ``[N]``, by the inverse of the value rescaling: MuZero
    (https://arxiv.org/abs/1911.08265), appendix F, epsilon = 0.001."""
    size = logits.shape[1]
    support = torch.arange(size, device=logits.device, dtype=logits.dtype) - (size - 1) // 2
    value = logits.softmax(1) @ support
    root = ((value.abs() * 0.004 + 1.004004).sqrt() - 1) * 500
    return value.sign() * (root * root - 1)


class Geometry(NamedTuple):
    """Sizes of a model, which never change."""
    layers: int
    heads: int
    embed_dim: int
    window_pages: int  # W: context_length / 2
    action_size: int  # numbers of a continuous action, or how many actions there are
    continuous: bool  # whether actions are vectors
    rotary_positions: int  # angles that there are before they repeat; 0 with learned positions

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.heads

    @property
    def rotary(self) -> bool:
        return self.rotary_positions > 0

    @property
    def action_rows(self) -> int:
        """How many int64 hold one action: two float32 each, or one index."""
        return (self.action_size + 1) // 2 if self.continuous else 1


class Layer(NamedTuple):
    """One block of the transformer."""
    norm1: Function
    qkv: Linear  # [B, E] -> [B, 3E]: query, key, value
    proj: Function
    norm2: Function
    mlp: Function
    gates: Optional[Tuple[Function, Function]]


class Weights(NamedTuple):
    """The model's current weights: fused projections, and every module as a plain function."""
    layers: List[Layer]
    norm: Function
    embed_action: Function  # [B] indices or [B, A] vectors -> [B, E]
    embed_dropout: Optional[Function]  # None outside training
    attention_dropout: float
    rewards: Function
    observations: Function
    policy: Function
    value: Function
    position_table: torch.Tensor  # [positions, E] learned embeddings, or [positions, D / 2] rotary factors
    shift: Optional[torch.Tensor]  # [2W, L, 2, E]: what learned positions add to keys and values; None with rotary
    many_rows: int  # for so many rows or more, several fast kernels beat one slow one
    captured: bool  # whether they are for a CUDA graph, where launches cost little
    training: bool  # whether dropout is live


class Source(Protocol):
    """Where weights come from: one model, as it is now."""
    geometry: Geometry

    def read(self, captured: bool) -> Weights:
        """Its weights; the argument is ``Weights.captured``."""

    def shift(self) -> Optional[torch.Tensor]:
        """``Weights.shift``."""

    def addresses(self) -> Tuple[int, ...]:
        """Where the weights lie; they change when the storage of one moves."""

    def device(self) -> torch.device:
        """Where the model is."""

    def is_training(self) -> bool:
        """Whether it is in training mode."""

    def has_own_encoding(self) -> bool:
        """Whether the encoder runs Python code that a replayed graph would skip."""
