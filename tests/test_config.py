"""What a user may write into ``world_model_cfg`` about caching, what it means, and what is refused in which words."""
import copy
import gc
import types
from unittest import mock

import numpy as np
import pytest
from builders import compiled, make_policy, small_cartpole
from ding.policy import create_policy
from ding.utils import POLICY_REGISTRY
from easydict import EasyDict
from small_models import Case, construct

from lzero_kvcache import CacheConfig, ConfigError, KVCacheManager, enable
from lzero_kvcache import config as config_module
from lzero_kvcache.config import FLAG, HANDED_DOWN, KV_CACHE_CFG, settle
from lzero_kvcache.host import models
from lzero_kvcache.host.refused import check_policy

BOTH_FLAGS = pytest.mark.parametrize('flag', [False, True], ids=['old', 'new'])


def read(flag=None, kv_cache_cfg=None, **world_model_cfg):
    cfg = EasyDict(world_model_cfg)
    if flag is not None:
        cfg.use_new_cache_manager = flag
    if kv_cache_cfg is not None:
        cfg.kv_cache_cfg = kv_cache_cfg
    return CacheConfig.read(cfg)


class TestDefaults:

    @pytest.mark.parametrize(('sizes', 'expected'), [
        (dict(num_simulations=128), 256),
        (dict(num_simulations=129), 258),
        (dict(num_simulations=25), 256),
        (dict(game_segment_length=20), 20),
        (dict(game_segment_length=1, num_simulations=400), 1),
        (dict(game_segment_length=None, num_simulations=400), 800),
    ])
    def test_init_pool_size(self, sizes, expected):
        assert read(True, **sizes).init_pool_size == expected

    @pytest.mark.parametrize(('sizes', 'expected'), [
        (dict(num_simulations=25), 200),
        (dict(env_num=3), 150),
        (dict(num_simulations=7, env_num=5), 35),
    ])
    def test_recurrent_pool_size(self, sizes, expected):
        assert read(True, **sizes).recurrent_pool_size == expected


class TestAccepted:

    def test_numpy_numbers(self):
        options = read(True, dict(init_pool_size=np.int64(5), max_memory_mb=np.float32(2)), env_num=np.int32(3))
        assert (options.init_pool_size, options.max_memory_mb, options.env_num) == (5, 2.0, 3)
        assert all(type(number) in (int, float) for number in (
            options.init_pool_size, options.max_memory_mb, options.env_num, options.recurrent_pool_size
        ))

    def test_none_is_the_default(self):
        assert read(True, dict.fromkeys(KV_CACHE_CFG)) == read(True)
        assert read(True, {}, num_simulations=None, env_num=None) == read(True)

    @pytest.mark.parametrize('make', [dict, EasyDict, lambda cfg: types.SimpleNamespace(**cfg)])
    def test_dicts_and_objects(self, make):
        cfg = dict(use_new_cache_manager=True, num_simulations=3, env_num=2, kv_cache_cfg=dict(eviction='lru'))
        options = CacheConfig.read(make(cfg))
        assert (options.use_new, options.recurrent_pool_size, options.eviction) == (True, 6, 'lru')

    def test_a_registered_manager(self, registered):
        registered('mine', KVCacheManager)
        assert read(True, dict(type='mine')).type == 'mine'


