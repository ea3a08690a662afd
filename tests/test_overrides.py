"""--set: literals only, known keys only, and the copies that LightZero keeps of a value follow it."""
import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import ON_MAIN

from lzero_kvcache import ConfigError
from lzero_kvcache.host import building
from lzero_kvcache.training import load_config, make_plan
from lzero_kvcache.training.linked_keys import replace_token
from lzero_kvcache.training.overrides import apply_overrides

WM = 'policy.model.world_model_cfg.'


@pytest.fixture(scope='module')
def cartpole():
    loaded = load_config('config_new')
    return loaded.main_config, loaded.create_config, building.completed(loaded.main_config, loaded.create_config)


@pytest.fixture(scope='module')
def pong():
    loaded = load_config('atari_unizero_segment_config')
    pytest.importorskip('cv2')
    return loaded.main_config, loaded.create_config, building.completed(loaded.main_config, loaded.create_config)


def set_in(configs, *assignments):
    main_config, create_config, defaults = configs
    main_config, create_config = copy.deepcopy(main_config), copy.deepcopy(create_config)
    changed = apply_overrides(main_config, create_config, assignments, defaults)
    return main_config, create_config, changed


def test_a_number_goes_where_it_belongs_and_into_its_copy(cartpole):
    main_config, _, _ = set_in(cartpole, 'policy.num_simulations=10')
    assert main_config.policy.num_simulations == 10
    assert main_config.policy.model.world_model_cfg.num_simulations == 10


@settings(deadline=None, max_examples=25)
@given(collectors=st.integers(1, 20), evaluators=st.integers(1, 20),
       path=st.sampled_from(['env.', 'policy.', WM]))
def test_environment_counts_agree_wherever_one_is_set(cartpole, collectors, evaluators, path):
    main_config, _, _ = set_in(
        cartpole, f'{path}collector_env_num={collectors}', f'{path}evaluator_env_num={evaluators}')
    world_model = main_config.policy.model.world_model_cfg
    assert main_config.env.collector_env_num == main_config.policy.collector_env_num == collectors
    assert world_model.collector_env_num == main_config.policy.n_episode == collectors
    assert main_config.env.evaluator_env_num == main_config.policy.evaluator_env_num == evaluators
    assert main_config.env.n_evaluator_episode == world_model.evaluator_env_num == evaluators
    assert world_model.env_num == max(collectors, evaluators)


def test_what_the_user_set_does_not_follow(cartpole):
    main_config, _, _ = set_in(cartpole, 'env.collector_env_num=4', 'policy.n_episode=12')
    assert main_config.policy.n_episode == 12
    assert main_config.policy.collector_env_num == 4


def test_a_relation_that_did_not_hold_is_not_made_to(cartpole):
    # CartPole's world model holds 10 blocks and is unrolled 5 steps.
    main_config, _, changed = set_in(cartpole, 'policy.num_unroll_steps=7')
    assert main_config.policy.model.world_model_cfg.max_blocks == 10
    assert set(changed) == {'policy.num_unroll_steps'}


def test_sizes_of_the_window_follow(cartpole):
    main_config, _, _ = set_in(cartpole, WM + 'context_length=6', WM + 'max_blocks=12')
    world_model = main_config.policy.model.world_model_cfg
    assert world_model.context_length_for_recurrent == 6
    assert world_model.max_tokens == 24


@pytest.mark.skipif(ON_MAIN, reason="LightZero's main branch names its runs otherwise")
def test_another_game_brings_its_actions_and_its_name(pong):
    main_config, _, _ = set_in(pong, 'env.env_id=BreakoutNoFrameskip-v4', 'policy.batch_size=8')
    assert main_config.policy.model.action_space_size == 4
    assert main_config.policy.model.world_model_cfg.action_space_size == 4
    assert main_config.exp_name.startswith('data_lz/data_unizero/Breakout/Breakout_uz_')
    assert '_bs8_' in main_config.exp_name


def test_a_game_without_a_known_number_of_actions(pong):
    with pytest.raises(ConfigError, match='action_space_size'):
        set_in(pong, 'env.env_id=TennisNoFrameskip-v4')
    main_config, _, _ = set_in(pong, 'env.env_id=TennisNoFrameskip-v4', 'policy.model.action_space_size=18')
    assert main_config.policy.model.world_model_cfg.action_space_size == 18


