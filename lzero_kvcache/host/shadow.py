"""LightZero's own world model, with caches of its own, as validation's references replay searches on it.

A shadow shares the modules of the world model that searches, with their weights and mode, and has no parameters.
"""
import copy
from typing import Any, Dict, List

import torch
from lzero.model.unizero_world_models.world_model import WorldModel

from ..config import FLAG
from ..engine.weights import to_scalar
from ..validation.trace import Node
from ..validation.validator import Reference
from .lightzero import lightzero
from .patches import with_globals


class Shadow(WorldModel):
    """LightZero's world model, made without its constructor: shared modules, empty caches."""

    device: torch.device
    latent_state: torch.Tensor

    def __init__(self, world_model: Any, env_num: int) -> None:
        self.__dict__.update(vars(world_model))
        self.config = copy.copy(world_model.config)
        self.config[FLAG] = False  # or LightZero's main branch would make its own manager
        self.env_num = env_num
        self.latent_state = torch.empty(0)  # LightZero deletes this attribute at each step, and so it must exist
        self._initialize_statistics()
        slots = self.num_simulations * env_num
        setattr(self, lightzero.RECURRENT_SLOTS, slots)
        self._initialize_cache_structures()
        self._initialize_transformer_keys_values()
        # As the end of LightZero's constructor has it.
        self.shared_pool_recur_infer: List[Any] = [None] * slots
        self.shared_pool_init_infer = [[None] * self.shared_pool_size_init for _ in range(env_num)]
        self.shared_pool_index_init_envs = [0] * env_num
        self.shared_pool_size_wm = env_num
        self.shared_pool_wm = [None] * env_num
        self.shared_pool_index = self.shared_pool_index_wm = 0

    def clear_caches(self) -> None:
        with_globals(super().clear_caches, print=lambda *_: None)()

    def prepare(self, tables: Dict[str, Any]) -> None:
        """Follow the modules to the device where they are now, and take tables of positions."""
        device = self.transformer.ln_f.weight.device
        self.__dict__.update({
            name: [{place: difference.to(device) for place, difference in layer.items()} for layer in table]
            for name, table in tables.items()
        })
        if device != self.device:
            self.device = device
            pools = self.shared_pool_recur_infer, self.shared_pool_wm, *self.shared_pool_init_infer
            for layer in [layer for pool in pools for entry in pool if entry is not None for layer in entry]:
                for cache in (layer._k_cache, layer._v_cache):
                    cache._cache = cache._cache.to(device)
            self._initialize_transformer_keys_values()


def position_tables(world_model: Any) -> Dict[str, Any]:
    """LightZero's tables of learned positions, made from the weights as they are now; none with rotary positions."""
    if world_model.config.rotary_emb:
        return {}
    view = Shadow.__new__(Shadow)
    view.__dict__.update(vars(world_model))
    view.device = world_model.pos_emb.weight.device
    with torch.no_grad():
        view.precompute_pos_emb_diff_kv()
    return {name: vars(view)[name] for name in ('pos_emb_diff_k', 'pos_emb_diff_v')}


class ShadowReference(Reference):
    """The base of both references. Shadows are made at the first use: until then the world model is not complete."""

    def __init__(self, world_model: Any) -> None:
        self._wm = world_model

    def is_ready(self) -> bool:
        return not self._wm.training

    def scalar(self, logits: torch.Tensor) -> torch.Tensor:
        return to_scalar(logits).view(-1, 1)

    def _actions(self, node: Node) -> torch.Tensor:
        actions = torch.as_tensor(node.actions).to(self._wm.transformer.ln_f.weight.device)
        return actions if self._wm.continuous_action_space else actions.long()
