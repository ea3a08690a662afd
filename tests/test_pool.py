"""Pools: one suite that every pool must pass under every strategy, and each pool's own few."""
import copy

import numpy as np
import pytest
import torch
from builders import keys_values, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from lzero_kvcache import CacheStats, EvictionStrategy, KVCachePool
from lzero_kvcache.cache.pages import RESERVED_PAGES, PageAllocator
from lzero_kvcache.cache.pool import Codec, PagedPool

STRATEGIES = [strategy.value for strategy in EvictionStrategy]
WIDTH = 3


class ListCodec(Codec):
    """Keeps lists of up to ``WIDTH`` items, an item a page; anything else is left to the pool."""

    def __init__(self, pages):
        self.pages, self.content = pages, {}

    def write(self, value):
        if not isinstance(value, list):
            return None
        ids = self.pages.allocate(len(value))
        self.content.update(zip(ids.tolist(), value))
        return ids

    def read(self, pages):
        return [self.content[page] for page in pages.tolist()]


def plain_pool(size, strategy='fifo', **kwargs):
    return KVCachePool(size, strategy, **kwargs)


def paged_pool(size, strategy='fifo', **kwargs):
    pages = PageAllocator(RESERVED_PAGES + WIDTH * (size + 1))
    return PagedPool(size, strategy, **kwargs, pages=pages, width=WIDTH, codec=ListCodec(pages))


def plain_value(number):
    return f'value {number}'


def paged_value(number):
    return [number] * (1 + number % WIDTH)


def mixed_value(number):
    return (plain_value, paged_value)[number % 2](number)


class Variant:
    """A pool and what is put into it."""

    def __init__(self, make, value, strategy):
        self.make, self.value, self.strategy = make, value, strategy

    def pool(self, size, **kwargs):
        return self.make(size, self.strategy, **kwargs)


@pytest.fixture(
    params=[(plain_pool, plain_value), (paged_pool, plain_value), (paged_pool, paged_value), (paged_pool, mixed_value)],
    ids=['KVCachePool', 'PagedPool of objects', 'PagedPool of pages', 'PagedPool of both']
)
def variant(request, strategy):
    return Variant(*request.param, strategy)


@pytest.fixture(params=STRATEGIES)
def strategy(request):
    return request.param


