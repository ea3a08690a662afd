"""LightZero's world model as the tables of sizes and addresses that compiled functions read."""
from typing import Any, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from ding.model.common import ReparameterizationHead
from lzero.model.common import RepresentationNetworkMLP, SimNorm
from torch import nn

from ..engine.program import (
    CLAMPED_EXPONENTIAL,
    EXPONENTIAL,
    GELU,
    INPUTS,
    LAYER_NORM,
    LINEAR,
    OUTPUTS,
    RELU,
    SCALE,
    SIM_NORM,
    STANDARDIZE,
    TANH,
    Network,
)
from .lightzero import lightzero
from .refused import has_own_encoding


class NotServed(Exception):
    """A part of the model that no compiled function knows."""


def what_is_missing(world_model: Any, dtype: torch.dtype) -> Optional[str]:
    """Why compiled functions cannot search with this model, as it is now, and pages of this type; None if they can."""
    if dtype != torch.float32:
        return f'pages are kept as {dtype}'
    try:
        read_network(world_model)
    except NotServed as missing:
        return str(missing)
    return None


def read_network(world_model: Any) -> Tuple[Network, List[torch.Tensor]]:
    """The model, and what holds the memory that its addresses point to."""
    return _Reader().network(world_model)


class _Reader:
    def __init__(self) -> None:
        self._kept: List[torch.Tensor] = []
        self._eps: List[float] = []

    def network(self, wm: Any) -> Tuple[Network, List[torch.Tensor]]:
        config = wm.config
        if config.gru_gating:
            raise NotServed('its layers are gated')
        embed = config.embed_dim
        blocks = [self._block(block) for block in wm.transformer.blocks]
        mlp_width = lightzero.mlp_of(wm.transformer.blocks[0])[0].out_features
        norm = self._norm(wm.transformer.ln_f)
        factors = wm.transformer.freqs_cis if config.rotary_emb else None
        position_table = wm.pos_emb.weight if factors is None else torch.view_as_real(factors)
        action = wm.act_embedding_table
        discrete = not wm.continuous_action_space
        trunk, first, second = self._policy(wm.head_policy.head_module)
        programs = dict(
            continuous=[] if discrete else self._program(action),
            rewards=self._program(wm.head_rewards.head_module),
            observations=self._program(wm.head_observations.head_module),
            value=self._program(wm.head_value.head_module), trunk=trunk, first=first, second=second
        )
        programs['encoder'] = self._encoder(wm.tokenizer)
        if len(set(self._eps)) > 1:
            raise NotServed('its LayerNorms have several eps')
        sizes = [operation[column] for program in programs.values() for operation in program
                 for column in (INPUTS, OUTPUTS)]
        network = Network(
            embed=embed, heads=config.num_heads, mlp_width=mlp_width, widest=max(sizes),
            policy=sum(program[-1][OUTPUTS] for program in (first, second) if program),
            rotary=lightzero.angles_of(config) if config.rotary_emb else 0, discrete=discrete, eps=self._eps[0],
            position_table=self._address(position_table), actions=self._address(action.weight) if discrete else 0,
            norm_weight=norm[0], norm_bias=norm[1], blocks=np.array(blocks, dtype=np.int64),
            **{name: np.array(program, dtype=np.int64).reshape(-1, 5) for name, program in programs.items()}
        )
        return network, self._kept

    def _encoder(self, tokenizer: Any) -> List[List[int]]:
        """LightZero's MLP for vectors; or nothing, and torch encodes."""
        if type(tokenizer.encoder) is not RepresentationNetworkMLP or has_own_encoding(tokenizer):
            return []
        before = self._eps.copy()
        try:
            program = self._program(nn.Sequential(*tokenizer.encoder.children()))
        except NotServed:
            program = []
        if not program or len(set(self._eps)) > 1:
            self._eps = before
            return []
        return program

    def _address(self, tensor: torch.Tensor) -> int:
        if tensor.device.type != 'cpu' or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise NotServed(f'it has a weight in {tensor.dtype} on {tensor.device}')
        # A parameter can be given other storage, and would no longer hold this one.
        self._kept.append(tensor.detach())
        return tensor.data_ptr()

    def _block(self, block: Any) -> List[int]:
        attention, mlp = block.attn, lightzero.mlp_of(block)
        kinds = [type(part) for part in mlp]
        if kinds != [nn.Linear, nn.GELU, nn.Linear, nn.Dropout] or mlp[1].approximate != 'tanh':
            raise NotServed(f'its MLPs are {", ".join(type(part).__name__ for part in mlp)}')
        return [
            *self._norm(block.ln1), *self._linear(attention.query), *self._linear(attention.key),
            *self._linear(attention.value), *self._linear(attention.proj), *self._norm(block.ln2),
            *self._linear(mlp[0]), *self._linear(mlp[2])
        ]

    def _norm(self, norm: nn.Module) -> Sequence[int]:
        if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
            raise NotServed(f'it has {norm} for a LayerNorm')
        self._eps.append(norm.eps)
        return self._address(norm.weight), self._address(norm.bias)

    def _linear(self, linear: nn.Module) -> Sequence[int]:
        if type(linear) is not nn.Linear:
            raise NotServed(f'it has {linear} for a Linear')
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
        return self._address(linear.weight), self._address(bias)

    def _program(self, module: nn.Module) -> List[List[int]]:
        parts = list(_parts_of(module))
        if not parts or type(parts[0]) not in (nn.Linear, nn.LayerNorm):
            raise NotServed(f'a head begins with {parts[:1]}')
        program: List[List[int]] = []
        for part in parts:
            if type(part) is nn.Linear:
                program.append([LINEAR, part.in_features, part.out_features, *self._linear(part)])
            elif type(part) is nn.LayerNorm:
                size = part.weight.numel()
                program.append([LAYER_NORM, size, size, *self._norm(part)])
            elif type(part) is nn.BatchNorm1d:
                program += self._batch_norm(part)
            elif not isinstance(part, (nn.Dropout, nn.Identity)):
                program.append(_elementwise(part, program[-1][OUTPUTS]))
        return program

    def _batch_norm(self, norm: nn.BatchNorm1d) -> List[List[int]]:
        """In evaluation mode."""
        if norm.running_mean is None or norm.running_var is None or norm.weight is None:
            raise NotServed(f'a head has {norm}')
        size = norm.num_features
        self._eps.append(norm.eps)
        return [
            [STANDARDIZE, size, size, self._address(norm.running_mean), self._address(norm.running_var)],
            [SCALE, size, size, self._address(norm.weight), self._address(norm.bias)],
        ]

    def _policy(self, head: Any) -> Tuple[List[List[int]], List[List[int]], List[List[int]]]:
        if type(head) is not ReparameterizationHead:
            return [], self._program(head), []
        size = head.mu.out_features
        bound = [[TANH, size, size, 0, 0]] if head.bound_type == 'tanh' else []
        first = self._program(head.mu) + bound
        if head.sigma_type == 'conditioned':
            second = self._program(head.log_sigma_layer) + [[CLAMPED_EXPONENTIAL, size, size, 0, 0]]
        elif head.sigma_type == 'independent':
            second = [self._constant(head.log_sigma_param), [EXPONENTIAL, size, size, 0, 0]]
        elif head.sigma_type == 'fixed':
            second = [self._constant(head.sigma)]
        else:
            raise NotServed(f'its policy head has sigma_type={head.sigma_type!r}')
        return self._program(head.main), first, second

    def _constant(self, values: torch.Tensor) -> List[int]:
        """A linear layer without inputs."""
        address = self._address(values)
        return [LINEAR, 0, values.numel(), address, address]


def _parts_of(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that a sequence of sequences runs through."""
    if not isinstance(module, nn.Sequential):
        yield module
        return
    for part in module:
        yield from _parts_of(part)


def _elementwise(part: Any, size: int) -> List[int]:
    kinds = {nn.ReLU: RELU, nn.Tanh: TANH}
    if type(part) is nn.GELU and part.approximate == 'tanh':
        return [GELU, size, size, 0, 0]
    if type(part) is SimNorm:
        return [SIM_NORM, size, size, part.dim, 0]
    if type(part) not in kinds:
        raise NotServed(f'a head has {part}')
    return [kinds[type(part)], size, size, 0, 0]
