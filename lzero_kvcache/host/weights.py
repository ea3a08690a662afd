"""LightZero's transformer and heads, laid out for the engine; read anew for each search."""
import functools
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from lzero.model.common import SimNorm
from torch import nn

from ..config import MIB
from ..copies import MadeAnew
from ..engine.weights import Chain, Function, Geometry, Layer, Linear, Norm, Weights, gelu
from .lightzero import lightzero
from .refused import has_own_encoding, heads_of

MANY_ROWS = {'cpu': 128, 'cuda': 512}
"""For so many rows or more, several fast kernels beat one slow one, although each is launched from Python
(docs/results.md)."""

MANY_CAPTURED_ROWS = 32
"""The same in a CUDA graph, where launches cost little."""


class JoinedProjections(MadeAnew):
    """Where captures join projections: one copy for all captures of a model, each of which would have its own."""

    def __init__(self) -> None:
        self._kept: Dict[Any, torch.Tensor] = {}

    @property
    def memory_mb(self) -> float:
        return sum(part.numel() * part.element_size() for part in list(self._kept.values())) / MIB

    def join(self, layer: int, kind: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Weights or biases of a layer in one tensor, which the next call for these overwrites."""
        kept, detached = self._kept.get((layer, kind)), [part.detach() for part in parts]
        if kept is None or (kept.device, kept.dtype) != (detached[0].device, detached[0].dtype):
            with torch.inference_mode(False):  # a tensor made in inference mode could not be overwritten outside of it
                self._kept[layer, kind] = kept = torch.cat(detached)
        return torch.cat(detached, out=kept)


class ModelWeights:
    """The weights of a LightZero world model that :func:`check_served` lets pass, as the engine asks for them."""

    def __init__(self, world_model: Any) -> None:
        config = world_model.config
        self.geometry = Geometry(
            layers=config.num_layers, heads=config.num_heads, embed_dim=config.embed_dim,
            window_pages=config.context_length // 2, action_size=config.action_space_size,
            continuous=bool(config.continuous_action_space),
            rotary_positions=lightzero.angles_of(config) if config.rotary_emb else 0,
        )
        self.joined = JoinedProjections()
        self._world_model = world_model

    def read(self, captured: bool) -> Weights:
        """Fused copies of the projections, everything else in place."""
        world_model, training = self._world_model, self.is_training()
        many_rows = MANY_CAPTURED_ROWS if captured else MANY_ROWS.get(self.device().type, MANY_ROWS['cpu'])

        def read(module: nn.Module) -> Function:
            return _function(module, many_rows)

        transformer, heads = world_model.transformer, heads_of(world_model)
        rewards, observations, policy, value = [_without_dicts(read(head.head_module)) for head in heads]
        return Weights(
            layers=[
                _layer(block, read, many_rows, functools.partial(self.joined.join, index) if captured else _joined)
                for index, block in enumerate(transformer.blocks)
            ],
            norm=read(transformer.ln_f),
            embed_action=functools.partial(_embed_action, world_model),
            embed_dropout=transformer.drop.forward if training else None,
            attention_dropout=world_model.config.attn_pdrop if training else 0.0,
            rewards=rewards, observations=observations, policy=policy, value=value,
            position_table=transformer.freqs_cis if self.geometry.rotary else world_model.pos_emb.weight,
            shift=self.shift(), many_rows=many_rows, captured=captured, training=training,
        )

    def shift(self) -> Optional[torch.Tensor]:
        """What learned positions add to keys and values ``[2W, L, 2, E]``; None with rotary ones.

        LightZero moves a kept key from position p to p - 2 by adding W pos(p - 2) - W pos(p), ``pos_emb_diff_k``. These
        differences telescope: pages hold k - W pos(p), and W pos(p) is added for the place that a token has now.
        """
        if self.geometry.rotary:
            return None
        slots = 2 * self.geometry.window_pages
        embeddings = self._world_model.pos_emb.weight[:slots]
        shifts: List[torch.Tensor] = []
        for block in self._world_model.transformer.blocks:
            shifts += [F.linear(embeddings, block.attn.key.weight), F.linear(embeddings, block.attn.value.weight)]
        return torch.stack(shifts, dim=1).view(slots, self.geometry.layers, 2, -1)

    def addresses(self) -> Tuple[int, ...]:
        world_model = self._world_model
        modules = [
            world_model.transformer, world_model.act_embedding_table, *heads_of(world_model), world_model.tokenizer
        ]
        if not self.geometry.rotary:
            modules.append(world_model.pos_emb)
        tensors = [
            tensor for module in walked(modules) for group in (module._parameters, module._buffers) if group
            for tensor in group.values() if tensor is not None
        ]
        return tuple([tensor.data_ptr() for tensor in tensors])

    def device(self) -> torch.device:
        return self._world_model.transformer.ln_f.weight.device

    def is_training(self) -> bool:
        return self._world_model.training

    def has_own_encoding(self) -> bool:
        return has_own_encoding(self._world_model.tokenizer)


def _joined(_kind: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(parts))


def _layer(block: Any, read: Callable[[nn.Module], Function], many_rows: int,
           join: Callable[[str, Sequence[torch.Tensor]], torch.Tensor]) -> Layer:
    attn = block.attn
    projections = attn.query, attn.key, attn.value
    return Layer(
        norm1=read(block.ln1),
        qkv=Linear(
            join('weight', [layer.weight for layer in projections]),
            join('bias', [layer.bias for layer in projections]), many_rows
        ),
        proj=read(nn.Sequential(attn.proj, attn.resid_drop) if attn.training else attn.proj),
        norm2=read(block.ln2),
        mlp=read(lightzero.mlp_of(block)),
        gates=(block.gate1.forward, block.gate2.forward) if block.gru_gating else None,
    )


def _embed_action(world_model: Any, action: torch.Tensor) -> torch.Tensor:
    table = world_model.act_embedding_table
    if world_model.continuous_action_space:
        # SimNorm needs the time dimension that LightZero gives it.
        return table(action.float().reshape(action.shape[0], 1, -1)).squeeze(1)
    return table(action.reshape(-1))


def walked(modules: Iterable[Optional[nn.Module]]) -> List[nn.Module]:
    """Modules and all that are in them; PyTorch's own walk names everything, which takes ten times as long."""
    found = [module for module in modules if module is not None]
    for module in found:
        if module._modules:
            found += [child for child in module._modules.values() if child is not None]
    return found


def _without_dicts(function: Function) -> Function:
    """Sampled UniZero's policy head returns a dict of mu and sigma; the engine takes ``[..., 2A]``."""
    if isinstance(function, Chain):
        return function

    def joined(x: torch.Tensor) -> torch.Tensor:
        output = function(x)
        return torch.cat([output['mu'], output['sigma']], dim=-1) if isinstance(output, dict) else output

    return joined


def _function(module: nn.Module, many_rows: int) -> Function:
    """What a module computes, without PyTorch's module call, which takes as long as a small layer; hooks do not run."""
    if type(module) is nn.Sequential:
        parts = [part for part in module if module.training or not isinstance(part, nn.Dropout)]
        return Chain(tuple(_function(part, many_rows) for part in parts))
    if type(module) is nn.Linear:
        return Linear(module.weight, module.bias, many_rows)
    if type(module) is nn.LayerNorm:
        return Norm(tuple(module.normalized_shape), module.weight, module.bias, module.eps)
    if type(module) is nn.GELU and module.approximate == 'tanh':
        return gelu
    if type(module) is SimNorm:
        return functools.partial(_sim_norm, dim=module.dim)  # type: ignore[arg-type]
    return module.forward


def _sim_norm(x: torch.Tensor, dim: int) -> torch.Tensor:
    """SimNorm's softmax over groups; PyTorch's own takes four times as long for short groups on a CPU."""
    groups = x.reshape(x.shape[:-1] + (-1, dim))
    if x.is_cuda:
        return groups.softmax(-1).view(x.shape)
    groups = (groups - groups.amax(-1, keepdim=True)).exp_()
    return groups.div_(groups.sum(-1, keepdim=True)).view(x.shape)