class TestEvery:
    """What holds for every pool and every strategy."""

    def test_gives_back_what_was_put_in(self, variant):
        pool = variant.pool(3)
        for number in range(3):
            pool.set(number, variant.value(number))
        assert [pool.get(number) for number in range(3)] == [variant.value(number) for number in range(3)]

    def test_a_missing_key_is_none(self, variant):
        assert variant.pool(3).get('nothing') is None

    def test_set_returns_a_slot_of_its_own(self, variant):
        pool = variant.pool(4)
        assert sorted(pool.set(number, variant.value(number)) for number in range(4)) == [0, 1, 2, 3]

    def test_an_equal_key_is_replaced_in_its_slot(self, variant):
        pool = variant.pool(3)
        slot = pool.set('a', variant.value(1))
        pool.set('b', variant.value(2))
        assert pool.set('a', variant.value(3)) == slot
        assert len(pool) == 2
        assert pool.get('a') == variant.value(3)
        assert pool.stats.evictions == 0

    def test_a_full_pool_evicts_one_and_uses_its_slot(self, variant):
        pool = variant.pool(3)
        slots = [pool.set(number, variant.value(number)) for number in range(3)]
        assert pool.set(3, variant.value(3)) == slots[0]
        assert len(pool) == 3
        assert [number in pool for number in range(4)] == [False, True, True, True]
        assert [pool.get(number) for number in range(4)] == [None] + [variant.value(number) for number in (1, 2, 3)]
        assert pool.stats.evictions == 1

    def test_one_entry_only(self, variant):
        pool = variant.pool(1)
        for number in range(5):
            assert pool.set(number, variant.value(number)) == 0
            assert pool.get(number) == variant.value(number)
        assert (len(pool), pool.stats.evictions) == (1, 4)

    def test_keeps_working_long_after_it_was_full(self, variant):
        pool = variant.pool(5)
        for number in range(200):
            pool.set(number, variant.value(number))
            assert pool.get(number) == variant.value(number)
            assert len(pool) == min(number + 1, 5)
        assert pool.stats.evictions == 195

    def test_counts(self, variant):
        pool = variant.pool(2)
        pool.set('a', variant.value(1))
        pool.get('a'), pool.get('a'), pool.get('b')
        stats = pool.stats
        assert (stats.hits, stats.misses, stats.total_queries, stats.evictions) == (2, 1, 3, 0)
        assert stats.hit_rate == pytest.approx(2 / 3)
        assert stats.miss_rate == pytest.approx(1 / 3)

    def test_setting_and_asking_for_membership_are_no_queries(self, variant):
        pool = variant.pool(2)
        pool.set('a', variant.value(1))
        assert 'a' in pool
        assert 'b' not in pool
        assert pool.stats.total_queries == 0

    def test_clear_forgets_entries_and_keeps_counts(self, variant):
        pool = variant.pool(2)
        for number in range(3):
            pool.set(number, variant.value(number))
        pool.get(2)
        before = copy.copy(pool.stats)
        pool.clear()
        assert len(pool) == 0
        assert pool.stats == before
        assert pool.get(2) is None
        assert sorted(pool.set(number, variant.value(number)) for number in range(2)) == [0, 1]

    def test_without_counts(self, variant):
        pool = variant.pool(2, enable_stats=False)
        for number in range(3):
            pool.set(number, variant.value(number))
        assert pool.get(2) == variant.value(2)
        assert pool.get('nothing') is None
        assert pool.stats is None

    def test_name(self, variant):
        pool = variant.pool(2, name='mine')
        assert pool.name == 'mine'
        assert 'mine' in repr(pool)

    def test_a_deep_copy_goes_its_own_way(self, variant):
        pool = variant.pool(2)
        pool.set('a', variant.value(1))
        other = copy.deepcopy(pool)
        other.set('b', variant.value(2))
        other.set('c', variant.value(3))
        pool.set('d', variant.value(4))
        assert [key in pool for key in 'abcd'] == [True, False, False, True]
        assert [key in other for key in 'abcd'] == [False, True, True, False]
        assert pool.get('a') == variant.value(1)
        assert (pool.stats.evictions, other.stats.evictions) == (0, 1)

    def test_debug_lines(self, variant, debug_lines):
        pool = variant.pool(1, name='mine')
        pool.get('absent')
        pool.set('first', variant.value(1))
        pool.set('second', variant.value(2))
        pool.clear()
        told = [message for level, message in debug_lines() if level == 'DEBUG']
        assert len(told) == 3
        assert all("'mine'" in message for message in told)
        assert 'absent' in told[0]
        assert 'first' in told[1]

    def test_no_line_for_a_hit_or_at_the_usual_level(self, variant, lines):
        pool = variant.pool(1, name='mine')
        pool.get('absent')
        pool.set('first', variant.value(1))
        pool.get('first')
        assert lines() == [('INFO', f"Initialized KVCachePool 'mine' with size=1, strategy={variant.strategy}")]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just('set'), st.integers(0, 6), st.integers(0, 50), st.none() | st.integers(-2, 3)),
        st.tuples(st.just('get'), st.integers(0, 6)),
        st.tuples(st.just('clear')),
    ), max_size=80
)


