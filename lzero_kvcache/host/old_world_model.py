"""The old system: LightZero's own code, with numbers that are counted from outside."""
import logging
import time
from abc import abstractmethod
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from lzero.model.unizero_world_models.world_model import WorldModel as LightZeroWorldModel

from ..cache.base import BaseCacheManager
from ..cache.stats import CacheStats, query_counters
from ..config import KV_CACHE_REGISTRY, MIB, CacheConfig, unread_options
from ..search.timing import Timing
from .keys_values import bytes_of
from .lightzero import VERSION, lightzero
from .patches import with_globals

logger = logging.getLogger(__name__)


class LightZeroPool(NamedTuple):
    """A pool of LightZero's own."""
    size: int
    capacity: int
    slots: List[Any]  # contexts, None where a slot was never used


class CountedFromOutside(BaseCacheManager):
    """The counts of caches of LightZero's own. Root queries are counted by the policy, which knows the episodes;
    recurrent ones by LightZero itself."""

    def __init__(self, config: Any, env_num: int, enable_stats: bool = True) -> None:
        self.env_num, self.enable_stats = env_num, enable_stats
        self._roots = CacheStats()
        self._before = (0, 0)
        self._world_model: Any = None

    def attach(self, world_model: Any) -> None:
        """
        Overview:
            Say whose caches these are.
        Arguments:
            - world_model (:obj:`Any`): LightZero's world model.
        """
        self._world_model = world_model

    @abstractmethod
    def _pools(self) -> Tuple[List[LightZeroPool], LightZeroPool, LightZeroPool]:
        """Each environment's pool of roots, the pool of nodes, and that of the working batch."""

    @property
    def memory_mb(self) -> float:
        """MiB of the pools and of the working batch."""
        model, (roots, *others) = self._world_model, self._pools()
        contexts = [context for pool in [*roots, *others] for context in pool.slots if context is not None]
        working = [model.keys_values_wm, model.keys_values_wm_single_env, model.keys_values_wm_single_env_tmp]
        size = sum(bytes_of(value) for value in working)
        return (size + (len(contexts) * bytes_of(contexts[0]) if contexts else 0)) / MIB  # all are of one shape

    def count_queries(self, pool: str, queries: int, hits: int, by_node: bool = False) -> None:
        assert pool == 'init', 'LightZero counts recurrent queries itself'
        if self.enable_stats:
            self._roots.record(queries, hits)

    def counters(self) -> Dict[str, Any]:
        counters: Dict[str, Any] = {'memory_mb': self.memory_mb}
        if self.enable_stats:
            counters.update(query_counters({'init': self._roots, 'recur': self._nodes()}))
        return counters

    def get_stats_summary(self) -> Dict[str, Any]:
        if not self.enable_stats:
            return {'stats_enabled': False}
        roots, nodes, _ = self._pools()
        # LightZero counts roots of all environments together.
        return {
            'stats_enabled': True,
            'init_pools': {f'env_{index}': dict(size=pool.size, capacity=pool.capacity)
                           for index, pool in enumerate(roots)},
            'init_pool_total': self._roots.summary(),
            'recur_pool': dict(self._nodes().summary(), size=nodes.size, capacity=nodes.capacity),
            'memory_mb': self.memory_mb,
        }

    @property
    def full_memory_mb(self) -> float:
        """MiB that they come to once every slot was used; LightZero allocates a slot when it is."""
        model = self._world_model
        slots = getattr(model, lightzero.RECURRENT_SLOTS) + model.shared_pool_size_wm
        slots += self.env_num * model.shared_pool_size_init
        # The working batch is of all environments, and of one, twice.
        return (slots + self.env_num + 2) * bytes_of(model.keys_values_wm_single_env_tmp) / MIB

    def reset_stats(self) -> None:
        self._roots.reset()
        self._before = (self._world_model.total_query_count, self._world_model.hit_count)

    def _nodes(self) -> CacheStats:
        stats = CacheStats()
        model = self._world_model
        stats.record(model.total_query_count - self._before[0], model.hit_count - self._before[1])
        return stats


@KV_CACHE_REGISTRY.register('old')
class OldCacheManager(CountedFromOutside):
    """
    Overview:
        A view on LightZero's own caches, which it leaves as they are.
    Arguments:
        - config (:obj:`Any`): A ``world_model_cfg``.
        - env_num (:obj:`int`): Environments.
        - enable_stats (:obj:`bool`): Whether there are counts.
    """

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

    def _pools(self) -> Tuple[List[LightZeroPool], LightZeroPool, LightZeroPool]:
        model = self._world_model  # its dicts only ever grow until they are cleared
        roots = [
            LightZeroPool(len(cache), model.shared_pool_size_init, slots)
            for cache, slots in zip(model.past_kv_cache_init_infer_envs, model.shared_pool_init_infer)
        ]
        nodes, capacity = model.past_kv_cache_recurrent_infer, getattr(model, lightzero.RECURRENT_SLOTS)
        working = LightZeroPool(len(model.keys_values_wm_list), model.shared_pool_size_wm, model.shared_pool_wm)
        return roots, LightZeroPool(len(nodes), capacity, model.shared_pool_recur_infer), working


class OldWorldModel(LightZeroWorldModel):
    """
    Overview:
        LightZero's world model with its own caching; nothing but the flag, the log line and the counts are added.
    Arguments:
        - config (:obj:`Any`): A ``world_model_cfg``.
        - tokenizer (:obj:`Any`): LightZero's tokenizer.
    Raises:
        - ConfigError: As by :meth:`CacheConfig.read`.
    """
    use_new_cache_manager = False
    lightzero_version = VERSION
    manager: Any = OldCacheManager
    system, log_line = 'old', 'Using OLD cache system (original implementation)'
    unread_line = "LightZero's own caching does not read {}: only the new cache does"
    clear_line = 'Cleared WorldModel past_kv_cache (OLD system).'

    def __init__(self, config: Any, tokenizer: Any) -> None:
        options = CacheConfig.of(config)
        logger.info(self.log_line)
        super().__init__(config, tokenizer)
        self.kv_cache_manager: Any = self.manager(config, self.env_num, options.enable_stats)
        self.kv_cache_manager.attach(self)
        self.timings = {'search': Timing(), 'step': Timing()}
        unread = unread_options(config)
        if unread:
            logger.warning(self.unread_line.format(unread))

    @property
    def hyperparameters(self) -> Dict[str, Any]:
        """The options that distinguish this cache from others; LightZero has no more."""
        return dict(
            cache_system=self.system, init_pool_size=self.shared_pool_size_init,
            recurrent_pool_size=getattr(self, lightzero.RECURRENT_SLOTS), env_num=self.env_num,
            context_length=self.context_length,
        )

    def forward_recurrent_inference(self, *args: Any, **kwargs: Any) -> Tuple[Any, ...]:
        """
        Overview:
            LightZero's own, timed; in a reanalysis not timed.
        Arguments:
            - args (:obj:`Any`): LightZero's.
            - kwargs (:obj:`Any`): LightZero's.
        Returns:
            - outputs (:obj:`Tuple[Any, ...]`): LightZero's.
        """
        start = time.perf_counter()
        output = super().forward_recurrent_inference(*args, **kwargs)
        if not self.reanalyze_phase:
            self.timings['step'].record(time.perf_counter() - start)
        return output

    def clear_caches(self) -> None:
        """
        Overview:
            Clear as LightZero does, and print which system was cleared.
        """
        with_globals(super().clear_caches, print=lambda *_: None)()
        print(self.clear_line)
