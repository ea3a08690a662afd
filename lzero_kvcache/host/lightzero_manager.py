"""The new manager that LightZero's main branch has of its own, with numbers in this package's form."""
from typing import Any, Dict, List, Optional, Tuple

from lzero.model.unizero_world_models.kv_cache_manager import KVCacheManager as LightZeroManager

from ..cache.stats import add_pools
from ..config import KV_CACHE_REGISTRY, LIGHTZERO
from .old_world_model import CountedFromOutside, LightZeroPool, OldWorldModel


@KV_CACHE_REGISTRY.register(LIGHTZERO)
class CountedManager(LightZeroManager, CountedFromOutside):
    """LightZero's manager as it is, but for what it says of itself. It takes the place of the one that LightZero's
    constructor has just made, which is empty too."""

    def __init__(self, config: Any, env_num: int, enable_stats: bool = True) -> None:
        LightZeroManager.__init__(self, config, env_num, enable_stats)
        CountedFromOutside.__init__(self, config, env_num, enable_stats)

    def clear_init_caches(self, mode: Optional[str] = None, env_id: Optional[int] = None) -> None:
        for index, pool in enumerate(self.init_pools):
            if env_id in (None, index):
                pool.clear()

    def counters(self) -> Dict[str, Any]:
        counters = super(LightZeroManager, self).counters()
        if self.enable_stats:
            pools = {'init': self.init_pools, 'recur': [self.recur_pool]}
            add_pools(counters, pools, {name: sum(map(len, of_kind)) for name, of_kind in pools.items()})
        return counters

    def get_stats_summary(self) -> Dict[str, Any]:
        return super(LightZeroManager, self).get_stats_summary()

    def reset_stats(self) -> None:
        LightZeroManager.reset_stats(self)
        super(LightZeroManager, self).reset_stats()

    def _pools(self) -> Tuple[List[LightZeroPool], LightZeroPool, LightZeroPool]:
        pools = [*self.init_pools, self.recur_pool, self.wm_pool]
        *roots, nodes, working = [LightZeroPool(len(pool), pool.pool_size, pool._pool) for pool in pools]
        return roots, nodes, working


class ManagerWorldModel(OldWorldModel):
    """LightZero's world model with its own new manager; nothing but the counts is added."""
    use_new_cache_manager = True
    manager = CountedManager
    system, log_line = LIGHTZERO, "Using LightZero's own KVCacheManager"
    clear_line = "Cleared WorldModel KV caches (LightZero's own manager)."
    unread_line = "LightZero's own manager does not read {}: only kv_cache_cfg.type='new' does"
