"""Which key leaves a full pool: a dict of keys and slots for each strategy. Knows keys and slots only."""
from collections import OrderedDict, defaultdict
from enum import Enum
from typing import Any, DefaultDict, Dict, Hashable, Iterable, Optional, Set, Type


class EvictionStrategy(Enum):
    """
    Overview:
        The strategies of a pool: first in first out, least recently used, lowest priority.
    """
    FIFO = 'fifo'
    LRU = 'lru'
    PRIORITY = 'priority'


class FifoSlots(OrderedDict):
    """The slots of a pool's keys. The key that was stored first is evicted first."""

    def read(self, keys: Iterable[Hashable]) -> None:
        """Note that stored keys were looked up."""

    def rank(self, key: Hashable, priority: Optional[float]) -> None:
        """Note the priority that a stored key was given; None for none."""

    def next_but(self, kept: Hashable) -> Any:
        """The key to evict next, which is not ``kept``; there must be one."""
        keys = iter(self)
        key = next(keys)
        return next(keys) if key == kept else key


class LruSlots(FifoSlots):
    """The key that was looked up or stored the longest ago is evicted first."""

    def read(self, keys: Iterable[Hashable]) -> None:
        for key in keys:
            self.move_to_end(key)


class PrioritySlots(FifoSlots):
    """The key of lowest priority is evicted first, the oldest among equals. A key that was given no priority has its
    number of hits for it."""

    def __init__(self) -> None:
        super().__init__()
        self._priorities: DefaultDict[Hashable, float] = defaultdict(int)
        self._given: Set[Hashable] = set()

    def __delitem__(self, key: Hashable) -> None:
        self._priorities.pop(key, None)
        self._given.discard(key)
        super().__delitem__(key)

    def read(self, keys: Iterable[Hashable]) -> None:
        for key in keys:
            if key not in self._given:
                self._priorities[key] += 1

    def rank(self, key: Hashable, priority: Optional[float]) -> None:
        if priority is not None:
            self._given.add(key)
            self._priorities[key] = priority

    def next_but(self, kept: Hashable) -> Any:
        priority = self._priorities.__getitem__
        key = min(self, key=priority)
        return min((key for key in self if key != kept), key=priority) if key == kept else key


SLOTS: Dict[EvictionStrategy, Type[FifoSlots]] = {
    EvictionStrategy.FIFO: FifoSlots, EvictionStrategy.LRU: LruSlots, EvictionStrategy.PRIORITY: PrioritySlots
}