@pytest.mark.usefixtures('pong')
def test_a_game_with_another_number_of_actions_is_refused():
    for key in ('policy.model.action_space_size', WM + 'action_space_size'):  # the one that the user has set is named
        said = f"^{key}=5 contradicts env.env_id='PongNoFrameskip-v4': it must be 6$"
        with pytest.raises(ConfigError, match=said):
            make_plan('atari_unizero_segment_config', overrides=[f'{key}=5'])
    copies = ['policy.model.action_space_size=6', WM + 'action_space_size=5']
    with pytest.raises(ConfigError, match='contradicts .*size=5: they must be the same$'):
        make_plan('atari_unizero_segment_config', overrides=copies)


def test_segments_follow_the_collectors(pong):
    main_config, _, _ = set_in(pong, 'env.collector_env_num=3')
    assert main_config.policy.num_segments == 3
    assert main_config.policy.model.world_model_cfg.env_num == (3 if ON_MAIN else 10)


@pytest.mark.parametrize(('assignment', 'path', 'value'), [
    ('policy.eval_freq=1e3', ('policy', 'eval_freq'), 1000),
    ('policy.td_steps=7', ('policy', 'td_steps'), 7),  # a default that the file does not name
    ('policy.use_wandb=true', ('policy', 'use_wandb'), True),
    ('policy.update_per_collect=None', ('policy', 'update_per_collect'), None),
    ('policy.reanalyze_ratio=0.5', ('policy', 'reanalyze_ratio'), 0.5),
    ('exp_name=42', ('exp_name', ), '42'),
    ('env.env_id=CartPole-v1', ('env', 'env_id'), 'CartPole-v1'),
    ("policy.augmentation=['shift']", ('policy', 'augmentation'), ['shift']),
    ("policy.eps={'start': 0.5}", ('policy', 'eps', 'start'), 0.5),
    ('+policy.brand_new=[1]', ('policy', 'brand_new'), [1]),
    (WM + 'kv_cache_cfg.eviction=lru', ('policy', 'model', 'world_model_cfg', 'kv_cache_cfg', 'eviction'), 'lru'),
])
def test_values(cartpole, assignment, path, value):
    node, _, _ = set_in(cartpole, assignment)
    for key in path:
        node = node[key]
    assert node == value
    assert type(node) is type(value)


def test_a_part_of_a_dict_leaves_the_rest(cartpole):
    _, _, changed = set_in(cartpole, "policy.eps={'start': 0.5}")
    assert set(changed) == {'policy.eps.start'}


def test_create_config_can_be_set(cartpole):
    _, create_config, _ = set_in(cartpole, 'create_config.env_manager.type=subprocess')
    assert create_config.env_manager.type == 'subprocess'


@pytest.mark.parametrize(('assignment', 'message'), [
    ('policy.num_simulatons=3', "did you mean 'policy.num_simulations'"),
    ('num_simulations=3', "did you mean 'policy.num_simulations'"),
    ('policy.context_length=8', "did you mean 'policy.model.world_model_cfg.context_length'"),
    (WM + 'kv_cache_cfg.evicton=lru', 'kv_cache_cfg.eviction'),
    ('policy.num_simulations=many', 'is a number .25 now., not .many'),
    ('policy.use_wandb=maybe', 'True or False'),
    ('policy.augmentation=shift', 'is a list'),
    ('policy=3', 'holds .* keys'),
    ('policy.num_simulations', 'write KEY=VALUE'),
    ('=3', 'write KEY=VALUE'),
])
def test_mistakes(cartpole, assignment, message):
    with pytest.raises(ConfigError, match=message) as caught:
        set_in(cartpole, assignment)
    assert '\n' not in str(caught.value)


def test_nothing_is_evaluated(cartpole, tmp_path):
    marker = tmp_path / 'evaluated'
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    main_config, _, _ = set_in(cartpole, 'exp_name=' + code)
    assert main_config.exp_name == code
    assert not marker.exists()


@pytest.mark.parametrize(('name', 'token', 'old', 'new', 'expected'), [
    ('a_seed0', 'seed', 0, 3, 'a_seed3'),
    ('a_seed01', 'seed', 0, 3, 'a_seed01'),
    ('a_rr0.25', 'rr', 0, 3, 'a_rr0.25'),
    ('a_rr0.25_x', 'rr', 0.25, 0.5, 'a_rr0.5_x'),
    ('a_gbs8', 'bs', 8, 4, 'a_gbs8'),
    ('ns25-rr1', 'ns', 25, 5, 'ns5-rr1'),
])
def test_names_spell_values(name, token, old, new, expected):
    assert replace_token(name, token, old, new) == expected
