"""Which key leaves: one suite for every strategy, and each one's own few."""
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lzero_kvcache.cache.eviction import EvictionStrategy, make_index, rank

STRATEGIES = list(EvictionStrategy)


def filled(strategy, keys='abc', capacity=3):
    index = make_index(strategy, capacity)
    for slot, key in enumerate(keys):
        index[key] = slot
    return index


def leaving(index):
    """All keys in the order in which they leave."""
    return [index.popitem()[0] for _ in range(len(index))]


def test_names():
    assert {strategy.value for strategy in STRATEGIES} == {'fifo', 'lru', 'priority'}


@pytest.mark.parametrize('strategy', STRATEGIES)
class TestEvery:
    """What a pool relies on, whatever the strategy."""

    def test_holds_what_was_put_in(self, strategy):
        index = filled(strategy)
        assert (len(index), index['a'], index['b'], index['c']) == (3, 0, 1, 2)
        assert 'd' not in index

    def test_untouched_keys_leave_in_order(self, strategy):
        assert leaving(filled(strategy)) == ['a', 'b', 'c']

    def test_the_leaving_value_comes_along(self, strategy):
        assert filled(strategy).popitem() == ('a', 0)

    def test_never_holds_more_than_its_capacity(self, strategy):
        index = make_index(strategy, 3)
        for key in range(50):
            index[key] = key
            assert len(index) <= 3
        assert set(index) == {47, 48, 49}

    def test_an_empty_one_has_nobody_to_evict(self, strategy):
        with pytest.raises(KeyError):
            make_index(strategy, 1).popitem()

    def test_a_missing_key_is_an_error(self, strategy):
        with pytest.raises(KeyError):
            filled(strategy)['d']

    def test_a_deleted_key_is_gone_for_good(self, strategy):
        index = filled(strategy)
        del index['a']
        assert leaving(index) == ['b', 'c']

    def test_a_key_that_comes_again_is_young(self, strategy):
        index = filled(strategy)
        index['a'] = index.pop('a')
        assert leaving(index) == ['b', 'c', 'a']

    def test_asking_whether_a_key_is_there_is_no_use_of_it(self, strategy):
        index = filled(strategy)
        assert 'a' in index
        assert leaving(index) == ['a', 'b', 'c']

    def test_keys_need_not_be_comparable(self, strategy):
        index = filled(strategy, keys=[(None, 1), ('a', 1), (3, None)])
        for key in [(None, 1), ('a', 1), (3, None)]:
            rank(index, key, 1.0)
        assert leaving(index) == [(None, 1), ('a', 1), (3, None)]

    @pytest.mark.parametrize('priority', [None, 7])
    def test_a_priority_may_always_be_given(self, strategy, priority):
        index = filled(strategy)
        rank(index, 'a', priority)
        assert set(index) == {'a', 'b', 'c'}


def test_fifo_does_not_look_at_reads():
    index = filled(EvictionStrategy.FIFO)
    index['a']
    assert leaving(index) == ['a', 'b', 'c']


def test_lru_keeps_what_was_read():
    index = filled(EvictionStrategy.LRU)
    index['a']
    assert leaving(index) == ['b', 'c', 'a']


class TestPriority:
    """The highest priority stays; without one, what was read most."""

    def test_the_lowest_leaves_first(self):
        index = filled(EvictionStrategy.PRIORITY)
        for key, priority in zip('abc', (3, -1.5, 2)):
            rank(index, key, priority)
        assert leaving(index) == ['b', 'c', 'a']

    def test_reads_count(self):
        index = filled(EvictionStrategy.PRIORITY)
        for key in 'aaabcc':
            index[key]
        assert leaving(index) == ['b', 'c', 'a']

    def test_given_priorities_and_reads_compare(self):
        index = filled(EvictionStrategy.PRIORITY)
        rank(index, 'a', 1.5)
        index['b']
        index['c'], index['c']
        assert leaving(index) == ['b', 'a', 'c']

    def test_a_given_priority_stays_whatever_is_read(self):
        index = filled(EvictionStrategy.PRIORITY)
        rank(index, 'a', 0.5)
        for _ in range(9):
            index['a']
        index['b'], index['c']
        assert leaving(index) == ['a', 'b', 'c']

    def test_a_priority_can_be_lowered(self):
        index = filled(EvictionStrategy.PRIORITY)
        rank(index, 'c', 9)
        rank(index, 'b', 5)
        rank(index, 'c', -1)
        assert leaving(index) == ['c', 'a', 'b']

    def test_a_key_that_comes_again_has_no_past(self):
        index = filled(EvictionStrategy.PRIORITY)
        rank(index, 'a', 9)
        del index['a']
        index['a'] = 5
        index['b'], index['c']
        assert index.popitem() == ('a', 5)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.one_of(
        st.tuples(st.just('add'), st.integers(0, 7)),
        st.tuples(st.just('read'), st.integers(0, 7)),
        st.tuples(st.just('rank'), st.integers(0, 7), st.integers(-3, 3)),
        st.tuples(st.just('drop'), st.integers(0, 7)),
        st.tuples(st.just('evict')),
    ), max_size=120))
    def test_against_a_plain_search(self, operations):
        index, model, clock = make_index(EvictionStrategy.PRIORITY, 5), {}, 0  # model: key -> [rank, reads, birth]

        def worth(key):
            given_rank, reads, birth = model[key]
            return (reads if given_rank is None else given_rank, birth)

        for operation, *arguments in operations:
            key = arguments[0] if arguments else None
            if operation == 'add' and key not in model and len(model) < 5:
                clock += 1
                index[key], model[key] = clock, [None, 0, clock]
            elif operation == 'evict' and model:
                expected = min(model, key=worth)
                assert index.popitem() == (expected, model.pop(expected)[2])
            elif key in model:
                if operation == 'read':
                    model[key][1] += 1
                    assert index[key] == model[key][2]
                elif operation == 'rank':
                    model[key][0] = arguments[1]
                    rank(index, key, arguments[1])
                elif operation == 'drop':
                    del model[key], index[key]
            assert set(index) == set(model)

    def test_many_reads_and_ranks_take_no_memory(self):
        index = filled(EvictionStrategy.PRIORITY)
        for step in range(10000):
            rank(index, 'abc'[step % 3], step)
        assert len(index._heap) < 200
