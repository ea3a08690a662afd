"""Pools: keys with a capacity, an eviction strategy and counts. Knows keys, slots, page ids; no model, no tensor."""
import copy
import logging
from abc import ABC, abstractmethod
from typing import Any, Dict, Hashable, List, Optional, Sequence, Tuple, Union

import numpy as np

from .eviction import EvictionStrategy, make_index, pop_but, rank
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
        self.pool_size = int(pool_size)
        self.eviction_strategy = EvictionStrategy(eviction_strategy)
        self.enable_stats = enable_stats
        self.name = name
        self.stats: Optional[CacheStats] = CacheStats() if enable_stats else None
        self._reset_index()
        logger.info(
            f"Initialized KVCachePool '{name}' with size={self.pool_size}, strategy={self.eviction_strategy.value}"
        )

    def _reset_index(self) -> None:
        # Two views of the same keys: a plain dict to look up, and the strategy's own order of eviction.
        self._slots: Dict[Hashable, int] = {}
        self._order = make_index(self.eviction_strategy, self.pool_size)
        self._unordered: List[Tuple[Sequence[Hashable], List[int]]] = []  # stored in bulk, not yet in that order
        self._reads_count = self.eviction_strategy is not EvictionStrategy.FIFO
        self._unused = list(range(self.pool_size - 1, -1, -1))
        self._values: Dict[int, Any] = {}

    def _ordered(self) -> Any:
        """The order of eviction, which a search that is cleared before its pool is full never needs."""
        for keys, slots in self._unordered:
            for key, slot in zip(keys, slots):
                self._order[key] = slot
        self._unordered.clear()
        return self._order

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
        stored = self._prepare(kv_cache)  # first: this may fail, or make room by evicting from this very pool
        slot = self.claim(cache_key)
        rank(self._ordered(), cache_key, priority)
        self._keep(slot, stored)
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
        if self._reads_count:
            order = self._ordered()
            for key, slot in zip(keys, slots):
                if slot >= 0:
                    order[key]
        return slots

    def claim(self, key: Hashable) -> int:
        """
        Overview:
            The slot to write a key's value to: its own if it is stored, else an unused one, else an evicted one's.
            Of equal keys the newest wins, and counts as new.
        """
        order, slot = self._ordered(), self._slots.pop(key, None)
        if slot is not None:
            del order[key]
            self._drop(slot)
        else:
            if not self._unused:
                self.evict()
            slot = self._unused.pop()
        self._slots[key] = order[key] = slot
        return slot

    def count(self, key: Hashable, found: bool) -> None:
        """Count a look-up that was made for this pool elsewhere."""
        if self.stats is not None:
            self.stats.record(1, int(found))
        if not found:
            logger.debug("Miss in KVCachePool '%s': key=%s", self.name, key)

    def remove(self, key: Hashable) -> None:
        """Let an entry go that nobody will ask for again; that is no eviction."""
        order, slot = self._ordered(), self._slots.pop(key, None)
        if slot is not None:
            del order[key]
            self._drop(slot)
            self._unused.append(slot)

    def evict(self) -> None:
        """
        Overview:
            Let the strategy's next entry go.
        """
        self._let_go(*self._ordered().popitem())

    def _let_go(self, key: Hashable, slot: int) -> None:
        del self._slots[key]
        self._drop(slot)
        self._unused.append(slot)
        if self.stats is not None:
            self.stats.evictions += 1
        logger.debug("Eviction from KVCachePool '%s': key=%s, slot=%s", self.name, key, slot)

    def evict_but(self, kept: Optional[Hashable]) -> bool:
        """
        Overview:
            Let the strategy's next entry go, but never that of ``kept``; False where there is no other.
        """
        found = len(self._slots) > (kept in self._slots)
        if found:
            self._let_go(*pop_but(self._ordered(), kept))
        return found

    def clear(self) -> None:
        """
        Overview:
            Forget every entry; counts stay.
        """
        if self._slots:
            logger.debug("Clear of KVCachePool '%s': %s entries", self.name, len(self._slots))
            self._reset_index()

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, cache_key: Hashable) -> bool:
        return cache_key in self._slots

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name='{self.name}', size={len(self)}/{self.pool_size}, "
            f'strategy={self.eviction_strategy.value}, {self.stats})'
        )

    def _prepare(self, value: Any) -> Any:
        return private_copy(value)

    def _keep(self, slot: int, stored: Any) -> None:
        self._values[slot] = stored

    def _load(self, slot: int) -> Any:
        return private_copy(self._values[slot])

    def _drop(self, slot: int) -> None:
        self._values.pop(slot, None)


