"""Pools: one suite that every pool must pass under every strategy, each strategy's own few, and pages by entries."""
import copy
import pickle

import numpy as np
import pytest
from failing import failing
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_model import PoolModel

from lzero_kvcache import CacheStats, EvictionStrategy, KVCachePool
from lzero_kvcache.cache.pages import RESERVED_PAGES, OutOfPages, PageAllocator
from lzero_kvcache.cache.pool import Codec, PagedPool

WIDTH = 3


class ListCodec(Codec):
    """Keeps lists of up to ``WIDTH`` items, an item a page; anything else is left to the pool."""

    def __init__(self):
        self.content = {}

    def pages_for(self, value):
        return len(value) if isinstance(value, list) else 0

    def write(self, value, pages):
        self.content.update(zip(pages.tolist(), value))

    def read(self, pages):
        return [self.content[page] for page in pages.tolist()]


class EvictingPool(PagedPool):
    """Pages for a value are taken as a manager takes them: where too few are free, this pool evicts to have them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, take=self.take, **kwargs)

    def take(self, count):
        while self._pages.free < count and self.evict_but(None):
            pass
        return self._pages.allocate(count)


def paged_pool(size, strategy='fifo', capacity=None, kind=PagedPool, **kwargs):
    pages = PageAllocator(RESERVED_PAGES + (WIDTH * (size + 1) if capacity is None else capacity))
    return kind(size, strategy, **kwargs, pages=pages, width=WIDTH, codec=ListCodec())


def text(number):
    return f'value {number}'


def items(number):
    return [number] * (1 + number % WIDTH)


def rows(pages):
    """Contexts of one page each."""
    return np.pad(pages[:, None], ((0, 0), (0, WIDTH - 1))), np.ones(len(pages), np.int64)


def store(pool, keys):
    """Contexts of one new page each, as a step stores them; returns the pages."""
    with pool._pages.lease() as lease:
        pages = lease.allocate(len(keys))
        pool.store(keys, rows(pages))
    return pages.tolist()


def held(pool, keys):
    """Those of the keys that the pool holds, without a look-up."""
    return [key for key in keys if key in pool]


def audit(pool):
    """Every slot is unused or an entry's; every page has as many references as entries name it."""
    assert sorted([*pool._unused, *pool._slots.values()]) == list(range(pool.pool_size))
    if isinstance(pool, PagedPool):
        pool._pages.collect()
        assert not pool.counts[pool._unused].any()
        mentions = np.zeros(pool._pages.capacity, np.int64)
        mentions[:RESERVED_PAGES] = 1
        for table, count in zip(pool.tables, pool.counts):
            np.add.at(mentions, table[:count], 1)
        assert pool._pages.references.tolist() == mentions.tolist()
        assert pool._pages.used == (mentions > 0).sum() - RESERVED_PAGES


KEYS = st.integers(0, 6)
OPERATIONS = st.lists(st.tuples(
    st.one_of(
        st.tuples(st.just('set'), KEYS, st.integers(0, 50), st.none() | st.integers(-2, 3)),
        st.tuples(st.just('store'), st.lists(KEYS, max_size=5, unique=True)),
        st.tuples(st.just('get'), KEYS),
        st.tuples(st.just('evict_but'), st.none() | KEYS),
        st.tuples(st.just('clear')),
        st.tuples(st.just('copy'), st.sampled_from([copy.deepcopy, lambda pool: pickle.loads(pickle.dumps(pool))])),
    ), st.one_of([st.none()] * 5 + [st.integers(1, 25)])
), max_size=60)


@pytest.fixture(scope='module', params=[strategy.value for strategy in EvictionStrategy])
def strategy(request):
    return request.param


