"""The new cache manager: pools over one set of pages. Knows keys, environments and page ids; no tensors."""
import logging
import math
import numbers
from typing import Any, Dict, Hashable, List, Optional, Sequence

import numpy as np

from ..config import KV_CACHE_REGISTRY, MIB, PREFIX, CacheConfig, ConfigError, checked
from .base import COLLECT, CURRENT, EVAL, PagedCacheManager
from .contexts import Contexts
from .pages import RESERVED_PAGES, Lease, OutOfPages, PageAllocator, Rows
from .pool import KVCachePool, PagedPool
from .stats import CacheStats, add_pools, query_counters

logger = logging.getLogger(__name__)


@KV_CACHE_REGISTRY.register('new')
class KVCacheManager(PagedCacheManager):
    """
    Overview:
        One init pool per environment for root contexts, a recurrent pool for the nodes of the running search, and the
        working batch ('world_model'), all over the same pages. In a training an environment has its newest root alone;
        the pools' other entries are of callers that look contexts up by key.
    Arguments:
        - config (:obj:`Any`): A ``world_model_cfg``; see :class:`CacheConfig` for what is read.
        - env_num (:obj:`Optional[int]`): Environments; default ``config.env_num``.
        - enable_stats (:obj:`Optional[bool]`): Whether look-ups are counted; default ``kv_cache_cfg.enable_stats``.
    Raises:
        - ConfigError: A key of the config is unknown, or it or an argument has a wrong value.
    """

    def __init__(self, config: Any, env_num: Optional[int] = None, enable_stats: Optional[bool] = None) -> None:
        self.config = CacheConfig.of(config, env_num, by_hand=True)
        self.env_num = self.config.env_num if env_num is None else checked(int, env_num, 'env_num')
        self.enable_stats = (
            self.config.enable_stats if enable_stats is None else checked(bool, enable_stats, 'enable_stats'))
        self.context_pages = self.config.context_length // 2 - 1
        self.store: Any = None  # by hand there is none
        self._pages = PageAllocator(self._pages_of_a_search())
        # An environment's newest root is in no pool, so that nothing evicts it; its pool counts who asked for it.
        self._current = {mode: Contexts(self._pages, self.env_num, self.context_pages) for mode in (COLLECT, EVAL)}
        self._told: set = set()
        self._out_of_memory = False

        self.init_pools = [self._paged(self.config.init_pool_size, f'init_env{i}') for i in range(self.env_num)]
        self.recur_pool = self._paged(self.config.recurrent_pool_size, 'recurrent')
        self.wm_pool = KVCachePool(self.env_num, self.config.eviction, self.enable_stats, 'world_model')
        # Evaluation has contexts of its own, made at its first search, so that it cannot evict collection's.
        self.eval_pools: List[PagedPool] = []
        self._pools = {COLLECT: self.init_pools, EVAL: self.eval_pools}
        self._asked = {'init': CacheStats(), 'recur': CacheStats()}
        # Contexts held after the last step: by the time tensorboard reads this, an update has emptied the pools.
        self._occupied = {'init': 0, 'recur': 0}
        self._skipped = 0
        logger.info(f'Initialized KVCacheManager for {self.env_num} environments')

    def _paged(self, size: int, name: str) -> PagedPool:
        return PagedPool(
            size, self.config.eviction, self.enable_stats, name, pages=self._pages, context_pages=self.context_pages
        )

    def _pages_of_a_search(self) -> int:
        """The newest root of every environment, the nodes of a search, two pages a row for the step, the reserved."""
        environments = self.env_num, self.config.evaluator_env_num
        roots = sum(environments) * (self.context_pages + 1)
        return RESERVED_PAGES + roots + self.config.recurrent_pool_size + 2 * max(environments)

    @property
    def page_limit(self) -> int:
        """Pages that ``max_memory_mb`` allows."""
        if self.config.max_memory_mb is None or self.store is None:
            return super().page_limit
        return max(2, int(self.config.max_memory_mb * MIB / self.store.page_bytes))

    # ---- what the world model calls -------------------------------------------------------------------------------

    def use_store(self, store: Any) -> None:
        self.store = store
        if self._pages.capacity > self.page_limit:
            least = self._pages.capacity * store.page_bytes / MIB
            raise ConfigError(
                f'{PREFIX}.kv_cache_cfg.max_memory_mb={self.config.max_memory_mb} is too small for one search: '
                f'it must be at least {math.ceil(1000 * least) / 1000:.3f}'
            )

    def lease(self) -> Lease:
        return self._pages.lease(self.take)

    def find_init(self, mode: str, env_ids: Sequence[int], keys: Sequence[Hashable]) -> Rows:
        pools = self._pools_to(mode, env_ids)
        if _are_current(keys):
            rows = self._current[mode].find(env_ids)
            for env_id, count in zip(env_ids, rows[1].tolist()):
                pools[env_id].count([CURRENT], [count > 0])
            return rows
        rows = np.zeros((len(keys), self.context_pages), np.int64), np.zeros(len(keys), np.int64)
        for row, (env_id, key) in enumerate(zip(env_ids, keys)):
            rows[0][row:row + 1], rows[1][row:row + 1] = pools[env_id].find([key])
        return rows

    def store_init(self, mode: str, env_ids: Sequence[int], keys: Sequence[Hashable], rows: Rows) -> None:
        pools = self._pools_to(mode, env_ids)
        if _are_current(keys):
            self._current[mode].store(env_ids, rows)
        else:
            for row, (env_id, key) in enumerate(zip(env_ids, keys)):
                pools[env_id].store([key], (rows[0][row:row + 1], rows[1][row:row + 1]))
        self._occupied['init'] = sum(map(len, self.init_pools + self.eval_pools)) + sum(
            int((roots.counts > 0).sum()) for roots in self._current.values()
        )

    def forget_init(self, mode: str, env_ids: Sequence[int], keys: Sequence[Hashable]) -> None:
        pools = self._pools_to(mode, env_ids)
        for env_id, key in zip(env_ids, keys):
            pools[env_id].remove(key)

    def find_recur(self, mode: str, env_ids: Sequence[int], keys: Sequence[Hashable]) -> Rows:
        # The init pool is asked only for keys that it has: a node that is no root must not count as a miss there.
        pairs, pools = list(zip(env_ids, keys)), self._pools_to(mode, env_ids)
        roots = [row for row, (env_id, key) in enumerate(pairs) if key in pools[env_id]]
        if not roots:
            return self.recur_pool.find(pairs)
        nodes = [row for row in range(len(pairs)) if row not in roots]
        rows = np.zeros((len(keys), self.context_pages), np.int64), np.zeros(len(keys), np.int64)
        rows[0][nodes], rows[1][nodes] = self.recur_pool.find([pairs[row] for row in nodes])
        rows[0][roots], rows[1][roots] = self.find_init(
            mode, [env_ids[row] for row in roots], [keys[row] for row in roots]
        )
        return rows

    def store_recur(self, env_ids: Sequence[int], keys: Sequence[Hashable], rows: Rows) -> None:
        if len(self.recur_pool) + len(keys) > self.recur_pool.pool_size:
            self._warn_once(
                'recurrent', f"KVCachePool 'recurrent' is full at {self.recur_pool.pool_size} entries in a search: "
                'evicted nodes are rebuilt without their context; raise kv_cache_cfg.recurrent_pool_size'
            )
        self.recur_pool.store(list(zip(env_ids, keys)), rows)
        self._occupied['recur'] = len(self.recur_pool)

    def count_nodes(self, nodes: int) -> None:
        self._occupied['recur'] = min(nodes, self.recur_pool.pool_size)

    def count_queries(self, pool: str, queries: int, hits: int, by_node: bool = False) -> None:
        if self.enable_stats:
            self._asked[pool].record(queries, hits)
            self.wm_pool.stats.record(queries, hits)
            if by_node:
                self.recur_pool.stats.record(queries, hits)

    def count_skipped(self, rows: int) -> None:
        self._skipped += rows

    def clear_init_caches(self, mode: Optional[str] = None, env_id: Optional[int] = None) -> None:
        if mode is not None:
            self._check_mode(mode)
        for name, pools in self._pools.items():
            for index, pool in enumerate(pools):
                if mode in (None, name) and env_id in (None, index):
                    pool.clear()
                    self._current[name].clear(index)

    def clear_recur_cache(self) -> None:
        self.recur_pool.clear()

    def clear_all(self) -> None:
        self.clear_init_caches()
        self.clear_recur_cache()
        self.wm_pool.clear()

    # ---- by hand, with the names of LightZero's main branch --------------------------------------------------------

    def get_init_cache(self, env_id: int, cache_key: Hashable) -> Any:
        """
        Overview:
            Look up what was put into an environment's init pool, of collection.
        Arguments:
            - env_id (:obj:`int`): The environment.
            - cache_key (:obj:`Hashable`): The key.
        Returns:
            - value (:obj:`Any`): What was put there, a ``KeysValues`` as a copy; None for a miss.
        Raises:
            - ValueError: There is no such environment.
        """
        return self._pools_to(COLLECT, [env_id])[env_id].get(cache_key)

    def set_init_cache(self, env_id: int, cache_key: Hashable, kv_cache: Any) -> int:
        """
        Overview:
            Put a value into an environment's init pool, of collection; a ``KeysValues`` as a copy.
        Arguments:
            - env_id (:obj:`int`): The environment.
            - cache_key (:obj:`Hashable`): The key.
            - kv_cache (:obj:`Any`): The value.
        Returns:
            - slot (:obj:`int`): The slot of the pool that it is in, from 0.
        Raises:
            - ValueError: There is no such environment.
        """
        return self._pools_to(COLLECT, [env_id])[env_id].set(cache_key, kv_cache)

    def get_recur_cache(self, cache_key: Hashable, env_id: Optional[int] = None) -> Any:
        """
        Overview:
            Look up what was put into the recurrent pool.
        Arguments:
            - cache_key (:obj:`Hashable`): The key.
            - env_id (:obj:`Optional[int]`): The environment it was put there for; None for none in particular.
        Returns:
            - value (:obj:`Any`): What was put there, a ``KeysValues`` as a copy; None for a miss.
        """
        return self.recur_pool.get((env_id, cache_key))

    def set_recur_cache(self, cache_key: Hashable, kv_cache: Any, env_id: Optional[int] = None) -> int:
        """
        Overview:
            Put a value into the recurrent pool; a ``KeysValues`` as a copy.
        Arguments:
            - cache_key (:obj:`Hashable`): The key.
            - kv_cache (:obj:`Any`): The value.
            - env_id (:obj:`Optional[int]`): The environment that it is for; None for none in particular.
        Returns:
            - slot (:obj:`int`): The slot of the pool that it is in, from 0.
        """
        return self.recur_pool.set((env_id, cache_key), kv_cache)

    def get_wm_cache(self, cache_key: Hashable) -> Any:
        """
        Overview:
            Look up what was put into the working batch.
        Arguments:
            - cache_key (:obj:`Hashable`): The key.
        Returns:
            - value (:obj:`Any`): What was put there, a ``KeysValues`` as a copy; None for a miss.
        """
        return self.wm_pool.get(cache_key)

    def set_wm_cache(self, cache_key: Hashable, kv_cache: Any) -> int:
        """
        Overview:
            Put a value into the working batch; a ``KeysValues`` as a copy.
        Arguments:
            - cache_key (:obj:`Hashable`): The key.
            - kv_cache (:obj:`Any`): The value.
        Returns:
            - slot (:obj:`int`): The slot of the pool that it is in, from 0.
        """
        return self.wm_pool.set(cache_key, kv_cache)

    def hierarchical_get(self, env_id: int, cache_key: Hashable) -> Any:
        """
        Overview:
            Look in an environment's init pool, then among its recurrent entries, then among those of none.
        Arguments:
            - env_id (:obj:`int`): The environment.
            - cache_key (:obj:`Hashable`): The key.
        Returns:
            - value (:obj:`Any`): What was put there, a ``KeysValues`` as a copy; None for a miss.
        Raises:
            - ValueError: There is no such environment.
        """
        found = self.get_init_cache(env_id, cache_key)
        if found is None and (env_id, cache_key) in self.recur_pool:
            found = self.get_recur_cache(cache_key, env_id)
        return self.get_recur_cache(cache_key) if found is None else found

    # ---- numbers ---------------------------------------------------------------------------------------------------

    def get_stats_summary(self) -> Dict[str, Any]:
        """
        Overview:
            Every pool's own counts.
        Returns:
            - summary (:obj:`Dict[str, Any]`): ``stats_enabled``, alone if it is False; ``init_pools`` with ``env_0`` \
                and so on, ``recur_pool`` and ``wm_pool``, each with ``hits``, ``misses``, ``evictions``, \
                ``total_queries``, ``hit_rate``, ``size`` and ``capacity``; ``eval_pools`` once there was an \
                evaluation; ``memory_mb``, in MiB; ``captures``.
        """
        if not self.enable_stats:
            return {'stats_enabled': False}
        summary: Dict[str, Any] = {
            'stats_enabled': True,
            'init_pools': self._summaries(COLLECT, self.init_pools),
            'recur_pool': _summary(self.recur_pool),
            'wm_pool': _summary(self.wm_pool),
            **self._of_store(),
        }
        if self.eval_pools:
            summary['eval_pools'] = self._summaries(EVAL, self.eval_pools)
        return summary

    def counters(self) -> Dict[str, Any]:
        counters = self._of_store()
        if self.enable_stats:
            counters.update(query_counters(self._asked), skipped=self._skipped)
            add_pools(counters, {'init': self.init_pools + self.eval_pools, 'recur': [self.recur_pool]}, self._occupied)
        return counters

    def _of_store(self) -> Dict[str, Any]:
        return {'memory_mb': self.memory_mb, 'captures': 0 if self.store is None else self.store.captures}

    def _summaries(self, mode: str, pools: List[PagedPool]) -> Dict[str, Any]:
        current = self._current[mode].counts > 0
        return {f'env_{i}': _summary(pool, int(current[i])) for i, pool in enumerate(pools)}

    @property
    def memory_mb(self) -> float:
        """MiB that the cache holds: pages, gathered windows, buffers of graphs and of the search."""
        return 0.0 if self.store is None else self.store.memory_mb

    @property
    def pages_used(self) -> int:
        """Pages that contexts and leases hold now; a page that several of them share counts once."""
        return self._pages.used

    def reset_stats(self) -> None:
        pools = [*self.init_pools, *self.eval_pools, self.recur_pool, self.wm_pool]
        for stats in [*(pool.stats for pool in pools), *self._asked.values()]:
            stats.reset()
        self._skipped = 0

    def __repr__(self) -> str:
        return (
            f'KVCacheManager(env_num={self.env_num}, init_pools={[len(pool) for pool in self.init_pools]}, '
            f'recur_pool={self.recur_pool!r}, pages={self._pages.used}/{self._pages.used + self._pages.free})'
        )

    # ---- pages -----------------------------------------------------------------------------------------------------

    @property
    def page_capacity(self) -> int:
        """Pages that the slab must have room for."""
        return self._pages.capacity

    def take(self, count: int) -> np.ndarray:
        """
        Overview:
            Take pages with one reference each, for a lease, which gives them back; where too few are free, the storage
            grows or older root contexts are evicted.
        Arguments:
            - count (:obj:`int`): How many pages.
        Returns:
            - pages (:obj:`np.ndarray`): Their ids ``[count]``, int64.
        Raises:
            - OutOfPages: The running search and the current steps need all there are.
        """
        try:
            with self._pages.turns.lock:
                if count > self._pages.free:
                    self._make_room(count)
                return self._pages.allocate(count)
        except OutOfPages as error:
            mend = f'raise kv_cache_cfg.max_memory_mb={self.config.max_memory_mb}'
            if self._out_of_memory:
                mend = 'memory has run out: lower policy.num_simulations or the number of environments'
            raise OutOfPages(f'{error}, and the running search needs the others: {mend}') from None

    def _pools_to(self, mode: str, env_ids: Sequence[int]) -> List[PagedPool]:
        """The init pools of a mode, some environments' among them; one that is not there is an error."""
        self._check_mode(mode)
        if not len(env_ids):  # a reset, or predictions that are no numbers, can leave a step none
            return self._pools[mode]
        for env_id in (min(env_ids), max(env_ids)):
            if not isinstance(env_id, numbers.Integral):
                raise ValueError(f'environment {env_id!r} must be a whole number')
            if not 0 <= env_id < self.env_num:
                raise ValueError(
                    f'environment {env_id} is outside [0, {self.env_num}): '
                    f'raise policy.model.world_model_cfg.env_num={self.env_num}'
                )
        pools = self._pools[mode]
        while len(pools) <= max(env_ids):  # of evaluation
            pools.append(self._paged(self.config.init_pool_size, f'eval_env{len(pools)}'))
        return pools

    def _check_mode(self, mode: str) -> None:
        if mode not in self._pools:
            raise ValueError(f'mode={mode!r} must be one of {", ".join(map(repr, self._pools))}')

    def _make_room(self, count: int) -> None:
        """Grow in one step if the limit allows it, else evict what no search and no current step needs."""
        before = self._pages.capacity
        wanted = min(before + max(count, before // 2), self.page_limit)
        if not self._out_of_memory and wanted - before >= count - self._pages.free:
            if self.store is None or self.store.grow(wanted):
                logger.info(f'Grew the page storage from {before} to {wanted} pages ({self.memory_mb:.1f} MiB)')
                self._pages.grow(wanted)
                return
            self._out_of_memory = True
            logger.warning(
                f'Out of memory while the page storage grew from {before} to {wanted} pages: it stays as it was, and '
                'older root contexts are evicted from now on'
            )
        elif not self._out_of_memory:
            self._warn_once(
                'full', f'The page storage is full at {before} pages ({self.memory_mb:.1f} MiB): evicting older root '
                'contexts; raise kv_cache_cfg.max_memory_mb or lower kv_cache_cfg.init_pool_size'
            )
        for pools in self._pools.values():
            for pool in pools:
                while self._pages.free < count and pool.evict_but(pool.newest):
                    pass

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self._told:
            self._told.add(topic)
            logger.warning(message)


def _are_current(keys: Sequence[Hashable]) -> bool:
    return len(keys) > 0 and keys[0] is CURRENT


def _summary(pool: KVCachePool, current: int = 0) -> Dict[str, Any]:
    return {**pool.stats.summary(), 'size': len(pool) + current, 'capacity': pool.pool_size}
