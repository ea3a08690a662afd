"""Which key leaves a full pool: cachetools' classes under one interface. Knows keys only."""
import heapq
from enum import Enum
from typing import Any, Dict, Hashable, List, Optional, Tuple

from cachetools import Cache, FIFOCache, LRUCache


class EvictionStrategy(Enum):
    """
    Overview:
        The strategies of a pool: first in first out, least recently used, lowest priority.
    """
    FIFO = 'fifo'
    LRU = 'lru'
    PRIORITY = 'priority'


class PriorityCache(Cache):
    """
    Overview:
        A cache that evicts the key of lowest priority, the oldest among equals. A key's priority is what ``rank``
        gave it, else the number of times it was read.

        The heap may hold outdated priorities; an outdated item is corrected when it comes up, so that a read costs
        no heap operation.
    """

    def __init__(self, maxsize: int) -> None:
        super().__init__(maxsize)
        self._ranks: Dict[Hashable, float] = {}
        self._reads: Dict[Hashable, int] = {}
        self._births: Dict[Hashable, int] = {}
        self._heap: List[Tuple[float, int, Hashable]] = []
        self._clock = 0

    def _priority(self, key: Hashable) -> float:
        return self._ranks.get(key, self._reads[key])

    def _push(self, priority: float, key: Hashable) -> None:
        heapq.heappush(self._heap, (priority, self._births[key], key))
        if len(self._heap) > 4 * self.maxsize + 64:
            self._heap = [(self._priority(stored), birth, stored) for stored, birth in self._births.items()]
            heapq.heapify(self._heap)

    def __getitem__(self, key: Hashable) -> Any:
        value = super().__getitem__(key)
        self._reads[key] += 1
        return value

    def __setitem__(self, key: Hashable, value: Any) -> None:
        super().__setitem__(key, value)
        if key not in self._births:
            self._clock += 1
            self._births[key] = self._clock
            self._reads[key] = 0
            self._push(0.0, key)

    def __delitem__(self, key: Hashable) -> None:
        super().__delitem__(key)
        del self._births[key], self._reads[key]
        self._ranks.pop(key, None)

    def rank(self, key: Hashable, priority: float) -> None:
        """
        Overview:
            Give a stored key a priority of its own.
        """
        self._ranks[key] = priority
        self._push(priority, key)

    def popitem(self) -> Tuple[Hashable, Any]:
        return self.pop_but(_NOBODY)

    def pop_but(self, spared: Hashable) -> Tuple[Hashable, Any]:
        """
        Overview:
            As ``popitem``, but never the spared key.
        """
        aside = None
        while self._heap:
            priority, birth, key = heapq.heappop(self._heap)
            if self._births.get(key) != birth:
                continue
            current = self._priority(key)
            if current > priority:
                self._push(current, key)
            elif current == priority and key == spared:
                aside = (priority, birth, key)
            elif current == priority:
                if aside is not None:
                    heapq.heappush(self._heap, aside)
                value = super().__getitem__(key)
                del self[key]
                return key, value
        raise KeyError(f'{type(self).__name__} has no key to let go')


_NOBODY = object()

_CLASSES = {
    EvictionStrategy.FIFO: FIFOCache,
    EvictionStrategy.LRU: LRUCache,
    EvictionStrategy.PRIORITY: PriorityCache,
}


def make_index(strategy: EvictionStrategy, capacity: int) -> Cache:
    """
    Overview:
        An empty key -> slot index of the given strategy.
    Arguments:
        - strategy (:obj:`EvictionStrategy`): Which key leaves when it is full.
        - capacity (:obj:`int`): Keys that it holds at the most.
    Returns:
        - index (:obj:`Cache`): A cachetools cache.
    """
    return _CLASSES[strategy](capacity)


def rank(index: Cache, key: Hashable, priority: Optional[float]) -> None:
    """
    Overview:
        Pass an explicit priority on to an index that uses priorities.
    """
    if priority is not None and isinstance(index, PriorityCache):
        index.rank(key, priority)


def pop_but(index: Cache, spared: Hashable) -> Tuple[Hashable, Any]:
    """
    Overview:
        Let the strategy's next key go, but not the spared one; with FIFO and LRU that one counts as new if it was next.
    Arguments:
        - index (:obj:`Cache`): From :func:`make_index`, with another key beside the spared one.
        - spared (:obj:`Hashable`): The key to keep.
    Returns:
        - item (:obj:`Tuple[Hashable, Any]`): The key that went, and its value.
    """
    if isinstance(index, PriorityCache):
        return index.pop_but(spared)
    key, value = index.popitem()
    if key != spared:
        return key, value
    item = index.popitem()
    index[key] = value
    return item