class PoolTestMixin:
    """What holds for every pool and every strategy. A subclass says what ``pool`` makes and what ``value`` goes in."""
    pool = staticmethod(KVCachePool)
    value = staticmethod(text)

    def filled(self, size, strategy, **kwargs):
        pool = self.pool(size, strategy, **kwargs)
        for number in range(size):
            pool.set(number, self.value(number))
        return pool

    def test_a_full_pool_evicts_one_and_uses_its_slot(self, strategy):
        pool = self.pool(3, strategy)
        slots = [pool.set(number, self.value(number)) for number in range(3)]
        assert sorted(slots) == [0, 1, 2]
        assert pool.set(3, self.value(3)) == slots[0]
        assert [pool.get(number) for number in range(4)] == [None, *map(self.value, (1, 2, 3))]
        assert (len(pool), pool.stats.evictions) == (3, 1)

    def test_without_counts(self, strategy):
        pool = self.filled(2, strategy, enable_stats=False)
        pool.set(2, self.value(2))
        assert (pool.get(2), pool.get('nothing'), pool.stats) == (self.value(2), None, None)

    def test_debug_lines(self, strategy, debug_lines):
        pool = self.pool(1, strategy, name='mine')
        pool.get('absent')
        pool.set('first', self.value(1))
        pool.set('second', self.value(2))
        pool.clear()
        assert [message for level, message in debug_lines() if level == 'DEBUG'] == [
            "Miss in KVCachePool 'mine': key=absent", "Eviction from KVCachePool 'mine': key=first, slot=0",
            "Clear of KVCachePool 'mine': 1 entries"
        ]

    @pytest.mark.parametrize(('given_to_0', 'reads', 'left'), [
        (None, [0, 0, 2], [0, 2, 3]),  # the fewest hits
        (None, [0, 1, 2], [1, 2, 3]),  # the oldest among equals
        (1.5, [1, 2, 2], [0, 2, 3]), (1.5, [1, 1, 2, 2], [1, 2, 3]),  # a priority beside hits
        (-1, [0, 0, 0], [1, 2, 3]), (0.5, [0, 0, 1, 2], [1, 2, 3]),  # reads do not raise it
    ])
    def test_priority(self, given_to_0, reads, left):
        pool = self.pool(3, 'priority')
        for number in range(3):
            pool.set(number, self.value(number), priority=given_to_0 if number == 0 else None)
        for number in reads:
            pool.get(number)
        pool.set(3, self.value(3))
        assert held(pool, range(4)) == left

    @settings(max_examples=100, deadline=None)
    @given(size=st.integers(1, 4), capacity=st.integers(2, 12), operations=OPERATIONS)
    def test_against_a_plain_dict(self, strategy, size, capacity, operations):
        """Whatever fails and wherever, no slot or page is lost or used twice; without failures, the model is right."""
        pool = self.pool(size, strategy)
        if isinstance(pool, PagedPool):
            pool = paged_pool(size, strategy, capacity, EvictingPool)
        model = PoolModel(size, strategy, capacity)
        for (operation, *arguments), point in operations:
            before = {key: [entry[0]] for key, entry in model.entries.items()}
            with failing(point, __file__) as failed:
                pool = self.run(pool, model, before, operation, *arguments)
            audit(pool)
            if failed:
                # An entry that was being removed may be there without its value, never with another's.
                assert all(pool.get(key) in [*before[key], None] for key in held(pool, range(7)))
                pool.clear()
                model.clear()
                pool.stats, model.stats = CacheStats(), CacheStats()
            assert held(pool, range(7)) == sorted(model.entries)
            assert (len(pool), pool.stats) == (len(model.entries), model.stats)
        pool.clear()
        audit(pool)

    def run(self, pool, model, before, operation, *arguments):
        """Do it to both; ``before`` gets what entries may hold if it fails."""
        if operation == 'set':
            key, number, priority = arguments
            before.setdefault(key, []).append(self.value(number))
            try:
                assert 0 <= pool.set(key, self.value(number), priority=priority) < pool.pool_size
                assert model.set(key, self.value(number), priority)
            except OutOfPages:
                assert not model.set(key, self.value(number), priority)
        elif operation == 'get':
            assert pool.get(*arguments) == model.get(*arguments)
        elif operation == 'evict_but':
            assert pool.evict_but(*arguments) == model.evict_but(*arguments)
        elif operation == 'clear':
            pool.clear()
            model.clear()
        elif operation == 'copy':
            return arguments[0](pool)
        elif isinstance(pool, PagedPool) and pool._pages.free >= len(arguments[0]):
            [keys] = arguments
            for key in keys:
                before.setdefault(key, []).append([key])
            with pool._pages.lease() as lease:
                pages = lease.allocate(len(keys))
                pool._codec.write(keys, pages)
                pool.store(keys, rows(pages))
            for key in keys:
                model.put(key, [key])
        return pool


