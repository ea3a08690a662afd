"""The user's document, to the letter: names, log lines, printed lines, and what its verification snippet does."""
import json

import numpy as np
import pytest
from ding.utils import MODEL_REGISTRY
from oracle import Batch, random_trace
from small_models import Case, construct

EXAMPLE_2 = dict(
    max_blocks=10, max_tokens=20, context_length=8, env_num=8, num_simulations=50, game_segment_length=400,
    use_new_cache_manager=True
)
MODELS = [Case(), Case(sampled=True), Case(continuous=True)]
NEW_LINES = [
    '✓ Using NEW KVCacheManager for cache management',
    *(f"Initialized KVCachePool 'init_env{env_id}' with size=400, strategy=fifo" for env_id in range(8)),
    "Initialized KVCachePool 'recurrent' with size=400, strategy=fifo",
    "Initialized KVCachePool 'world_model' with size=8, strategy=fifo",
    'Initialized KVCacheManager for 8 environments',
]
OLD_LINES = ['Using OLD cache system (original implementation)']


def build(case=None, **cfg):
    case = case or Case()
    return construct(MODEL_REGISTRY.get(case.model_name), case, cfg.pop('env_num', 2), **cfg).world_model


@pytest.mark.parametrize('case', MODELS, ids=['UniZero', 'SampledUniZero', 'continuous'])
class TestLines:

    def test_new_system(self, case, lines):
        build(case, **EXAMPLE_2)
        assert lines() == [('INFO', line) for line in NEW_LINES]

    @pytest.mark.parametrize('flag', [{}, {'use_new_cache_manager': False}], ids=['absent', 'False'])
    def test_old_system(self, case, flag, lines):
        cfg = {key: value for key, value in EXAMPLE_2.items() if key != 'use_new_cache_manager'}
        build(case, **cfg, **flag)
        assert lines() == [('INFO', line) for line in OLD_LINES]

    @pytest.mark.parametrize(('flag', 'line'), [
        (True, 'Cleared WorldModel KV caches (NEW system).\n'),
        (False, 'Cleared WorldModel past_kv_cache (OLD system).\n'),
    ], ids=['new', 'old'])
    def test_clear_caches_prints_which_system(self, case, flag, line, capsys):
        world_model = build(case, use_new_cache_manager=flag)
        capsys.readouterr()
        world_model.clear_caches()
        assert capsys.readouterr() == (line, '')


class TestSummary:

    @pytest.mark.parametrize('flag', [False, True], ids=['old', 'new'])
    def test_can_be_written_as_json(self, flag):
        """After a search, whose numbers come from numpy and torch."""
        case = Case()
        model = construct(MODEL_REGISTRY.get('UniZeroModel'), case, 2, use_new_cache_manager=flag)
        player = Batch(model)
        for event in random_trace(np.random.default_rng(0), case, 2, root_steps=2, simulations=2).events:
            player.play(event)
        summary = model.world_model.kv_cache_manager.get_stats_summary()
        assert json.loads(json.dumps(summary)) == summary
        assert summary['stats_enabled'] is True
        assert summary['recur_pool']['total_queries'] > 0

    @pytest.mark.parametrize('flag', [False, True], ids=['old', 'new'])
    def test_without_counting(self, flag):
        world_model = build(use_new_cache_manager=flag, kv_cache_cfg=dict(enable_stats=False))
        assert world_model.kv_cache_manager.get_stats_summary() == {'stats_enabled': False}


@pytest.mark.parametrize('case', [Case(), Case(context_length=4, rotary=True)], ids=['learned', 'rotary'])
def test_a_miss_an_eviction_and_a_clear_are_told_at_debug(case, debug_lines):
    model = construct(
        MODEL_REGISTRY.get(case.model_name), case, 2, use_new_cache_manager=True, kv_cache_cfg=dict(init_pool_size=1)
    )
    player = Batch(model)
    for event in random_trace(np.random.default_rng(0), case, 2, root_steps=3, simulations=1, unknown=1.).events:
        player.play(event)
    told = [message for level, message in debug_lines() if level == 'DEBUG']
    for start in ('Miss in', 'Eviction from', 'Clear of'):
        assert any(message.startswith(start) for message in told), start
