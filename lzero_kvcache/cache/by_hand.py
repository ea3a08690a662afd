"""What a manager offers to those who store and read contexts themselves, with the names of LightZero's main branch."""
from typing import Any, Hashable, Optional

from .pool import KVCachePool, PagedPool


class ByHand:
    """Look-ups and stores by key in the init pools of collection, the recurrent pool and the working batch."""
    recur_pool: PagedPool
    wm_pool: KVCachePool

    def _pool_of(self, env_id: int) -> PagedPool:
        """An environment's init pool of collection."""
        raise NotImplementedError

    def get_init_cache(self, env_id: int, cache_key: Hashable) -> Any:
        """
        Overview:
            A copy of the context stored for an environment's root, or None.
        Raises:
            - ValueError: There is no such environment.
        """
        return self._pool_of(env_id).get(cache_key)

    def set_init_cache(self, env_id: int, cache_key: Hashable, kv_cache: Any) -> int:
        """
        Overview:
            Store a copy of a context for an environment's root; returns its slot.
        Raises:
            - ValueError: There is no such environment.
        """
        return self._pool_of(env_id).set(cache_key, kv_cache)

    def get_recur_cache(self, cache_key: Hashable, env_id: Optional[int] = None) -> Any:
        """
        Overview:
            A copy of the context stored for a node, of one environment or of none in particular, or None.
        """
        return self.recur_pool.get((env_id, cache_key))

    def set_recur_cache(self, cache_key: Hashable, kv_cache: Any, env_id: Optional[int] = None) -> int:
        """
        Overview:
            Store a copy of a context for a node; returns its slot.
        """
        return self.recur_pool.set((env_id, cache_key), kv_cache)

    def get_wm_cache(self, cache_key: Hashable) -> Any:
        """
        Overview:
            A copy of what was put into the working batch by hand, or None.
        """
        return self.wm_pool.get(cache_key)

    def set_wm_cache(self, cache_key: Hashable, kv_cache: Any) -> int:
        """
        Overview:
            Put a copy of a context into the working batch; returns its slot.
        """
        return self.wm_pool.set(cache_key, kv_cache)

    def hierarchical_get(self, env_id: int, cache_key: Hashable) -> Any:
        """
        Overview:
            Look in an environment's init pool, then among its recurrent entries, then among those of none.
        """
        found = self.get_init_cache(env_id, cache_key)
        if found is None and (env_id, cache_key) in self.recur_pool:
            return self.get_recur_cache(cache_key, env_id)
        return self.get_recur_cache(cache_key) if found is None else found