class TestKVCachePool(PoolTestMixin):

    @pytest.mark.parametrize('size', [0, -1, 1.5, True])
    def test_refuses_a_size(self, size):
        with pytest.raises(ValueError, match=f'pool_size={size}'):
            KVCachePool(size)

    @pytest.mark.parametrize(('name', 'hint'), [
        ('lur', "'lur' is unknown: did you mean 'lru'?"),
        (None, "None is unknown: valid are 'fifo', 'lru', 'priority'"),
    ])
    def test_refuses_a_strategy(self, name, hint):
        with pytest.raises(ValueError) as error:
            KVCachePool(2, name)
        assert str(error.value) == f'eviction_strategy={hint}'

    @pytest.mark.parametrize('chosen', EvictionStrategy)
    def test_takes_a_strategy_or_its_name(self, chosen):
        assert KVCachePool(1).eviction_strategy is EvictionStrategy.FIFO
        assert KVCachePool(1, chosen).eviction_strategy is KVCachePool(1, chosen.value).eviction_strategy is chosen


class TestPagedPoolOfObjects(PoolTestMixin):
    pool = staticmethod(paged_pool)


class TestPagedPoolOfBoth(PoolTestMixin):
    pool = staticmethod(paged_pool)

    @staticmethod
    def value(number):
        return (text, items)[number % 2](number)


class TestPagedPool(PoolTestMixin):
    pool = staticmethod(paged_pool)
    value = staticmethod(items)

    def test_shared_pages_outlive_one_of_their_entries(self):
        """A child's entry is its parent's pages and one more: two entries, two pages."""
        pool = paged_pool(2)
        with pool._pages.lease() as lease:
            shared, own = lease.allocate(2).tolist()
            pool.store(['parent', 'child'], (np.array([[shared, 0, 0], [shared, own, 0]]), np.array([1, 2])))
        assert pool._pages.references[[shared, own]].tolist() == [2, 1]
        pool.set('another', 'no pages')  # in the parent's place
        assert held(pool, ['parent', 'child']) == ['child']
        assert pool._pages.references[[shared, own]].tolist() == [1, 1]
        pool.clear()
        assert pool._pages.used == 0

    def test_many_entries_at_once(self, strategy):
        """More than fit: the newest stay. Keys that are there are replaced; no entries at all are an easy case."""
        pool = paged_pool(3, strategy)
        for keys in (['a', 'b'], [], ['b', 'c'], ['d', 'e', 'a'], ['f', 'g', 'h', 'i']):
            pages = store(pool, keys)
            assert held(pool, keys) == keys[-3:]
            assert pool._pages.used == len(pool) <= 3
        assert pool.tables[pool.slots(['g', 'h', 'i']), 0].tolist() == pages[1:]

    def test_a_key_that_no_dict_takes(self, strategy):
        """Found out after the pages were taken: they go back."""
        pool = paged_pool(3, strategy)
        with pytest.raises(TypeError, match='unhashable'):
            pool.set(['a'], [1, 2])
        with pytest.raises(TypeError, match='unhashable'):
            store(pool, ['a', ['b']])
        audit(pool)

    def test_a_failed_write_leaves_no_trace(self, strategy):
        pool = paged_pool(3, strategy, capacity=3)
        slot = pool.set('a', [1, 2])
        with pytest.raises(OutOfPages):
            pool.set('b', [3, 4])
        with failing(2, __file__) as failed:  # the codec's write
            pool.set('b', [3])
            pytest.fail('nothing failed')
        assert failed
        assert (held(pool, 'ab'), pool.get('a'), pool._pages.used) == (['a'], [1, 2], 2)
        assert pool.set('c', [5]) != slot
        assert pool._pages.free == 0


def test_storing_many_evicts_no_page_of_those_to_come():
    """The entry that leaves holds the only reference to a page of the next row."""
    pages = PageAllocator(10)
    pool = PagedPool(2, 'fifo', True, 'small', pages=pages, width=2, codec=None)
    first, second, third = pages.allocate(3)
    none = np.zeros((1, 2), np.int64)
    for key, page in (('old', first), ('older', second)):
        none[0, 0] = page
        pool.store([key], (none.copy(), np.ones(1, np.int64)))
    pages.release(np.array([first, second]))  # the pool's alone now
    pool.store(['new', 'newer'], (np.array([[third, 0], [first, third]]), np.array([1, 2])))
    pages.release(np.array([third]))
    assert pages.references[[first, second, third]].tolist() == [1, 0, 2]
    assert pages.free == 10 - 2 - 2
