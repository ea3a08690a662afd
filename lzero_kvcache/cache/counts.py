"""What the searches asked of a manager, and how full its pools were: the numbers that tensorboard shows."""
from typing import Any, Dict, Sequence

from .pool import PagedPool
from .stats import CacheStats


class Counts:
    """Queries of roots and of nodes, rows that were skipped, and occupancies as the last step left them: when they are
    read, an update has emptied the pools."""

    def __init__(self) -> None:
        self.asked = {'init': CacheStats(), 'recur': CacheStats()}
        self.filled = {'init': 0.0, 'recur': 0.0}
        self.skipped = 0

    def read(self, init_pools: Sequence[PagedPool], recur_pool: PagedPool) -> Dict[str, Any]:
        """``skipped``, and for ``init``, ``recur`` and ``total`` what was asked, evicted and filled."""
        pools = {'init': init_pools, 'recur': [recur_pool]}
        counts: Dict[str, Any] = {'skipped': self.skipped}
        total, all_filled, all_size = CacheStats(), 0.0, 0
        for name, asked in self.asked.items():
            size = sum(pool.pool_size for pool in pools[name])
            counts[name] = _of(asked, pools[name], self.filled[name])
            total.record(asked.total_queries, asked.hits)
            all_filled, all_size = all_filled + self.filled[name] * size, all_size + size
        counts['total'] = _of(total, [*init_pools, recur_pool], all_filled / all_size)
        return counts

    def reset(self) -> None:
        """Set queries and skipped rows to 0."""
        for asked in self.asked.values():
            asked.reset()
        self.skipped = 0


def _of(asked: CacheStats, pools: Sequence[PagedPool], filled: float) -> Dict[str, Any]:
    return {
        'queries': asked.total_queries,
        'hits': asked.hits,
        'misses': asked.misses,
        'evictions': sum(pool.stats.evictions for pool in pools if pool.stats is not None),
        'occupancy': filled,
    }