class TestRefused:
    """One line that names the key, its value and what would be right. With the flag off only a misspelt key is refused:
    LightZero trains with any value of a key that it does not read."""

    @staticmethod
    def message(flag, kv_cache_cfg=None, **world_model_cfg):
        with pytest.raises(ConfigError) as error:
            read(flag, kv_cache_cfg, **world_model_cfg)
        assert '\n' not in str(error.value)
        return str(error.value)

    @BOTH_FLAGS
    @pytest.mark.parametrize(('key', 'nearest'), [
        ('evicton', 'eviction'), ('init_size', 'init_pool_size'), ('dtpye', 'dtype'), ('typ', 'type'),
        ('recur_pool_size', 'recurrent_pool_size'), ('max_memory', 'max_memory_mb'),
    ])
    def test_unknown_key(self, flag, key, nearest):
        message = self.message(flag, {key: 1})
        assert f'kv_cache_cfg.{key}=1' in message
        assert f'did you mean {nearest!r}?' in message

    def test_unknown_key_that_is_near_to_nothing(self):
        message = self.message(True, dict(xyz=1))
        assert read(False, dict(xyz=1)) == read(False)
        assert 'kv_cache_cfg.xyz=1' in message
        assert all(repr(key) in message for key in KV_CACHE_CFG)

    @pytest.mark.parametrize(('key', 'value', 'right'), [
        ('eviction', 'LRU', "'lru'"), ('eviction', 3, "'priority'"), ('eviction', ['lru'], "'lru'"),
        ('dtype', 'float64', "is unknown: valid are 'float32', 'bfloat16', 'float16'"),
        ('dtype', 'bfloat61', "did you mean 'bfloat16'"), ('on_nan', True, "'skip'"),
        ('backend', 'cuda', "'cudagraph'"),
        ('backend', False, "'eager'"), ('search', 'ctree', "'tree'"), ('type', 'newer', "'new'"), ('type', 5, "'new'"),
        ('matmul', 'float16', "'bfloat16'"), ('matmul', 'tf23', "did you mean 'tf32'"),
        ('backend', 'compile', "was removed: use 'auto'"), ('init_pool_size', True, 'whole number'),
        ('init_pool_size', '400', 'whole number'), ('init_pool_size', 400., 'whole number'),
        ('init_pool_size', 0, 'at least 1'), ('recurrent_pool_size', [1], 'whole number'),
        ('validation', 'exakt', "did you mean 'exact'"), ('validation_freq', 1.5, 'whole number'),
        ('validation_tol', 0, 'above 0'), ('validation_action', 'stop', "'raise'"),
        ('enable_stats', 1, 'True or False'), ('max_memory_mb', -1.5, 'above 0'), ('max_memory_mb', '100', 'above 0'),
        ('max_memory_mb', True, 'above 0'), ('max_memory_mb', float('nan'), 'above 0'),
    ])
    def test_wrong_value_of_an_option(self, key, value, right):
        message = self.message(True, {key: value})
        assert read(False, {key: value}) == read(None, {key: value}) == read(False)
        assert f'kv_cache_cfg.{key}={value!r}' in message
        assert right in message

    @pytest.mark.parametrize('value', ['nosuch', 'olt', 'old_manager'])
    def test_a_manager_that_the_flag_does_not_pick_is_not_advised(self, value):
        assert "'old'" not in self.message(True, dict(type=value))

    @pytest.mark.parametrize(('kv_cache_cfg', 'device', 'why'), [
        (dict(matmul='tf32'), 'cpu', "world_model_cfg.device is 'cpu': use 'float32'"),
        (dict(matmul='bfloat16', search='tree'), 'cuda', "kv_cache_cfg.search is 'tree': use 'float32', or 'auto'"),
    ])
    def test_products_that_no_search_has(self, kv_cache_cfg, device, why):
        message = self.message(True, kv_cache_cfg, device=device)
        assert f"kv_cache_cfg.matmul={kv_cache_cfg['matmul']!r}" in message and why in message
        assert read(False, kv_cache_cfg, device=device) == read(False)
        assert read(True, dict(kv_cache_cfg, search='auto'), device='cuda').matmul == kv_cache_cfg['matmul']

    @pytest.mark.parametrize('key', ['num_simulations', 'env_num', 'game_segment_length'])
    @pytest.mark.parametrize(('value', 'right'), [
        (True, 'whole number'), ('50', 'whole number'), (2.5, 'whole number'), (0, 'at least 1'), (-1, 'at least 1'),
    ])
    def test_wrong_size(self, key, value, right):
        message = self.message(True, **{key: value})
        assert read(False, **{key: value}) == read(False)
        assert f'world_model_cfg.{key}={value!r}' in message
        assert right in message

    @pytest.mark.parametrize('value', [1, 0, 'True', None, 'new'])
    def test_flag_that_is_no_bool(self, value):
        message = self.message(None, use_new_cache_manager=value)
        assert f'use_new_cache_manager={value!r}' in message
        assert 'True or False' in message

    @pytest.mark.parametrize(('key', 'right'), [
        ('use_new_cache_manger', 'use_new_cache_manager'), ('use_new_kv_cache_manager', 'use_new_cache_manager'),
        ('use_cache_manager', 'use_new_cache_manager'), ('use_new_cache', 'use_new_cache_manager'),
        ('new_cache_manager', 'use_new_cache_manager'), ('kv_cache_config', 'kv_cache_cfg'),
        ('kvcache_cfg', 'kv_cache_cfg'), ('kv_cache', 'kv_cache_cfg'), ('num_simulatons', 'num_simulations'),
        ('game_segment_lenght', 'game_segment_length'),
    ])
    def test_misspelt_flag_or_options(self, key, right):
        message = self.message(None, **{key: True})
        assert f'world_model_cfg.{key}=True' in message
        assert f'did you mean {right!r}?' in message

    @pytest.mark.parametrize('value', ['lru', 5, ['eviction'], True, [('eviction', 'lru')]])
    def test_options_that_are_no_dict(self, value):
        assert f'kv_cache_cfg={value!r}' in self.message(True, value)
        assert read(False, value) == read(False)
        main = EasyDict(policy=dict(model=dict(world_model_cfg=dict(kv_cache_cfg=value))))
        create = EasyDict(policy=dict(type='unizero'))
        with pytest.raises(ConfigError, match='kv_cache_cfg='):
            enable(main, create, eviction='lru')

    def test_counts_can_be_turned_off_with_the_flag_off(self):
        assert read(False, dict(enable_stats=False, eviction=3)).enable_stats is False

    @pytest.mark.parametrize('options', [dict(evicton='lru'), dict(eviction='LRU'), dict(init_pool_size=0)])
    def test_a_manager_by_hand_needs_no_flag(self, options):
        with pytest.raises(ConfigError, match='kv_cache_cfg'):
            KVCacheManager(EasyDict(kv_cache_cfg=options))

    def test_old_with_the_flag_on(self):
        assert 'use_new_cache_manager=False' in self.message(True, dict(type='old'))


