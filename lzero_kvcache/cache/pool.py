"""Pools: keys with a capacity, an eviction strategy and counts. Knows keys, slots, page ids; no model, no tensor."""
import functools
import logging
import numbers
from typing import Any, Dict, Hashable, Optional, Sequence, Union

import numpy as np

from ..config import checked, nearest
from .contexts import Contexts
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
        - enable_stats (:obj:`bool`): Whether look-ups and evictions are counted; if not, ``stats`` stays at 0.
        - name (:obj:`str`): How log lines call it.
    Raises:
        - ValueError: ``pool_size`` is no whole number of at least 1, ``enable_stats`` no bool, or the strategy unknown.
    """

    def __init__(
            self,
            pool_size: int,
            eviction_strategy: Union[EvictionStrategy, str] = EvictionStrategy.FIFO,
            enable_stats: bool = True,
            name: str = 'default'
    ) -> None:
        checked(bool, enable_stats, 'enable_stats')
        names = [strategy.value for strategy in EvictionStrategy]
        if not isinstance(eviction_strategy, EvictionStrategy) and eviction_strategy not in names:
            raise ValueError(f'eviction_strategy={eviction_strategy!r} is unknown: {nearest(eviction_strategy, names)}')
        self.pool_size = checked(int, pool_size, 'pool_size')
        self.eviction_strategy = EvictionStrategy(eviction_strategy)
        self.enable_stats = enable_stats
        self.name = name
        self.stats = CacheStats()
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
        slot = self._slots.get(cache_key, -1)
        self._looked_up([cache_key], [slot in self._values])
        return private_copy(self._values.get(slot))

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
        Raises:
            - ValueError: ``priority`` is no number.
        """
        if priority is not None and not isinstance(priority, numbers.Real):
            raise ValueError(f'priority={priority!r} must be a number')
        value = private_copy(kv_cache)
        slot = self._claim(cache_key)
        self._values[slot] = value
        self._slots.rank(cache_key, priority)
        return slot

    def count(self, keys: Sequence[Hashable], found: Sequence[bool]) -> None:
        """
        Overview:
            Count look-ups, which the manager may have made: an environment's newest root is in no pool.
        Arguments:
            - keys (:obj:`Sequence[Hashable]`): The keys that were looked up.
            - found (:obj:`Sequence[bool]`): Whether each of them was there.
        """
        if self.enable_stats:
            self.stats.record(len(keys), sum(found))
        if logger.isEnabledFor(logging.DEBUG):
            for key, there in zip(keys, found):
                if not there:
                    logger.debug("Miss in KVCachePool '%s': key=%s", self.name, key)

    def _looked_up(self, keys: Sequence[Hashable], found: Sequence[bool]) -> None:
        self.count(keys, found)
        self._slots.read(key for key, there in zip(keys, found) if there)

    def remove(self, key: Hashable) -> None:
        """
        Overview:
            Remove an entry, if it is there, without counting an eviction.
        Arguments:
            - key (:obj:`Hashable`): The key.
        """
        if key in self._slots:
            self._remove(key)

    @property
    def newest(self) -> Optional[Hashable]:
        """The key that was stored last, or with 'lru' looked up or stored last; None if there is none."""
        return next(reversed(self._slots), None)

    def evict_but(self, kept: Optional[Hashable]) -> bool:
        """
        Overview:
            Evict the entry that the strategy picks among all but one.
        Arguments:
            - kept (:obj:`Optional[Hashable]`): The key of the entry that stays; it need not be there.
        Returns:
            - evicted (:obj:`bool`): Whether there was an entry to evict.
        """
        if len(self._slots) == (kept in self._slots):
            return False
        key = self._slots.next_but(kept)
        slot = self._remove(key)
        if self.enable_stats:
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

    def _drop(self, slot: int) -> None:
        self._values.pop(slot, None)


@functools.singledispatch
def private_copy(value: Any) -> Any:
    """The form in which a pool keeps and returns an object: the object itself, or a copy if its type registers one."""
    return value


class PagedPool(KVCachePool):
    """A pool whose entries are contexts of ``context_pages`` pages at the most; those that share pages share the memory
    behind them. What is stored by :meth:`set` has no pages: :meth:`find` misses it, as :meth:`get` misses contexts."""

    def __init__(self, *args: Any, pages: PageAllocator, context_pages: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pages = pages
        self.contexts = Contexts(pages, self.pool_size, context_pages)

    def find(self, keys: Sequence[Hashable]) -> Rows:
        """The context of each key, an empty one where there is none."""
        slots = [self._slots.get(key, -1) for key in keys]
        tables, counts = self.contexts.find(slots)
        if -1 in slots:
            missing = np.less(slots, 0)
            tables[missing], counts[missing] = NULL_PAGE, 0
        self._looked_up(keys, (counts > 0).tolist())
        return tables, counts

    def store(self, keys: Sequence[Hashable], rows: Rows) -> None:
        """Store an entry for each key, the last ones where not all fit; each takes a reference to each of its pages."""
        tables, counts = rows
        new = dict(zip(keys, reversed(self._unused)))
        if len(new) == len(keys) and self._slots.keys().isdisjoint(new):  # all at once: nothing leaves
            self._slots.update(new)
            del self._unused[len(self._unused) - len(new):]
            self.contexts.store(list(new.values()), rows)
            return
        with self._pages.lease() as lease:
            lease.hold(tables)  # to store one may evict an entry that shares pages with it, or with the next
            for row, key in enumerate(keys):
                self.contexts.store([self._claim(key)], (tables[row:row + 1], counts[row:row + 1]))

    def clear(self) -> None:
        self.contexts.clear()
        super().clear()

    def _drop(self, slot: int) -> None:
        super()._drop(slot)
        self.contexts.clear(slot)
