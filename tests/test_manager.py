"""The new manager: by hand, with the names of LightZero's main branch, and over pages, as the world model uses it."""
import copy
import gc
import json
import re
import weakref
from typing import Any, Dict

import numpy as np
import pytest
import torch
from builders import CONTEXT_LENGTH, PAGE_MB, audit, cache_cfg, keys_values, manager, paged, ready, tokens
from ding.utils import MODEL_REGISTRY
from easydict import EasyDict
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Batch, LightZeroAlone, assert_same, differences, play, random_trace, row_differences
from small_models import Case, cached_model, construct, original_model

from lzero_kvcache import ConfigError, KVCacheManager, KVCachePool, OldCacheManager, PagedCacheManager
from lzero_kvcache.cache.pages import PageAllocator
from lzero_kvcache.cache.stats import CacheStats

STRATEGIES = ['fifo', 'lru', 'priority']
#: Every size that a ``KeysValues`` can have.
SIZES = range(CONTEXT_LENGTH + 1)


class ByHand:
    """Every way to store by hand under one name, so that one suite serves the pools of a manager."""
    arguments = {'init': dict(env_id=0), 'recur': {}, 'recur of one': dict(env_id=1), 'wm': {}}

    def __init__(self, pool: str) -> None:
        self._name, self._arguments = pool.split()[0], self.arguments[pool]

    def set(self, used, key, value):
        return getattr(used, f'set_{self._name}_cache')(cache_key=key, kv_cache=value, **self._arguments)

    def get(self, used, key):
        return getattr(used, f'get_{self._name}_cache')(cache_key=key, **self._arguments)


@pytest.fixture(params=ByHand.arguments)
def by_hand(request):
    return ByHand(request.param)


class TestConstruction:

    def test_pools(self):
        used = KVCacheManager(cache_cfg(game_segment_length=400, num_simulations=50), env_num=2, enable_stats=True)
        pools = [*used.init_pools, used.recur_pool, used.wm_pool]
        assert all(isinstance(pool, KVCachePool) for pool in pools)
        assert [(pool.name, pool.pool_size) for pool in pools] == [
            ('init_env0', 400), ('init_env1', 400), ('recurrent', 100), ('world_model', 2)
        ]

    def test_an_empty_config(self):
        used = KVCacheManager(EasyDict(), env_num=2)
        assert [pool.pool_size for pool in used.init_pools] == [256, 256]
        assert used.recur_pool.pool_size == 100
        used.set_recur_cache('key', 'value')
        assert used.get_recur_cache('key') == 'value'
        assert used.memory_mb == 0

    def test_wrong_option(self):
        with pytest.raises(ConfigError, match='evicton'):
            manager(kv_cache_cfg=dict(evicton='lru'))

    @pytest.mark.parametrize(('wrong', 'said'), [
        *((dict(context_length=length), f'context_length={length!r} must be ')
          for length in ('8', 8.0, 0, -4, 2, 3, 7, True)),
        *((dict(evaluator_env_num=number), f'evaluator_env_num={number!r} must be a whole number of at least 1')
          for number in ('3', 0)),
    ])
    def test_wrong_size(self, wrong, said):
        with pytest.raises(ConfigError) as caught:
            manager(**wrong)
        assert str(caught.value).startswith(f'policy.model.world_model_cfg.{said}')
        assert 'use_new_cache_manager' not in str(caught.value)  # by hand there is no flag

    def test_none_is_the_default(self):
        used = manager(evaluator_env_num=None, context_length=None)
        assert (used.config.evaluator_env_num, used.config.context_length) == (1, 8)

    @pytest.mark.parametrize('config', [None, 5, 'x', []])
    def test_a_config_that_is_none(self, config):
        with pytest.raises(ConfigError, match='^policy.model.world_model_cfg=.* must be a dict'):
            KVCacheManager(config)

    @pytest.mark.parametrize(('name', 'value', 'right'), [
        *(('env_num', value, 'a whole number of at least 1') for value in (0, -1, '3', 2.5, True)),
        *(('enable_stats', value, 'True or False') for value in ('no', 1)),
    ])
    def test_wrong_argument(self, name, value, right):
        with pytest.raises(ConfigError, match=f'^{name}={value!r} must be {right}$'):
            KVCacheManager({}, **{name: value})


