"""Pools: keys with a capacity, an eviction strategy and counts. Knows keys, slots, page ids; no model, no tensor.

Rows of entries are tables of page ids ``[B, width]``, left-aligned and padded with the null page, and counts ``[B]``.
"""
import copy
import logging
from abc import ABC, abstractmethod
from typing import Any, Callable, Dict, Hashable, List, Optional, Sequence, Union

import numpy as np

from ..config import nearest
from .eviction import SLOTS, EvictionStrategy
from .pages import NULL_PAGE, PageAllocator, Rows
from .stats import CacheStats

logger = logging.getLogger(__name__)


class KVCachePool:
    """
    Overview:
        A pool of any objects by key. A ``KeysValues`` goes in and comes out as a private copy; any other object is
        held as it is.
    Arguments:
        - pool_size (:obj:`int`): Entries that it holds at the most.
        - eviction_strategy (:obj:`Union[EvictionStrategy, str]`): Which entry leaves when it is full.
        - enable_stats (:obj:`bool`): Whether look-ups and evictions are counted.
        - name (:obj:`str`): How log lines call it.
    Raises:
        - ValueError: ``pool_size`` below 1 or an unknown strategy.
    """

    def __init__(
            self,
            pool_size: int,
            eviction_strategy: Union[EvictionStrategy, str] = EvictionStrategy.FIFO,
            enable_stats: bool = True,
            name: str = 'default'
    ) -> None:
        if isinstance(pool_size, bool) or int(pool_size) != pool_size or pool_size < 1:
            raise ValueError(f'pool_size={pool_size!r} must be a whole number of at least 1')
        names = [strategy.value for strategy in EvictionStrategy]
        if not isinstance(eviction_strategy, EvictionStrategy) and eviction_strategy not in names:
            raise ValueError(f'eviction_strategy={eviction_strategy!r} is unknown: {nearest(eviction_strategy, names)}')
        self.pool_size = int(pool_size)
        self.eviction_strategy = EvictionStrategy(eviction_strategy)
        self.enable_stats = enable_stats
        self.name = name
        self.stats: Optional[CacheStats] = CacheStats() if enable_stats else None
        self._empty()
        logger.info(
            f"Initialized KVCachePool '{name}' with size={self.pool_size}, strategy={self.eviction_strategy.value}"
        )

    def _empty(self) -> None:
        self._slots = SLOTS[self.eviction_strategy]()
        self._unused = list(range(self.pool_size - 1, -1, -1))
        self._values: Dict[int, Any] = {}

    def get(self, cache_key: Hashable) -> Optional[Any]:
        """
        Overview:
            Look a key up and count it.
        Arguments:
            - cache_key (:obj:`Hashable`): The key.
        Returns:
            - value (:obj:`Optional[Any]`): What was stored, or None.
        """
        slot = self.slot(cache_key)
        return None if slot < 0 else self._load(slot)

    def set(self, cache_key: Hashable, kv_cache: Any, priority: Optional[float] = None) -> int:
        """
        Overview:
            Store a value; an equal key is replaced, and a full pool evicts first.
        Arguments:
            - cache_key (:obj:`Hashable`): The key.
            - kv_cache (:obj:`Any`): The value.
            - priority (:obj:`Optional[float]`): For 'priority': how much it is worth keeping; default: its hits.
        Returns:
            - slot (:obj:`int`): The slot that it is stored in, from 0 to ``pool_size - 1``.
        """
        value = private_copy(kv_cache)
        slot = self._claim(cache_key)
        self._values[slot] = value
        self._slots.rank(cache_key, priority)
        return slot

    def slot(self, key: Hashable) -> int:
        """
        Overview:
            Look a key up and count it.
        Arguments:
            - key (:obj:`Hashable`): The key.
        Returns:
            - slot (:obj:`int`): Where its value is, -1 if it is not there.
        """
        return self.slots([key])[0]

    def slots(self, keys: Sequence[Hashable]) -> List[int]:
        """
        Overview:
            :meth:`slot` of many keys.
        """
        get = self._slots.get
        slots = [get(key, -1) for key in keys]
        misses = slots.count(-1)
        if self.stats is not None:
            self.stats.record(len(keys), len(keys) - misses)
        if misses and logger.isEnabledFor(logging.DEBUG):
            for key, slot in zip(keys, slots):
                if slot < 0:
                    logger.debug("Miss in KVCachePool '%s': key=%s", self.name, key)
        self._slots.read(key for key, slot in zip(keys, slots) if slot >= 0)
        return slots

    def count(self, key: Hashable, found: bool) -> None:
        """
        Overview:
            Count a look-up that the manager made: an environment's newest root is in no pool.
        """
        if self.stats is not None:
            self.stats.record(1, int(found))
        if not found:
            logger.debug("Miss in KVCachePool '%s': key=%s", self.name, key)

    def remove(self, key: Hashable) -> None:
        """
        Overview:
            Remove an entry, if it is there, without counting an eviction.
        """
        if key in self._slots:
            self._remove(key)

    def evict_but(self, kept: Optional[Hashable]) -> bool:
        """
        Overview:
            Evict the entry that the strategy picks among all but ``kept``; False if there is none.
        """
        if len(self._slots) == (kept in self._slots):
            return False
        key = self._slots.next_but(kept)
        slot = self._remove(key)
        if self.stats is not None:
            self.stats.evictions += 1
        logger.debug("Eviction from KVCachePool '%s': key=%s, slot=%s", self.name, key, slot)
        return True

    def clear(self) -> None:
        """
        Overview:
            Forget every entry; counts stay.
        """
        if self._slots:
            logger.debug("Clear of KVCachePool '%s': %s entries", self.name, len(self._slots))
            self._empty()

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, cache_key: Hashable) -> bool:
        return cache_key in self._slots

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name='{self.name}', size={len(self)}/{self.pool_size}, "
            f'strategy={self.eviction_strategy.value}, {self.stats})'
        )

    def _claim(self, key: Hashable) -> int:
        """The slot to write a key's value to. Of equal keys the newest wins, and counts as new."""
        if key in self._slots:
            self._remove(key)
        elif not self._unused:
            self.evict_but(key)
        self._slots[key] = slot = self._unused[-1]
        self._unused.pop()
        return slot

    def _remove(self, key: Hashable) -> int:
        slot = self._slots[key]
        self._drop(slot)
        del self._slots[key]
        self._unused.append(slot)
        return slot

    def _load(self, slot: int) -> Any:
        return private_copy(self._values.get(slot))

    def _drop(self, slot: int) -> None:
        self._values.pop(slot, None)