@pytest.mark.parametrize(
    'make_value', [(plain_pool, plain_value), (paged_pool, paged_value), (paged_pool, mixed_value)],
    ids=['KVCachePool', 'PagedPool of pages', 'PagedPool of both']
)
@pytest.mark.parametrize('strategy', STRATEGIES)
@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 4), operations=OPERATIONS)
def test_against_a_plain_dict(make_value, strategy, size, operations):
    """A dict of [value, priority, hits, time of birth, time of use], searched through at each eviction."""
    make, value = make_value
    pool, model, stats = make(size, strategy), {}, CacheStats()
    worth = {
        'fifo': lambda key: model[key][3],
        'lru': lambda key: model[key][4],
        'priority': lambda key: (model[key][2] if model[key][1] is None else model[key][1], model[key][3]),
    }[strategy]
    for now, (operation, *arguments) in enumerate(operations):
        if operation == 'set':
            key, number, priority = arguments
            model.pop(key, None)
            if len(model) == size:
                del model[min(model, key=worth)]
                stats.evictions += 1
            model[key] = [value(number), priority, 0, now, now]
            assert 0 <= pool.set(key, value(number), priority=priority) < size
        elif operation == 'get':
            entry = model.get(arguments[0])
            stats.record(1, entry is not None)
            assert pool.get(arguments[0]) == (None if entry is None else entry[0])
            if entry is not None:
                entry[2], entry[4] = entry[2] + 1, now
        else:
            model.clear()
            pool.clear()
        assert {key for key in range(7) if key in pool} == set(model)
        assert len(pool) == len(model)
        assert pool.stats == stats
        assert stats.hits + stats.misses == stats.total_queries
        if isinstance(pool, PagedPool):
            _check_pages(pool, [entry[0] for entry in model.values()])


def _check_pages(pool, values):
    """Entries own their pages, nobody else owns any."""
    assert pool._pages.used == sum(len(value) for value in values if isinstance(value, list))
    used = pool.tables[pool.counts > 0].ravel()
    used = used[used > 0].tolist()
    assert len(used) == len(set(used)) == pool._pages.used


class TestKVCachePool:

    @pytest.mark.parametrize('size', [0, -1, 1.5, True])
    def test_refuses_a_size(self, size):
        with pytest.raises(ValueError, match=f'pool_size={size}'):
            KVCachePool(size)

    def test_refuses_a_strategy(self):
        with pytest.raises(ValueError, match='fifoo'):
            KVCachePool(1, 'fifoo')

    @pytest.mark.parametrize('strategy', EvictionStrategy)
    def test_takes_a_strategy_or_its_name(self, strategy):
        assert KVCachePool(1, strategy).eviction_strategy is strategy
        assert KVCachePool(1, strategy.value).eviction_strategy is strategy

    def test_defaults(self):
        pool = KVCachePool(pool_size=3)
        assert (pool.eviction_strategy, pool.stats) == (EvictionStrategy.FIFO, CacheStats())

    def test_holds_plain_objects_as_they_are(self):
        pool, thing = KVCachePool(2), object()
        pool.set('a', thing)
        assert pool.get('a') is thing

    def test_priority_by_hand(self):
        pool = KVCachePool(2, 'priority')
        pool.set('low', 1, priority=-1)
        pool.set('high', 2, priority=9)
        pool.set('middle', 3, priority=5)
        pool.set('new', 4, priority=0)
        assert [key in pool for key in ('low', 'high', 'middle', 'new')] == [False, True, False, True]

    def test_priority_by_hits(self):
        pool = KVCachePool(2, 'priority')
        pool.set('asked', 1)
        pool.set('not asked', 2)
        pool.get('asked')
        pool.set('new', 3)
        assert 'asked' in pool
        assert 'not asked' not in pool

    @pytest.mark.parametrize('strategy', STRATEGIES)
    def test_lookups_of_a_key_that_is_kept_back(self, strategy):
        """Making room around an entry changes nothing about it."""
        pool = KVCachePool(3, strategy)
        for number, key in enumerate('abc'):
            pool.set(key, number, priority=9 - number)
        assert pool.evict_but('a')
        assert 'a' in pool
        assert len(pool) == 2
        assert pool.evict_but('a')
        assert not pool.evict_but('a')
        assert pool.get('a') == 0

    def test_an_entry_that_was_kept_back_keeps_its_priority(self):
        pool = KVCachePool(3, 'priority')
        for key, priority in (('a', 9), ('b', 1), ('c', 5)):
            pool.set(key, key, priority=priority)
        pool.evict_but('a')
        pool.evict()
        assert 'a' in pool

    @pytest.mark.parametrize('size', range(1, 9))
    def test_keys_values_are_private_copies(self, size):
        pool, value = KVCachePool(2), keys_values(size)
        kept = tokens(value)
        pool.set('a', value)
        for layer in value:
            layer._k_cache._cache.fill_(7)
        assert torch.equal(tokens(pool.get('a')), kept)
        for layer in pool.get('a'):
            layer._v_cache._cache.fill_(7)
            layer.reset()
        assert torch.equal(tokens(pool.get('a')), kept)