class TestByHand:

    def test_keys_values_are_private_copies_that_can_be_continued(self, by_hand):
        """As LightZero's attention does: there is room for as many tokens as in the original."""
        used = paged()
        for size in SIZES:
            value = keys_values(size)
            kept, room = tokens(value), value[0]._k_cache._cache.shape
            by_hand.set(used, 'key', value)
            spoil(value)
            for _ in range(2):
                found = by_hand.get(used, 'key')
                assert (found.size, len(found)) == (size, len(value))
                assert torch.equal(tokens(found), kept)
                assert found[0]._k_cache._cache.shape == room
                if size < CONTEXT_LENGTH:
                    more = torch.randn(2, 1, 2, 1, 4)
                    for layer in found:
                        layer.update(*more)
                    assert torch.equal(tokens(found)[..., :size, :], kept)
                    assert torch.equal(tokens(found)[0][..., size:, :], more)
                spoil(found)
            audit(used)

    def test_a_context_that_was_made_with_gradients(self, by_hand):
        used, value = manager(), keys_values(3)
        kept = tokens(value)
        for layer in value:
            for cache in (layer._k_cache, layer._v_cache):
                cache._cache = cache._cache.requires_grad_() * 1.
        by_hand.set(used, 'key', value)
        found = by_hand.get(used, 'key')
        assert torch.equal(tokens(found), kept)
        assert not found[0]._k_cache._cache.requires_grad

    def test_environments_are_apart(self):
        used = manager(env_num=3)
        for env_id in range(3):
            used.set_init_cache(env_id, 'key', keys_values(3, seed=env_id))
        for env_id in range(3):
            assert torch.equal(tokens(used.get_init_cache(env_id, 'key')), tokens(keys_values(3, seed=env_id)))
        used.set_recur_cache('node', 'of 0', env_id=0)
        used.set_recur_cache('node', 'of 1', env_id=1)
        assert [used.get_recur_cache('node', env_id=env_id) for env_id in range(3)] == ['of 0', 'of 1', None]
        assert used.get_recur_cache('node') is None

    @pytest.mark.parametrize('call', [
        lambda used: used.clear_init_caches('train'), lambda used: used.find_init('train', [0], ['a']),
        lambda used: used.get_init_cache('0', 'a'),
    ])
    def test_a_mode_or_an_environment_that_cannot_be(self, call):
        with pytest.raises(ValueError, match="mode='train' must be one of 'collect', 'eval'|environment '0' must be"):
            call(manager())

    @pytest.mark.parametrize('env_id', [2, 17, -1])
    def test_an_environment_that_is_not_there(self, env_id):
        used = manager()
        for call in (
                lambda: used.get_init_cache(env_id, 'key'),
                lambda: used.set_init_cache(env_id, 'key', 'value'),
                lambda: used.hierarchical_get(env_id, 'key'),
        ):
            with pytest.raises(ValueError, match=f'environment {env_id} is outside .*world_model_cfg.env_num=2'):
                call()


def spoil(value):
    for layer in value:
        layer._k_cache._cache.fill_(7)
        layer._v_cache._size = 0


def test_the_order_of_a_hierarchical_get():
    used = manager()
    used.set_recur_cache('key', 'of nobody')
    assert used.hierarchical_get(0, 'key') == 'of nobody'
    used.set_recur_cache('key', 'of 0', env_id=0)
    assert [used.hierarchical_get(env_id, 'key') for env_id in range(2)] == ['of 0', 'of nobody']
    used.set_init_cache(0, 'key', 'root')
    assert [used.hierarchical_get(env_id, 'key') for env_id in range(2)] == ['root', 'of nobody']


def test_by_hand_nothing_is_found_of_what_searches_stored():
    used = paged()
    root(used, 'key')
    with used.lease() as lease:
        used.store_recur([0], ['key'], (np.pad(lease.allocate(1)[None], ((0, 0), (0, 2))), np.ones(1, np.int64)))
    assert used.get_init_cache(0, 'key') is None
    used.set_recur_cache('key', 'of nobody')
    assert used.hierarchical_get(0, 'key') == 'of nobody'
    assert (used.init_pools[0].stats.hits, used.recur_pool.stats.hits) == (0, 1)


