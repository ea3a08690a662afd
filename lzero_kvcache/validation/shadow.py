"""LightZero's own world model on the modules of another: its code, unchanged, with caches and without weights."""
from typing import Any, Dict, Iterable

import torch
from lzero.model.unizero_world_models.kv_caching import KeysValues
from lzero.model.unizero_world_models.world_model import WorldModel

_TABLES = ('pos_emb_diff_k', 'pos_emb_diff_v')


class Shadow(WorldModel):
    """
    Overview:
        Shares every module with a world model, so that it has its weights and its mode as they are now, and has
        LightZero's caches, empty.
    Arguments:
        - attributes (:obj:`Dict[str, Any]`): The world model's, as LightZero's constructor left them.
        - env_num (:obj:`int`): Environments of a batch.
    """

    device: torch.device
    latent_state: torch.Tensor

    def __init__(self, attributes: Dict[str, Any], env_num: int) -> None:
        self.__dict__.update(attributes)
        self.env_num = env_num
        self.latent_state = torch.empty(0)  # LightZero deletes it at each step
        self._initialize_statistics()
        self._initialize_cache_structures()
        self._initialize_transformer_keys_values()
        # As the end of LightZero's constructor has it.
        self.shared_pool_size = self.num_simulations * env_num
        self.shared_pool_recur_infer = [None] * self.shared_pool_size
        self.shared_pool_init_infer = [[None] * self.shared_pool_size_init for _ in range(env_num)]
        self.shared_pool_index_init_envs = [0] * env_num
        self.shared_pool_size_wm = env_num
        self.shared_pool_wm = [None] * env_num
        self.shared_pool_index = self.shared_pool_index_wm = 0

    def prepare(self, tables: Dict[str, Any]) -> None:
        """
        Overview:
            Follow the modules to where they are now, and take tables of positions.
        Arguments:
            - tables (:obj:`Dict[str, Any]`): From :func:`position_tables`.
        """
        device = self.transformer.ln_f.weight.device
        self.__dict__.update({
            name: [{place: difference.to(device) for place, difference in layer.items()} for layer in table]
            for name, table in tables.items()
        })
        if device == self.device:
            return
        self.device = device
        pools = [self.shared_pool_recur_infer, self.shared_pool_wm, *self.shared_pool_init_infer]
        _move([entry for pool in pools for entry in pool if entry is not None], device)
        self._initialize_transformer_keys_values()


def _move(entries: Iterable[KeysValues], device: torch.device) -> None:
    for entry in entries:
        for layer in entry:
            for cache in (layer._k_cache, layer._v_cache):
                cache._cache = cache._cache.to(device)


def position_tables(world_model: Any) -> Dict[str, Any]:
    """
    Overview:
        LightZero's tables of learned positions, made from the weights as they are now. They are made also while the
        world model is under construction, as LightZero does.
    Arguments:
        - world_model (:obj:`Any`): Whose weights.
    Returns:
        - tables (:obj:`Dict[str, Any]`): By the names of its attributes; empty with rotary positions.
    """
    if world_model.config.rotary_emb:
        return {}
    view = Shadow.__new__(Shadow)
    view.__dict__.update(vars(world_model))
    view.device = world_model.pos_emb.weight.device
    with torch.no_grad():
        view.precompute_pos_emb_diff_kv()
    return {name: vars(view)[name] for name in _TABLES}