class TestPagedPool:

    def test_a_replaced_entry_gives_its_pages_back(self):
        pool = paged_pool(2)
        pool.set('a', [1, 2, 3])
        pool.set('a', [4])
        assert pool._pages.used == 1
        pool.set('a', 'no pages')
        assert pool._pages.used == 0
        assert pool.get('a') == 'no pages'

    def test_an_evicted_entry_gives_its_pages_back(self):
        pool = paged_pool(1)
        pool.set('a', [1, 2, 3])
        pool.set('b', [4, 5])
        assert pool._pages.used == 2

    def test_clear_gives_all_pages_back(self):
        pool = paged_pool(3)
        for number in range(3):
            pool.set(number, [number] * 3)
        pool.clear()
        assert pool._pages.used == 0
        pool.clear()
        assert pool._pages.used == 0

    def test_shared_pages_outlive_one_of_their_entries(self):
        """A child's entry is its parent's pages and one more: two entries, two pages."""
        pool = paged_pool(2)
        made = pool._pages.allocate(2)
        shared, own = made.tolist()
        pool.store(['parent', 'child'], (np.array([[shared, 0, 0], [shared, own, 0]]), np.array([1, 2])))
        pool._pages.release(made)  # entries have references of their own
        assert pool._pages.used == 2
        assert pool._pages.references[shared] == 2
        pool.set('another', 'no pages')  # in the parent's place
        assert 'parent' not in pool
        assert pool._pages.references[shared] == 1
        pool.clear()
        assert pool._pages.used == 0

    @pytest.mark.parametrize('strategy', STRATEGIES)
    def test_many_entries_at_once(self, strategy):
        """More than fit: the newest stay. Keys that are there are replaced; no entries at all are an easy case."""
        pool = paged_pool(3, strategy)
        for keys in (['a', 'b'], [], ['b', 'c'], ['d', 'e', 'a'], ['f', 'g', 'h', 'i']):
            count = len(keys)
            made = pool._pages.allocate(count)
            pool.store(keys, (np.pad(made[:, None], ((0, 0), (0, WIDTH - 1))), np.ones(count, np.int64)))
            pool._pages.release(made)
            assert all(key in pool for key in keys[-3:])
            assert pool._pages.used == len(pool) <= 3
        assert pool.tables[pool.slots(['g', 'h', 'i']), 0].tolist() == made[1:].tolist()

    @pytest.mark.parametrize('strategy', STRATEGIES)
    def test_a_failed_write_leaves_no_trace(self, strategy):
        pages = PageAllocator(RESERVED_PAGES + WIDTH)
        pool = PagedPool(3, strategy, pages=pages, width=WIDTH, codec=ListCodec(pages))
        slot = pool.set('a', [1, 2])
        with pytest.raises(RuntimeError):
            pool.set('b', [3, 4])
        assert 'b' not in pool
        assert len(pool) == 1
        assert pool.get('b') is None
        assert pool.stats.misses == 1
        assert pool.get('a') == [1, 2]
        assert pool.set('c', [5]) != slot
        assert pool._pages.free == 0