class TestClearing:

    @staticmethod
    def filled():
        used = paged()
        for env_id in range(2):
            used.set_init_cache(env_id, 'key', keys_values(3))
            used.get_init_cache(env_id, 'key')
        used.set_recur_cache('key', keys_values(5))
        used.get_recur_cache('nothing')
        used.set_wm_cache('key', 'value')
        used.get_wm_cache('key')
        return used

    @pytest.mark.parametrize(('clear', 'left'), [
        (lambda used: used.clear_init_caches(), [0, 0, 1, 1]),
        (lambda used: used.clear_init_caches(env_id=1), [1, 0, 1, 1]),
        (lambda used: used.clear_init_caches(mode='eval'), [1, 1, 1, 1]),
        (lambda used: used.clear_init_caches('collect', 0), [0, 1, 1, 1]),
        (lambda used: used.clear_recur_cache(), [1, 1, 0, 1]),
        (lambda used: used.clear_all(), [0, 0, 0, 0]),
        (lambda used: used.reset_stats(), [1, 1, 1, 1]),
    ])
    def test_what_is_left(self, clear, left):
        used = self.filled()
        clear(used)
        assert [len(pool) for pool in [*used.init_pools, used.recur_pool, used.wm_pool]] == left
        audit(used)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just('set_init_cache'), st.integers(0, 1), st.integers(0, 4), st.integers(0, 8)),
        st.tuples(st.just('set_recur_cache'), st.integers(0, 4), st.integers(0, 8), st.sampled_from([None, 0, 1])),
        st.tuples(st.just('set_wm_cache'), st.integers(0, 4), st.integers(0, 8)),
        st.tuples(st.just('get_init_cache'), st.integers(0, 1), st.integers(0, 4)),
        st.tuples(st.just('get_recur_cache'), st.integers(0, 4), st.sampled_from([None, 0, 1])),
        st.tuples(st.just('get_wm_cache'), st.integers(0, 4)),
        st.tuples(st.just('hierarchical_get'), st.integers(0, 1), st.integers(0, 4)),
        st.tuples(st.just('clear_init_caches')),
        st.tuples(st.just('clear_recur_cache')),
        st.tuples(st.just('clear_all')),
    ), max_size=60
)


@settings(max_examples=60, deadline=None)
@given(strategy=st.sampled_from(STRATEGIES), operations=OPERATIONS)
def test_any_use_by_hand(strategy, operations):
    """What was just set is there, and the counts are exact."""
    used = paged(kv_cache_cfg=dict(eviction=strategy, init_pool_size=3, recurrent_pool_size=3))
    for name, *arguments in operations:
        if name.startswith('set'):
            size = arguments[1 if name != 'set_init_cache' else 2]
            value = keys_values(size, seed=size)
            positions = {'set_init_cache': 2, 'set_recur_cache': 1, 'set_wm_cache': 1}
            arguments[positions[name]] = value
            getattr(used, name)(*arguments)
            del arguments[positions[name]]
            found = getattr(used, 'get' + name[3:])(*arguments)
            assert torch.equal(tokens(found), tokens(value))
        else:
            found = getattr(used, name)(*arguments)
            if found is not None:
                assert torch.equal(tokens(found), tokens(keys_values(found.size, seed=found.size)))
        audit(used)
        for pool in [*used.init_pools, used.recur_pool, used.wm_pool]:
            assert pool.stats.hits + pool.stats.misses == pool.stats.total_queries
            assert len(pool) <= pool.pool_size
    json.dumps(used.get_stats_summary())


def root(used, key, env_id=0, pages=3):
    """A root of new pages, as a step by key stores it."""
    with used.lease() as lease:
        table = np.zeros((1, used.context_pages), np.int64)
        table[0, :pages] = lease.allocate(pages)
        ready(used)
        used.store_init('collect', [env_id], [key], (table, np.array([pages])))