class TestContextLength:

    @pytest.mark.parametrize(('length', 'better'), [(5, 6), (2, 4), (1, 4)])
    def test_others_are_refused_in_new_mode(self, length, better):
        with pytest.raises(ConfigError, match=(
                f'context_length={length} must be even and at least 4 with use_new_cache_manager=True: try {better}, '
                'or use_new_cache_manager=False for the old system')):
            read(True, context_length=length)
        read(False, context_length=length)

    @pytest.mark.parametrize('length', [0, 8., '8', True])
    def test_nonsense_is_refused_in_new_mode(self, length):
        with pytest.raises(ConfigError, match='context_length='):
            read(True, context_length=length)

    def test_more_than_the_model_has_positions_for(self):
        with pytest.raises(ConfigError, match='context_length=22 must not exceed max_tokens=20'):
            read(True, context_length=22, max_tokens=20)


def policy_cfg(new=True, drop=(), policy=None, **world_model_cfg):
    """A policy's config, merged as LightZero's entries merge it, before a policy has seen it."""
    main = small_cartpole(new, **world_model_cfg)
    main.policy.update(policy or {})
    for key in drop:
        main.policy.model.world_model_cfg.pop(key)
    return compiled(main).policy


class TestSettle:
    """What a policy fills in from its own config, and what it refuses."""

    def test_fills_in_what_is_missing(self):
        cfg = policy_cfg(drop=['env_num'], collectors=3, evaluators=2, simulations=4)
        assert 'num_simulations' not in cfg.model.world_model_cfg
        options = settle(cfg)
        assert cfg.model.world_model_cfg.num_simulations == options.num_simulations == 4
        assert cfg.model.world_model_cfg.env_num == options.env_num == 3
        assert options.recurrent_pool_size == 12

    def test_as_many_environments_as_evaluation_needs(self):
        cfg = policy_cfg(drop=['env_num'], collectors=2, evaluators=5)
        assert settle(cfg).env_num == 5

    def test_leaves_what_is_enough(self):
        cfg = policy_cfg(env_num=9, num_simulations=10)
        options = settle(cfg)
        assert (options.env_num, options.num_simulations, options.recurrent_pool_size) == (9, 10, 90)

    def test_old_mode_is_left_as_lightzero_has_it(self):
        """Its world model falls back to 50 simulations and 8 environments, whatever the policy does."""
        cfg = policy_cfg(new=False, drop=['env_num'], collectors=3, simulations=4)
        settle(cfg)
        assert 'num_simulations' not in cfg.model.world_model_cfg
        assert cfg.model.world_model_cfg.env_num == 8

    @pytest.mark.parametrize(('sizes', 'message'), [
        (dict(env_num=2), r'env_num=2 is too small.*collector_env_num.*at least 3'),
        (dict(env_num=3, evaluators=4), r'env_num=3 is too small.*evaluator_env_num.*at least 4'),
        (dict(num_simulations=3), r'num_simulations=3 is too small.*at least 4'),
        (dict(kv_cache_cfg=dict(recurrent_pool_size=11)), r'recurrent_pool_size=11 is too small.*at least 12'),
    ])
    def test_what_makes_a_pool_too_small(self, sizes, message):
        with pytest.raises(ConfigError, match=message):
            settle(policy_cfg(**sizes))

    @BOTH_FLAGS
    @pytest.mark.parametrize(('key', 'value', 'beside'), [
        ('mcts_ctree', False, {}), ('random_collect_episode_num', 2, {}), ('random_collect_episode_num', None, {}),
        ('reanalyze_ratio', 0.25, dict(sampled_algo=True)),
    ])
    def test_what_cannot_work_in_either_mode(self, flag, key, value, beside):
        with pytest.raises(ConfigError, match=f'policy.{key}={value} cannot work'):
            check_policy(policy_cfg(flag, policy={key: value, **beside}), 'new' if flag else 'old')
        check_policy(policy_cfg(flag, policy=dict(reanalyze_ratio=0.25)), 'new' if flag else 'old')

    @pytest.mark.parametrize(('flag', 'wrong'), [
        (False, dict(kv_cache_cfg=dict(evicton='lru'))), (True, dict(kv_cache_cfg=dict(evicton='lru'))),
        (True, dict(num_simulations='4')), (False, dict(action_space_size=108)), (True, dict(action_space_size=108)),
    ])
    def test_a_policy_refuses_before_it_builds_a_model(self, flag, wrong, monkeypatch):
        monkeypatch.setattr(models.UniZeroModel, '__init__', None)
        with pytest.raises(ConfigError):
            make_policy(flag, **wrong)

    @BOTH_FLAGS
    @pytest.mark.parametrize(
        'build', [make_policy, lambda flag: construct(models.UniZeroModel, Case(), 2, use_new_cache_manager=flag)],
        ids=['policy', 'model']
    )
    def test_a_config_is_read_once(self, flag, build, monkeypatch):
        """A policy hands it down to its model and that to its manager; a model that is built alone reads its own."""
        read = mock.Mock(side_effect=config_module._read_options)
        monkeypatch.setattr(config_module, '_read_options', read)
        build(flag)
        assert read.call_count == 1

    def test_what_is_handed_down_is_not_in_the_users_config(self):
        cfg, fields = compiled(small_cartpole(True)).policy, ['learn', 'collect', 'eval']
        policy = create_policy(cfg, enable_field=fields)
        assert policy._model.world_model.kv_cache_manager.config == policy._options
        for world_model_cfg in (cfg.model.world_model_cfg, policy._model.world_model.config):
            assert HANDED_DOWN not in world_model_cfg and not hasattr(world_model_cfg, HANDED_DOWN)
        cfg.model.world_model_cfg.kv_cache_cfg.eviction = 'lru'
        again = create_policy(cfg, enable_field=fields)
        assert again._model.world_model.kv_cache_manager.config.eviction == 'lru'

    def test_a_models_config_can_be_changed_and_read_anew(self):
        config = copy.deepcopy(make_policy(True)._model.world_model.config)
        config.kv_cache_cfg.eviction = 'lru'
        assert CacheConfig.of(config).eviction == 'lru'

    @pytest.mark.filterwarnings('error::pytest.PytestUnraisableExceptionWarning')
    def test_a_refusal_is_all_that_is_said(self, capfd):
        """LightZero's destructor must not complain about what a refused policy lacks."""
        with pytest.raises(ConfigError):
            make_policy(True, num_simulations='4')
        gc.collect()
        assert 'Traceback' not in capfd.readouterr().err


@pytest.mark.parametrize('policy_type', ['unizero', 'sampled_unizero'])
def test_no_key_of_lightzero_is_taken_for_a_misspelt_one(policy_type):
    cfg = POLICY_REGISTRY.get(policy_type).default_config().model.world_model_cfg
    assert len(cfg) > 20
    CacheConfig.read(cfg)


@pytest.mark.parametrize('key', ['eval_num_simulations', 'collector_env_num', 'game_segment_length_for_reanalyze'])
@pytest.mark.parametrize('flag', [True, False])
def test_a_longer_name_is_no_misspelt_one(key, flag):
    """Those of another version of LightZero."""
    CacheConfig.read({FLAG: flag, key: 3})
