"""Counts of a pool. Knows numbers only."""
from dataclasses import asdict, dataclass
from typing import Any, Dict, Mapping, Sequence


@dataclass
class CacheStats:
    """
    Overview:
        What happened in one pool; ``hits + misses == total_queries`` always.
    Arguments:
        - hits (:obj:`int`): Look-ups that found an entry.
        - misses (:obj:`int`): Look-ups that found none.
        - evictions (:obj:`int`): Entries that were evicted.
        - total_queries (:obj:`int`): Look-ups.
    """
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    total_queries: int = 0

    def record(self, queries: int, hits: int) -> None:
        """
        Overview:
            Count a batch of look-ups.
        Arguments:
            - queries (:obj:`int`): How many keys were looked up.
            - hits (:obj:`int`): How many of them were found.
        """
        self.total_queries += queries
        self.hits += hits
        self.misses += queries - hits

    @property
    def hit_rate(self) -> float:
        """Hits per query, 0.0 before the first query."""
        return self.hits / self.total_queries if self.total_queries else 0.0

    def reset(self) -> None:
        """
        Overview:
            Set every count to 0.
        """
        self.hits = self.misses = self.evictions = self.total_queries = 0

    def summary(self) -> Dict[str, Any]:
        """
        Overview:
            The counts and the rate as plain numbers, ready for JSON.
        Returns:
            - summary (:obj:`Dict[str, Any]`): ``hits``, ``misses``, ``evictions``, ``total_queries``, and \
                ``hit_rate``, from 0.0 to 1.0.
        """
        return {**asdict(self), 'hit_rate': self.hit_rate}


def query_counters(asked: Mapping[str, CacheStats]) -> Dict[str, Dict[str, Any]]:
    """The searches' queries of 'init' and of 'recur', and of both as 'total', as tensorboard shows them."""
    total = CacheStats()
    for stats in asked.values():
        total.record(stats.total_queries, stats.hits)
    return {
        name: {'queries': stats.total_queries, 'hits': stats.hits, 'misses': stats.misses}
        for name, stats in {**asked, 'total': total}.items()
    }


def add_pools(counters: Dict[str, Dict[str, Any]], pools: Mapping[str, Sequence[Any]], held: Mapping[str, int]) -> None:
    """Add evictions and occupancy, from the pools of 'init' and 'recur' and how many contexts there are in each."""
    all_pools = {**pools, 'total': [pool for of_kind in pools.values() for pool in of_kind]}
    all_held = {**held, 'total': sum(held.values())}
    for name, of_kind in all_pools.items():
        counters[name]['evictions'] = sum(pool.stats.evictions for pool in of_kind)
        counters[name]['occupancy'] = all_held[name] / sum(pool.pool_size for pool in of_kind)