class TestStorage:

    @pytest.mark.parametrize(('dtype', 'share'), [('float32', 1), ('bfloat16', 0.5), ('float16', 0.5)])
    def test_memory_is_what_the_pages_take(self, dtype, share):
        used = paged(kv_cache_cfg=dict(dtype=dtype))
        assert used.memory_mb == 0  # nothing is allocated before the first use
        root(used, 'key')
        assert used.memory_mb == pytest.approx(share * used.page_capacity * PAGE_MB)
        assert used.get_stats_summary()['memory_mb'] == used.counters()['memory_mb'] == used.memory_mb

    @pytest.mark.parametrize('strategy', STRATEGIES)
    def test_a_limit_is_kept(self, strategy, lines):
        """Beyond it root contexts are evicted, warned of once, and no nodes; what was stored last is there."""
        limit = 50 * PAGE_MB
        used = paged(kv_cache_cfg=dict(
            eviction=strategy, init_pool_size=50, recurrent_pool_size=1, max_memory_mb=limit
        ))
        with used.lease() as lease:
            used.store_recur([0], ['node'], (lease.allocate(3)[None], np.array([3])))
        for key in range(60):
            root(used, key, key % 2)
            for _ in range(3):
                assert used.find_init('collect', [key % 2], [key])[1].tolist() == [3]
            assert used.memory_mb <= limit
            audit(used)
        assert sum(pool.stats.evictions for pool in used.init_pools) > 0
        assert sum(len(pool) for pool in used.init_pools) >= 10
        assert len([line for line in lines() if line[0] == 'WARNING']) == 1
        assert 'kv_cache_cfg.max_memory_mb' in next(message for level, message in lines() if level == 'WARNING')
        assert used.find_recur('collect', [0], ['node'])[1].tolist() == [3]

    def test_nodes_that_do_not_fit(self):
        """Too many are refused with the key to change, and nothing is lost."""
        used = paged(kv_cache_cfg=dict(init_pool_size=1, recurrent_pool_size=40, max_memory_mb=70 * PAGE_MB))
        with pytest.raises(RuntimeError, match='max_memory_mb'):
            for key in range(40):
                with used.lease() as lease:
                    used.store_recur([0], [key], (lease.allocate(3)[None], np.array([3])))
        audit(used)
        assert key > 10
        assert [used.find_recur('collect', [0], [stored])[1][0] for stored in range(key + 1)] == [3] * key + [0]

    @pytest.mark.parametrize('cfg', [
        dict(), dict(num_simulations=50), dict(env_num=3), dict(context_length=20), dict(evaluator_env_num=9),
        dict(kv_cache_cfg=dict(dtype='float16')),
    ], ids=str)
    def test_a_limit_that_is_too_small(self, cfg):
        """The message says what would do, and that does."""
        options = cfg.setdefault('kv_cache_cfg', {})
        options['max_memory_mb'] = 0.001
        with pytest.raises(ConfigError, match='max_memory_mb=0.001 is too small') as error:
            paged(**cfg)
        options['max_memory_mb'] = least = float(re.search(r'at least ([\d.]+)', str(error.value)).group(1))
        used = paged(**cfg)
        ready(used)
        assert used.memory_mb <= least


class TestCopies:

    def test_a_copy_holds_nothing_of_its_original(self):
        used = manager()
        used.set_init_cache(0, 'key', keys_values(3))
        other = copy.deepcopy(used)
        gone = [weakref.ref(used), weakref.ref(used.init_pools[0])]
        del used
        gc.collect()
        assert [reference() for reference in gone] == [None] * 2
        assert other.get_init_cache(0, 'key').size == 3

    @pytest.mark.parametrize('rotary', [False, True], ids=['learned', 'rotary'])
    def test_a_models_copy_has_a_manager_that_looks_at_the_copy(self, rotary):
        model = cached_model(Case(rotary=rotary), 2, 0)
        Batch(model).play(random_trace(np.random.default_rng(0), Case(rotary=rotary), 2, 1, 0).events[0])
        target = copy.deepcopy(model)
        ours, theirs = model.world_model.kv_cache_manager, target.world_model.kv_cache_manager
        assert theirs is not ours
        assert theirs.store.slab.data.data_ptr() != ours.store.slab.data.data_ptr()
        gone = weakref.ref(model.world_model)
        del model, ours
        gc.collect()
        assert gone() is None
        Batch(target).play(random_trace(np.random.default_rng(0), Case(rotary=rotary), 2, 1, 0).events[0])


