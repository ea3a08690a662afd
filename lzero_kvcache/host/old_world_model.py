"""The old system: LightZero's own code, with numbers that are counted from outside."""
import logging
import time
from typing import Any, Dict, Optional, Tuple

from lzero.model.unizero_world_models.world_model import WorldModel as LightZeroWorldModel

from ..cache.base import BaseCacheManager
from ..cache.stats import CacheStats, Timing
from ..config import CacheConfig
from ..engine.slab import MIB
from ..registry import KV_CACHE_REGISTRY

logger = logging.getLogger(__name__)


@KV_CACHE_REGISTRY.register('old')
class OldCacheManager(BaseCacheManager):
    """
    Overview:
        A view on LightZero's own caches, which it leaves as they are. Root queries are counted by the policy, which
        knows the episodes; recurrent ones by LightZero itself.
    Arguments:
        - config (:obj:`Any`): A ``world_model_cfg``.
        - env_num (:obj:`int`): Environments.
        - enable_stats (:obj:`bool`): Whether there are counts.
    """

    def __init__(self, config: Any, env_num: int, enable_stats: bool = True) -> None:
        self.env_num, self.enable_stats = env_num, enable_stats
        self._roots = CacheStats()
        self._before = (0, 0)
        self._world_model: Any = None

    def attach(self, world_model: Any) -> None:
        """
        Overview:
            Say whose caches these are.
        """
        self._world_model = world_model

    def clear_init_caches(self, mode: Optional[str] = None, env_id: Optional[int] = None) -> None:
        for index, cache in enumerate(self._world_model.past_kv_cache_init_infer_envs):
            if env_id in (None, index):
                cache.clear()

    def clear_recur_cache(self) -> None:
        self._world_model.past_kv_cache_recurrent_infer.clear()

    def clear_all(self) -> None:
        self.clear_init_caches()
        self.clear_recur_cache()
        self._world_model.keys_values_wm_list.clear()

    def count_queries(self, pool: str, queries: int, hits: int, by_node: bool = False) -> None:
        assert pool == 'init', 'LightZero counts recurrent queries itself'
        if self.enable_stats:
            self._roots.record(queries, hits)

    def counters(self) -> Dict[str, Any]:
        counters: Dict[str, Any] = {'memory_mb': self.memory_mb}
        if self.enable_stats:
            nodes = self._nodes()
            total = CacheStats()
            for stats in (self._roots, nodes):
                total.record(stats.total_queries, stats.hits)
            for pool, stats in (('init', self._roots), ('recur', nodes), ('total', total)):
                counters[pool] = {'queries': stats.total_queries, 'hits': stats.hits, 'misses': stats.misses}
        return counters

    def get_stats_summary(self) -> Dict[str, Any]:
        if not self.enable_stats:
            return {'stats_enabled': False}
        model = self._world_model
        # LightZero counts roots of all environments together; its pools are dicts that only ever grow until cleared.
        return {
            'stats_enabled': True,
            'init_pools': {
                f'env_{i}': {'size': len(cache), 'capacity': model.shared_pool_size_init}
                for i, cache in enumerate(model.past_kv_cache_init_infer_envs)
            },
            'init_pool_total': self._roots.summary(),
            'recur_pool': {
                **self._nodes().summary(),
                'size': len(model.past_kv_cache_recurrent_infer), 'capacity': model.shared_pool_size
            },
            'memory_mb': self.memory_mb,
        }

    @property
    def memory_mb(self) -> float:
        """MiB of the pools and of the working batch."""
        model = self._world_model
        pools = [model.shared_pool_recur_infer, model.shared_pool_wm, *model.shared_pool_init_infer]
        copies = [entry for pool in pools for entry in pool if entry is not None]
        working = [model.keys_values_wm, model.keys_values_wm_single_env, model.keys_values_wm_single_env_tmp]
        size = sum(_bytes(value) for value in working)
        if copies:  # all of one shape
            size += len(copies) * _bytes(copies[0])
        return size / MIB

    @property
    def full_memory_mb(self) -> float:
        """MiB that they come to once every slot was used; LightZero allocates a slot when it is."""
        model = self._world_model
        slots = model.shared_pool_size + model.shared_pool_size_wm + self.env_num * model.shared_pool_size_init
        # The working batch is of all environments, and of one, twice.
        return (slots + self.env_num + 2) * _bytes(model.keys_values_wm_single_env_tmp) / MIB

    def reset_stats(self) -> None:
        self._roots.reset()
        self._before = (self._world_model.total_query_count, self._world_model.hit_count)

    def _nodes(self) -> CacheStats:
        stats = CacheStats()
        model = self._world_model
        stats.record(model.total_query_count - self._before[0], model.hit_count - self._before[1])
        return stats


def _bytes(value: Any) -> int:
    caches = [cache for layer in value for cache in (layer._k_cache, layer._v_cache)]
    return sum(cache._cache.numel() * cache._cache.element_size() for cache in caches)


class OldWorldModel(LightZeroWorldModel):
    """
    Overview:
        LightZero's world model with its own caching; nothing but the flag, the log line and the counts are added.
    Arguments:
        - config (:obj:`Any`): A ``world_model_cfg``.
        - tokenizer (:obj:`Any`): LightZero's tokenizer.
    """
    use_new_cache_manager = False

    def __init__(self, config: Any, tokenizer: Any) -> None:
        options = CacheConfig.read(config, KV_CACHE_REGISTRY)
        logger.info('Using OLD cache system (original implementation)')
        super().__init__(config, tokenizer)
        self.kv_cache_manager = OldCacheManager(config, self.env_num, options.enable_stats)
        self.kv_cache_manager.attach(self)
        self.timings = {'search': Timing(), 'step': Timing()}

    @property
    def hyperparameters(self) -> Dict[str, Any]:
        """What tells this cache from others; LightZero has no other options."""
        return dict(
            cache_system='old', cache_manager='old', init_pool_size=self.shared_pool_size_init,
            recurrent_pool_size=self.shared_pool_size, env_num=self.env_num, context_length=self.context_length,
        )

    def forward_recurrent_inference(self, *args: Any, **kwargs: Any) -> Tuple[Any, ...]:
        """
        Overview:
            LightZero's own, timed.
        """
        start = time.perf_counter()
        output = super().forward_recurrent_inference(*args, **kwargs)
        if not self.reanalyze_phase:
            self.timings['step'].record(time.perf_counter() - start)
        return output

    def clear_caches(self) -> None:
        """
        Overview:
            Clear as LightZero does, and say which system was cleared.
        """
        for cache in self.past_kv_cache_init_infer_envs:
            cache.clear()
        self.past_kv_cache_recurrent_infer.clear()
        self.keys_values_wm_list.clear()
        print('Cleared WorldModel past_kv_cache (OLD system).')