def private_copy(value: Any) -> Any:
    """A deep copy of a ``KeysValues``-like object, and any other object itself."""
    if not hasattr(value, '_keys_values'):
        return value
    caches = [cache for layer in value for cache in (layer._k_cache, layer._v_cache)]
    # Tensors that were made with gradients cannot be deep-copied.
    return copy.deepcopy(value, {id(cache._cache): cache._cache.detach().clone() for cache in caches})


class Codec(ABC):
    """The adapter between values that are stored by hand and pages."""

    @abstractmethod
    def pages_for(self, value: Any) -> int:
        """How many pages a value takes; 0 if it is no context that could be continued, and is stored as it is."""

    @abstractmethod
    def write(self, value: Any, pages: np.ndarray) -> None:
        """Write a value to as many pages as it takes."""

    @abstractmethod
    def read(self, pages: np.ndarray) -> Any:
        """A new value with what the pages hold."""


class PagedPool(KVCachePool):
    """
    A pool whose entries are page ids, ``width`` at the most; entries that share pages share the memory behind them.
    Values that are stored by hand go through the codec to pages that ``take`` gets, by default from ``pages``.
    """

    def __init__(self, *args: Any, pages: PageAllocator, width: int, codec: Codec,
                 take: Optional[Callable[[int], np.ndarray]] = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pages, self._codec, self._take = pages, codec, take
        self.tables = np.full((self.pool_size, width), NULL_PAGE, dtype=np.int64)
        self.counts = np.zeros(self.pool_size, dtype=np.int64)

    def set(self, cache_key: Hashable, kv_cache: Any, priority: Optional[float] = None) -> int:
        count = self._codec.pages_for(kv_cache)
        if not count:
            slot = super().set(cache_key, kv_cache, priority)
            self.tables[slot] = NULL_PAGE
            return slot
        with self._pages.lease(self._take) as lease:  # which may evict from this very pool
            pages = lease.allocate(count)
            self._codec.write(kv_cache, pages)
            slot = self._claim(cache_key)
            lease.hand_over()
            self.tables[slot] = NULL_PAGE
            self.tables[slot, :count], self.counts[slot] = pages, count
        self._slots.rank(cache_key, priority)
        return slot

    def store(self, keys: Sequence[Hashable], rows: Rows) -> None:
        """Store an entry for each key, the last ones where not all fit; each takes a reference to each of its pages."""
        tables, counts = rows
        new = dict(zip(keys, reversed(self._unused)))
        together = len(new) == len(keys) and self._slots.keys().isdisjoint(new)
        if not together and len(keys) > 1:
            with self._pages.lease() as lease:
                lease.hold(tables)  # to store one may evict an entry that shares pages with the next
                for row, key in enumerate(keys):
                    self.store([key], (tables[row:row + 1], counts[row:row + 1]))
            return
        self._pages.retain(tables)
        try:
            if together:
                slots = list(new.values())
                self._slots.update(new)
                del self._unused[len(self._unused) - len(slots):]
            else:
                slots = [self._claim(keys[0])]
        except BaseException:
            self._pages.release(tables)
            raise
        self.tables[slots], self.counts[slots] = rows

    def clear(self) -> None:
        if self._slots:
            self._pages.release(self.tables[self.counts > 0])
            self.counts[:] = 0
            super().clear()

    def _load(self, slot: int) -> Any:
        count = self.counts[slot]
        return self._codec.read(self.tables[slot, :count]) if count else super()._load(slot)

    def _drop(self, slot: int) -> None:
        super()._drop(slot)
        if self.counts[slot]:
            self._pages.release(self.tables[slot, :self.counts[slot]])
            self.counts[slot] = 0