def private_copy(value: Any) -> Any:
    """
    Overview:
        A deep copy of a ``KeysValues``-like object, and any other object itself.
    """
    if not hasattr(value, '_keys_values'):
        return value
    caches = [cache for layer in value for cache in (layer._k_cache, layer._v_cache)]
    # Tensors that were made with gradients cannot be deep-copied.
    return copy.deepcopy(value, {id(cache._cache): cache._cache.detach().clone() for cache in caches})


class PagedPool(KVCachePool):
    """
    Overview:
        A pool whose entries are page ids. Entries that share pages share the memory behind them.
    Arguments:
        - pool_size, eviction_strategy, enable_stats, name: As :class:`KVCachePool`.
        - pages (:obj:`PageAllocator`): Who counts the references.
        - width (:obj:`int`): Pages that an entry has at the most.
        - codec (:obj:`Codec`): Turns a value that was stored by hand into pages and back.
    """

    def __init__(self, *args: Any, pages: PageAllocator, width: int, codec: 'Codec', **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pages, self._codec = pages, codec
        self.tables = np.full((self.pool_size, width), NULL_PAGE, dtype=np.int64)
        self.counts = np.zeros(self.pool_size, dtype=np.int64)

    def clear(self) -> None:
        """
        Overview:
            Forget every entry and give its pages back in one go; counts stay.
        """
        if self._slots:
            self._pages.release(self.tables[self.counts > 0])
            self.counts.fill(0)
            super().clear()

    def store(self, keys: Sequence[Hashable], rows: Rows) -> None:
        """
        Overview:
            Store many entries; each takes a reference to each of its pages.
        Arguments:
            - keys (:obj:`Sequence[Hashable]`): ``B`` distinct keys.
            - rows (:obj:`Rows`): Tables ``[B, width]`` and counts ``[B]``, at least 1.
        """
        self._pages.retain(rows[0])
        if self._slots.keys().isdisjoint(keys) and len(keys) <= len(self._unused):
            first = len(self._unused) - len(keys)
            slots = self._unused[first:]
            del self._unused[first:]
            self._slots.update(zip(keys, slots))
            self._unordered.append((list(keys), slots))
            written = np.array(slots, dtype=np.int64)
            self.tables[written], self.counts[written] = rows
        else:
            for key, table, count in zip(keys, *rows):
                slot = self.claim(key)
                self.tables[slot], self.counts[slot] = table, count

    def _prepare(self, value: Any) -> Any:
        pages = self._codec.write(value)
        return pages, super()._prepare(value) if pages is None else None

    def _keep(self, slot: int, stored: Any) -> None:
        pages, value = stored
        self.tables[slot] = NULL_PAGE
        if pages is None:
            super()._keep(slot, value)
        else:
            self.tables[slot, :len(pages)] = pages
            self.counts[slot] = len(pages)

    def _load(self, slot: int) -> Any:
        count = self.counts[slot]
        return self._codec.read(self.tables[slot, :count]) if count else super()._load(slot)

    def _drop(self, slot: int) -> None:
        super()._drop(slot)
        if self.counts[slot]:
            self._pages.release(self.tables[slot, :self.counts[slot]])
            self.counts[slot] = 0


class Codec(ABC):
    """
    Overview:
        The adapter between values that are stored by hand and pages.
    """

    @abstractmethod
    def write(self, value: Any) -> Optional[np.ndarray]:
        """
        Overview:
            Write a value to new pages.
        Returns:
            - pages (:obj:`Optional[np.ndarray]`): Page ids with one reference each, or None where the value is not \
                a context that could be continued; the pool then holds a copy of it.
        """

    @abstractmethod
    def read(self, pages: np.ndarray) -> Any:
        """
        Overview:
            A new value with what the pages hold.
        """