def test_what_a_model_stored_is_what_lightzero_stores():
    """A root's context: a page holds keys and values without what their places add."""
    case = Case()
    trace = random_trace(np.random.default_rng(0), case, 1, root_steps=3, simulations=0)
    ours, theirs = Batch(cached_model(case, 1, 0)), LightZeroAlone(original_model(case, 1, 0))
    world_model = ours.world_model
    manager, shift = world_model.kv_cache_manager, world_model.weights_source.read(False).shift
    for event in trace.events:
        ours.play(event)
        theirs.play(event)
        slot = list(theirs.world_model.past_kv_cache_init_infer_envs[0].values())[-1]
        pool = manager.init_pools[0]
        newest = list(pool._slots.values())[-1]
        pages = pool.contexts.tables[[newest], :pool.contexts.counts[newest]]
        window = manager.store.slab.read(torch.from_numpy(pages))[0, 1:]  # [T, L, 2, E]
        found = (window + shift[:len(window)]).unflatten(-1, (world_model.config.num_heads, -1)).permute(1, 2, 3, 0, 4)
        right = tokens(theirs.world_model.shared_pool_init_infer[0][slot])[:, :, 0]
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


class TestUnderALimit:

    @pytest.mark.parametrize(('rotary', 'strategy'), [(False, 'fifo'), (True, 'lru'), (False, 'priority')])
    def test_long_episodes_in_the_least_memory(self, rotary, strategy):
        """What a running search and the current steps need is never evicted, so nothing is answered otherwise."""
        case = Case(rotary=rotary)
        with pytest.raises(ConfigError) as error:
            cached_model(case, 3, 0, num_simulations=4, kv_cache_cfg=dict(max_memory_mb=1e-6))
        least = float(re.search(r'at least ([\d.]+)', str(error.value)).group(1))
        model = cached_model(
            case, 3, 0, num_simulations=4, kv_cache_cfg=dict(max_memory_mb=least + 0.01, eviction=strategy)
        )
        used = model.world_model.kv_cache_manager
        trace = random_trace(np.random.default_rng(0), case, 3, root_steps=20, simulations=4, episodes=0.1)
        alone = [LightZeroAlone(original_model(case, 1, 0)) for _ in range(3)]
        assert_same(differences(trace, Batch(model), alone))
        assert used.store.slab.memory_mb <= least + 0.01
        assert sum(pool.stats.evictions for pool in used.init_pools) > 0
        audit(used)

    def test_a_small_recurrent_pool_loses_nodes_but_no_page(self, lines):
        case = Case()
        model = construct(
            MODEL_REGISTRY.get('UniZeroModel'), case, 2, use_new_cache_manager=True,
            kv_cache_cfg=dict(recurrent_pool_size=3)
        )
        player = Batch(model)
        for event in random_trace(np.random.default_rng(0), case, 2, root_steps=2, simulations=8).events:
            player.play(event)
            audit(model.world_model.kv_cache_manager)
        assert len([line for line in lines() if line[0] == 'WARNING' and 'recurrent_pool_size' in line[1]]) == 1


