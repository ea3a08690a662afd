"""What every pool is compared with."""
from lzero_kvcache.cache.stats import CacheStats


class PoolModel:
    """What a pool should hold, told plainly: key -> [value, priority, hits, birth, last use]."""

    def __init__(self, size, strategy):
        self.size, self.now = size, 0
        self.entries, self.stats = {}, CacheStats()
        self.worth = {
            'fifo': lambda entry: entry[3],
            'lru': lambda entry: entry[4],
            'priority': lambda entry: (entry[2] if entry[1] is None else entry[1], entry[3]),
        }[strategy]

    def evict_but(self, kept):
        others = [key for key in self.entries if key != kept]
        if others:
            del self.entries[min(others, key=lambda key: self.worth(self.entries[key]))]
            self.stats.evictions += 1
        return bool(others)

    def put(self, key, value, priority=None):
        if self.entries.pop(key, None) is None and len(self.entries) == self.size:
            self.evict_but(None)
        self.now += 1
        self.entries[key] = [value, priority, 0, self.now, self.now]

    def get(self, key):
        entry = self.entries.get(key)
        self.stats.record(1, entry is not None)
        if entry is None:
            return None
        self.now += 1
        entry[2], entry[4] = entry[2] + 1, self.now
        return entry[0]

    def clear(self):
        self.entries.clear()
