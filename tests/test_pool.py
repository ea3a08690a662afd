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
from lzero_kvcache.cache.pages import RESERVED_PAGES, PageAllocator
from lzero_kvcache.cache.pool import PagedPool

WIDTH = 3


def paged_pool(size, strategy='fifo', **kwargs):
    pool = PagedPool(size, strategy, **kwargs, pages=PageAllocator(RESERVED_PAGES + 3 * size + 6), context_pages=WIDTH)
    pool.content = {}  # what a step wrote to each page
    return pool


def text(number):
    return f'value {number}'


def rows(pages):
    """Contexts of one page each."""
    return np.pad(pages[:, None], ((0, 0), (0, WIDTH - 1))), np.ones(len(pages), np.int64)


def store(pool, keys):
    """Contexts of one new page each, as a step stores them; returns the pages."""
    with pool._pages.lease() as lease:
        pages = lease.allocate(len(keys))
        pool.content.update(zip(pages.tolist(), keys))
        pool.store(keys, rows(pages))
    return pages.tolist()


def found(pool, key):
    """What was set under a key, or written to its pages; counts a look-up."""
    if not isinstance(pool, PagedPool) or key not in pool or not pool.contexts.counts[pool._slots[key]]:
        return pool.get(key)
    [table], [count] = pool.find([key])
    return [pool.content[page] for page in table[:count].tolist()]


def held(pool, keys):
    """Those of the keys that the pool holds, without a look-up."""
    return [key for key in keys if key in pool]


def audit(pool):
    """Every slot is unused or an entry's; every page has as many references as entries name it."""
    assert sorted([*pool._unused, *pool._slots.values()]) == list(range(pool.pool_size))
    if isinstance(pool, PagedPool):
        pool._pages.collect()
        assert not pool.contexts.counts[pool._unused].any()
        mentions = np.zeros(pool._pages.capacity, np.int64)
        mentions[:RESERVED_PAGES] = 1
        for table, count in zip(pool.contexts.tables, pool.contexts.counts):
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
        assert (pool.get(2), pool.get('nothing'), pool.stats) == (self.value(2), None, CacheStats())

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
    @given(size=st.integers(1, 4), operations=OPERATIONS)
    def test_against_a_plain_dict(self, strategy, size, operations):
        """Whatever fails and wherever, no slot or page is lost or used twice; without failures, the model is right."""
        pool, model = self.pool(size, strategy), PoolModel(size, strategy)
        for (operation, *arguments), point in operations:
            before = {key: [entry[0]] for key, entry in model.entries.items()}
            with failing(point, __file__) as failed:
                pool = self.run(pool, model, before, operation, *arguments)
            audit(pool)
            if failed:
                # An entry that was being removed may be there without its value, never with another's.
                assert all(found(pool, key) in [*before[key], None] for key in held(pool, range(7)))
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
            assert 0 <= pool.set(key, self.value(number), priority=priority) < pool.pool_size
            model.put(key, self.value(number), priority)
        elif operation == 'get':
            assert found(pool, *arguments) == model.get(*arguments)
        elif operation == 'evict_but':
            assert pool.evict_but(*arguments) == model.evict_but(*arguments)
        elif operation == 'clear':
            pool.clear()
            model.clear()
        elif operation == 'copy':
            return arguments[0](pool)
        elif isinstance(pool, PagedPool):
            [keys] = arguments
            for key in keys:
                before.setdefault(key, []).append([key])
            store(pool, keys)
            for key in keys:
                model.put(key, [key])
        return pool


class TestKVCachePool(PoolTestMixin):

    @pytest.mark.parametrize('size', [0, -1, 1.5, True, '2', None, float('nan')])
    def test_refuses_a_size(self, size):
        with pytest.raises(ValueError, match=f'^pool_size={size!r} must be a whole number of at least 1$'):
            KVCachePool(size)

    def test_refuses_a_priority_and_counting_that_are_none(self):
        with pytest.raises(ValueError, match="^priority='high' must be a number$"):
            KVCachePool(2, 'priority').set('key', 1, 'high')
        with pytest.raises(ValueError, match="^enable_stats='no' must be True or False$"):
            KVCachePool(2, enable_stats='no')

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


class TestPagedPool(PoolTestMixin):
    pool = staticmethod(paged_pool)

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
        assert pool.find(['g', 'h', 'i'])[0][:, 0].tolist() == pages[1:]

    def test_contexts_and_what_was_set_miss_each_other(self):
        pool = paged_pool(3, 'lru')
        store(pool, ['context'])
        pool.set('value', 1)
        assert (pool.get('context'), pool.find(['value', 'context'])[1].tolist()) == (None, [0, 1])
        assert (pool.stats.hits, pool.stats.misses) == (1, 2)

    def test_a_key_that_no_dict_takes(self, strategy):
        """Found out after the pages were taken: they go back."""
        pool = paged_pool(3, strategy)
        with pytest.raises(TypeError, match='unhashable'):
            pool.set(['a'], 'value')
        with pytest.raises(TypeError, match='unhashable'):
            store(pool, ['a', ['b']])
        audit(pool)


def test_storing_many_evicts_no_page_of_those_to_come():
    """The entry that leaves holds the only reference to a page of the next row."""
    pages = PageAllocator(10)
    pool = PagedPool(2, 'fifo', True, 'small', pages=pages, context_pages=2)
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