class PlainManager(PagedCacheManager):
    """A manager as the base class describes it and no cleverer: dicts that forget nothing but what is cleared."""

    def __init__(self, config: Any, env_num: int, enable_stats: bool) -> None:
        self.arguments = (config, env_num, enable_stats)
        self.context_pages = config.context_length // 2 - 1
        self.pages = PageAllocator(2000)
        self.roots: Dict[Any, Any] = {}
        self.nodes: Dict[Any, Any] = {}
        self.asked = dict(init=CacheStats(), recur=CacheStats())

    @property
    def page_capacity(self) -> int:
        return self.pages.capacity

    def use_store(self, store):
        self.store = store

    def lease(self):
        return self.pages.lease()

    def find_init(self, mode, env_ids, keys):
        return self._find([self.roots.get((mode, env_id, key)) for env_id, key in zip(env_ids, keys)])

    def store_init(self, mode, env_ids, keys, rows):
        self.pages.retain(rows[0])
        self.roots.update({(mode, env_id, key): row for env_id, key, *row in zip(env_ids, keys, *rows)})

    def find_recur(self, mode, env_ids, keys):
        return self._find([
            self.roots.get((mode, env_id, key)) or self.nodes.get((env_id, key)) for env_id, key in zip(env_ids, keys)
        ])

    def store_recur(self, env_ids, keys, rows):
        self.pages.retain(rows[0])
        self.nodes.update({(env_id, key): row for env_id, key, *row in zip(env_ids, keys, *rows)})

    def clear_init_caches(self, mode=None, env_id=None):
        self.roots = {
            key: row for key, row in self.roots.items() if mode not in (None, key[0]) or env_id not in (None, key[1])
        }

    def clear_recur_cache(self):
        self.nodes.clear()

    def clear_all(self):
        self.clear_init_caches()
        self.clear_recur_cache()

    def count_queries(self, pool, queries, hits, by_node=False):
        self.asked[pool].record(queries, hits)

    def counters(self):
        return {'memory_mb': self.store.memory_mb}

    def get_stats_summary(self):
        return {'stats_enabled': False}

    def reset_stats(self):
        self.asked = dict(init=CacheStats(), recur=CacheStats())

    def _find(self, found):
        tables, counts = np.zeros((len(found), self.context_pages), np.int64), np.zeros(len(found), np.int64)
        for row, entry in enumerate(found):
            if entry is not None:
                tables[row], counts[row] = entry
        return tables, counts


class TestCustomManagers:

    @pytest.mark.parametrize(('registers', 'said'), [
        *((kind, 'which makes no PagedCacheManager') for kind in (5, dict, lambda *arguments: None, OldCacheManager)),
        *((type('Narrow', (PlainManager, ), dict(context_pages=pages, __init__=lambda self, *arguments: None)),
           f'Narrow.context_pages={pages!r} must be 3, which is context_length=8 / 2 - 1') for pages in (0, None, 4)),
    ])
    def test_what_is_no_manager_of_the_model(self, registers, said, registered):
        registered('mine', registers)
        with pytest.raises(ConfigError) as caught:
            cached_model(Case(), 3, 0, kv_cache_cfg=dict(type='mine'))
        assert str(caught.value).startswith("policy.model.world_model_cfg.kv_cache_cfg.type='mine'")
        assert said in str(caught.value)

    @pytest.mark.parametrize('rotary', [False, True], ids=['learned', 'rotary'])
    def test_the_base_class_says_all_that_is_needed(self, registered, rotary):
        """A manager that was written from its docstrings answers as the plugin's own does."""
        registered('plain', PlainManager)
        case = Case(rotary=rotary)
        trace = random_trace(
            np.random.default_rng(2), case, 3, root_steps=5, simulations=5, clears=0.2, episodes=0.2, unknown=0.3
        )
        model = cached_model(case, 3, 0, kv_cache_cfg=dict(type='plain'))
        config, env_num, enable_stats = model.world_model.kv_cache_manager.arguments
        assert (config.context_length, env_num, enable_stats) == (8, 3, True)
        own = cached_model(case, 3, 0)
        for actual, expected in zip(play(Batch(model), trace), play(Batch(own), trace)):
            if expected is not None:
                assert_same(row_differences(actual, expected))
        counters = own.world_model.kv_cache_manager.counters()
        for pool, asked in model.world_model.kv_cache_manager.asked.items():
            assert (counters[pool]['queries'], counters[pool]['hits']) == (asked.total_queries, asked.hits)
        assert 0 < counters['total']['hits'] < counters['total']['queries']


def test_a_step_that_was_left_no_roots():
    """By a reset between the root inference and the search by key."""
    manager = KVCacheManager(dict(context_length=8, env_num=2, num_simulations=4))
    nothing = np.zeros((0, manager.context_pages), np.int64), np.zeros(0, np.int64)
    manager.store_init('collect', [], [], nothing)
    manager.forget_init('collect', [], [])
    assert [len(part) for part in manager.find_init('collect', [], [])] == [0, 0]
