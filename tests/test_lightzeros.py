"""The released LightZero and its main branch: the systems that the flag picks, and what is refused.

Tests of one of them are skipped with the other.
"""
import copy
import functools
import importlib
import inspect
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import Worker, compiled, make_policy, small_cartpole
from ding.policy import create_policy
from ding.utils import MODEL_REGISTRY
from easydict import EasyDict
from hypothesis import given
from hypothesis import strategies as st
from lzero.model.common import RepresentationNetworkMLP
from lzero.model.unizero_model import UniZeroModel
from lzero.model.unizero_world_models import transformer
from lzero.policy import sampled_unizero
from oracle import Batch, play, random_trace
from small_models import ON_MAIN, ORIGINAL_MODELS, Case, cached_model, construct, randomise
from test_validation import Checked
from test_whole_search import make
from trainings import BATCH
from zoo.classic_control.cartpole.config import cartpole_unizero_config as cartpole

from lzero_kvcache import CacheConfig, ConfigError, check_config
from lzero_kvcache.host.exploration import ExplorationMetrics
from lzero_kvcache.info import of_plan, of_zoo
from lzero_kvcache.training import make_plan
from lzero_kvcache.training.plan import set_cache
from lzero_kvcache_options import main

PROJECT = Path(__file__).resolve().parent.parent
on_main = pytest.mark.skipif(not ON_MAIN, reason="of LightZero's main branch")
on_release = pytest.mark.skipif(ON_MAIN, reason='of the released LightZero')
SMALL = (
    'env.collector_env_num=2', 'env.evaluator_env_num=1', 'policy.num_simulations=2', BATCH,
    'policy.update_per_collect=3', 'policy.model.world_model_cfg.embed_dim=32',
)
#: Its models for vectors pass a word that their encoder does not take, unless somebody has mended it.
AS_SHIPPED = ON_MAIN and 'layer_num=' in inspect.getsource(UniZeroModel.__init__) and (
    'layer_num' not in inspect.signature(RepresentationNetworkMLP).parameters)
SAVES_SAMPLED = 'use_adaptive_entropy_weight = ' in inspect.getsource(sampled_unizero)
#: By title, the program of each fault in docs/upstream.md and the line that it ends with.
FAULTS = {title: (program, last_line) for title, program, last_line in re.findall(
    r'^## (.*?)\n.*?```python\n(.*?)```\n\n```text\n(.*?)\n```', (PROJECT / 'docs' / 'upstream.md').read_text(),
    re.MULTILINE | re.DOTALL)}
ASYNCHRONOUS = '''
import copy
import sys
from lzero.entry import train_unizero_segment_async
from zoo.classic_control.cartpole.config import cartpole_unizero_config as cartpole

if __name__ == '__main__':
    main, create = copy.deepcopy(cartpole.main_config), copy.deepcopy(cartpole.create_config)
    main.exp_name = 'run'
    main.env.update(collector_env_num=2, evaluator_env_num=1, n_evaluator_episode=1)
    main.policy.update(
        cuda=False, device='cpu', num_simulations=3, collect_num_simulations=3, eval_num_simulations=3, batch_size=4,
        collector_env_num=2, evaluator_env_num=1, num_segments=2, update_per_collect=2, game_segment_length=10,
        buffer_reanalyze_freq=1/2, reanalyze_batch_size=4, reanalyze_partition=0.75,
        async_pipeline=dict(enabled=True, num_collector_actors=1))
    main.policy.model.world_model_cfg.update(
        device='cpu', embed_dim=32, env_num=2, use_new_cache_manager=True, game_segment_length=10)
    create.env_manager.type = 'base'
    create.policy.import_names = ['lzero.policy.unizero', 'lzero_kvcache']
    create.collector = dict(type='segment_muzero', import_names=['lzero.worker.muzero_segment_collector'])
    policy = train_unizero_segment_async([main, create], seed=0, max_train_iter=4, max_env_step=200)
    sys.stderr.flush()
    print('trained:', policy._model.world_model.hyperparameters['cache_system'], flush=True)
'''
SYSTEMS = {'old': (False, 'new'), 'lightzero': (True, 'lightzero'), 'new': (True, 'new')}


def checked(policy_type='unizero', policy=(), model=(), **world_model_cfg):
    """Check CartPole's config in new mode, with some keys of its policy, of its model and of its world model."""
    main, create = small_cartpole(True, **world_model_cfg), copy.deepcopy(cartpole.create_config)
    main.policy.update(dict(policy))
    main.policy.model.update(dict(model))
    create.policy.update(type=policy_type, import_names=[f'lzero.policy.{policy_type}', 'lzero_kvcache'])
    return check_config(main, create)


@on_release
def test_the_released_one_has_no_manager_of_its_own():
    with pytest.raises(ConfigError, match="kv_cache_cfg.type='lightzero' is the manager of LightZero's main branch"):
        CacheConfig.read(dict(use_new_cache_manager=True, kv_cache_cfg=dict(type='lightzero')))


@on_release
def test_nor_can_it_be_trained_with(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ('train', 'experiment'):
        assert main([command, '--config', 'config_new', '--cache', 'lightzero']) == 2
        said, = capfd.readouterr().err.splitlines()
        assert "kv_cache_cfg.type='lightzero' is the manager of LightZero's main branch, which is not installed" in said


@on_main
class TestExplorationMetrics:

    @given(st.data(), st.sampled_from([1., 0.5, 0.25, 3]))
    def test_they_are_lightzeros_own(self, data, temperature):
        """To the last bit, for roots with any numbers of legal actions, one that nobody has searched, and one without
        visits."""
        own = importlib.import_module('lzero.policy.unizero').search_exploration_metrics
        rows = data.draw(st.lists(st.lists(
            st.tuples(st.floats(-30, 30), st.integers(0, 100)), min_size=1, max_size=20), min_size=2, max_size=6))
        logits, visits = ([list(part) for part in parts] for parts in zip(*(zip(*row) for row in rows)))
        ours = ExplorationMetrics(types.SimpleNamespace(logits=lambda: logits[1:], visits=visits[1:]), own)
        for row in zip(map(np.array, logits), map(np.array, visits)):
            np.testing.assert_equal(ours(*row, temperature), own(*row, temperature))

    def test_they_are_measured_at_once(self, monkeypatch):
        def alone(*args):
            raise AssertionError('a row was measured alone')

        alone.__module__ = 'lzero.policy.unizero'
        monkeypatch.setattr('lzero.policy.unizero.search_exploration_metrics', alone)
        output = Worker(make('unizero', 'device')).step([0, 1, 2])
        assert all(0 < row['exploration/prior_entropy_nats'] < 10 for row in output.values())
        with pytest.raises(AssertionError, match='alone'):
            Worker(make('unizero', 'tree')).step([0, 1, 2])


@on_main
class TestMain:

    def test_an_option_picks_one_of_three(self):
        plans = [make_plan('config_new', cache=cache) for cache in ('old', 'lightzero', 'new')]
        for plan, system in zip(plans, ('old', 'lightzero', 'new')):
            assert check_config(plan.main_config, plan.create_config).system == system
            assert plan.main_config.exp_name == f'data_unizero/cartpole_{system}_seed0'
        set_cache('new', plans[1].main_config, plans[1].create_config)
        assert check_config(plans[1].main_config, plans[1].create_config).system == 'new'

    @pytest.mark.slow
    def test_an_experiment_trains_and_compares_all_three(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        command = ['experiment', '--config', 'config_new', '--cache', *SYSTEMS, '--seeds', '0', '--out', 'e',
                   '--max-env-step', '60', '--device', 'cpu', '--threads', '1', '--set', *SMALL]
        assert main(command) == 0
        compared = json.loads((tmp_path / 'e' / 'compare.json').read_text())
        assert [side['name'] for side in compared['sides']] == ['old', 'lightzero', 'new']
        assert main(command) == 0  # nothing is trained again
        summaries = [json.loads((tmp_path / 'e' / f'{cache}_seed0' / 'summary.json').read_text()) for cache in SYSTEMS]
        assert [summary['cache'] for summary in summaries] == list(SYSTEMS)
        assert all(summary['train_iter'] > 0 for summary in summaries)
        assert all(summary['versions']['LightZero'].endswith(' (main branch)') for summary in summaries)

    @pytest.mark.parametrize('system', SYSTEMS)
    def test_the_flag_and_the_type_pick_one_of_three(self, system):
        flag, manager = SYSTEMS[system]
        policy = make_policy(flag, kv_cache_cfg=EasyDict(type=manager, search='tree'))
        world_model = policy._model.world_model
        assert world_model.hyperparameters['cache_system'] == system
        assert world_model.use_new_cache_manager is flag
        worker = Worker(policy)
        for _ in range(3):
            worker.step([0, 1, 2])
        counters, summary = world_model.kv_cache_manager.counters(), world_model.kv_cache_manager.get_stats_summary()
        assert counters['init']['queries'] == 2 * 3
        assert counters['recur']['queries'] == counters['recur']['hits'] == 3 * 4 * 3
        # LightZero keeps the last observations of vectors as whole numbers, and so finds no root.
        assert counters['init']['hits'] == (6 if system == 'new' else 0)
        assert {'stats_enabled', 'init_pools', 'recur_pool', 'memory_mb'} <= summary.keys()

    def test_options_that_its_manager_does_not_read_are_told_of(self, caplog):
        read = dict(type='lightzero', enable_stats=False, eviction='fifo', init_pool_size=None)
        unread = dict(eviction='lru', search='tree', validation='exact')
        make_policy(True, kv_cache_cfg=EasyDict(read, search='auto'))
        assert 'does not read' not in caplog.text
        make_policy(True, kv_cache_cfg=EasyDict({**read, **unread}))
        said, = {record.message for record in caplog.records if 'does not read' in record.message}
        listed = ', '.join(f'kv_cache_cfg.{key}={value!r}' for key, value in unread.items())
        assert said == f"LightZero's own manager does not read {listed}: only kv_cache_cfg.type='new' does"
        options = [f'+policy.model.world_model_cfg.kv_cache_cfg.{key}={value}' for key, value in unread.items()]
        for cache, told in (('lightzero', True), ('old', True), ('new', False)):
            rows = dict(of_plan(make_plan('config_new', cache=cache, overrides=options))['cache'])
            assert ('not read' in rows) is told
            assert told is False or set(rows['not read'].split(', ')) == set(listed.split(', '))
            assert {'init pools', 'recurrent pool', 'context'} <= rows.keys()

    @pytest.mark.parametrize('system', ['old', 'lightzero'])
    @pytest.mark.parametrize('rotary', [False, True])
    def test_lightzeros_own_answer_as_without_the_plugin(self, system, rotary):
        flag, manager = SYSTEMS[system]
        case, answers = Case(rotary=rotary), []
        trace = random_trace(np.random.default_rng(3), case, 3, root_steps=4, simulations=6, episodes=0.2)
        for model_class in (ORIGINAL_MODELS['UniZeroModel'], MODEL_REGISTRY.get('UniZeroModel')):
            model = construct(
                model_class, case, 3, use_new_cache_manager=flag, kv_cache_cfg=EasyDict(type=manager)
            )
            randomise(model, case, 3)
            if not rotary:
                model.world_model.precompute_pos_emb_diff_kv()
            answers.append([answer for answer in play(Batch(model), trace) if answer])
        for one, other in zip(*answers):
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    @pytest.mark.parametrize(('key', 'value'), [
        ('exact_kv_window_reset', True), ('rebuild_kv_window_from_tokens', True), ('use_policy_logits_clip', True),
        ('task_embed_option', 'register_task_embed'), ('task_embed_option', 'add_task_embed'),
        ('moe_in_transformer', True), ('multiplication_moe_in_transformer', True),
    ])
    def test_options_that_change_contexts_are_refused(self, key, value):
        changes = {
            'num_experts_of_moe_in_transformer': 2, 'num_experts_per_tok': 1, 'moe_use_lora': False,
            'n_shared_experts': 1, key: value
        }
        with pytest.raises(ConfigError, match=f'{key}={value!r}'):
            cached_model(Case(), 2, 3, **changes)
        with pytest.raises(ConfigError, match=f'{key}={value!r}'):
            checked(rotary_emb=False, **changes)

    @pytest.mark.parametrize('system', SYSTEMS)
    def test_options_with_which_it_builds_no_model_are_refused_in_all_systems(self, system):
        flag, manager = SYSTEMS[system]
        of_system = dict(use_new_cache_manager=flag, kv_cache_cfg=EasyDict(type=manager))
        for said, options in (
                ("gru_gating=True cannot work: LightZero's gated block fails with", dict(gru_gating=True)),
                ('rebuild_kv_window_from_tokens=True contradicts rotary_emb=True',
                 dict(rebuild_kv_window_from_tokens=True, rotary_emb=True))):
            for refusing in (checked, lambda **cfg: make_policy(flag, **cfg)):
                with pytest.raises(ConfigError, match=f'policy.model.world_model_cfg.{said}'):
                    refusing(**of_system, **options)

    def test_gated_layers_are_let_pass_where_they_are_built(self, monkeypatch):
        gate = transformer.GRUGatingUnit
        monkeypatch.setattr(transformer, 'GRUGatingUnit', lambda width, bias_init: gate(width, bias_init))
        assert checked(gru_gating=True).system == 'new'

    @pytest.mark.parametrize('rotary', [False, True])
    def test_low_rank_changes_of_mlps_are_served_and_of_attention_refused(self, rotary):
        case = Case(rotary=rotary)
        options = dict(use_new_cache_manager=True, lora_r=4, lora_alpha=1, lora_dropout=0., lora_scale_init=1.,
                       curriculum_stage_num=3,
                       kv_cache_cfg=EasyDict(validation='exact', validation_freq=1, validation_tol=1e-4))
        make = functools.partial(construct, MODEL_REGISTRY.get('UniZeroModel'), case, 2, **options)
        model = randomise(make(lora_target_modules=['feed_forward']), case, 3)
        mlps = [block.feed_forward[0] for block in model.world_model.transformer.blocks]
        for mlp in mlps:
            mlp.set_curriculum_stage(1)
            for adapter in mlp.adapters:
                for part in adapter.values():
                    torch.nn.init.normal_(part, 0, 0.3)
        assert not torch.equal(mlps[0](torch.ones(1, 32)), torch.nn.functional.linear(
            torch.ones(1, 32), mlps[0].weight, mlps[0].bias))
        player = Checked(model)
        play(player, random_trace(np.random.default_rng(3), case, 2, root_steps=4, simulations=6))
        player.close()
        tally = model.world_model.validator.tally
        assert (tally.rows, tally.over) == (4 * 7 * 2, 0)
        with pytest.raises(ConfigError, match=r"world_model_cfg.lora_target_modules=\['attn'\]: projections of"):
            make(lora_target_modules=['attn'])
        assert model.world_model.why_not_in_arrays().startswith('its MLPs are CurriculumLoRALinear')

    def test_low_rank_changes_of_attention_are_refused_only_where_there_are_some(self):
        lora = dict(lora_r=4, lora_target_modules=['attn', 'feed_forward'])
        for none in (dict(lora, curriculum_stage_num=1), dict(lora, curriculum_stage_num=3, lora_r=0),
                     dict(lora, curriculum_stage_num=3, lora_target_modules=['feed_forward'])):
            assert checked(**none).system == 'new'
        with pytest.raises(ConfigError, match=r"lora_target_modules=\['attn', 'feed_forward'\]: projections of"):
            checked(**lora, curriculum_stage_num=3)

    @pytest.mark.slow
    def test_the_asynchronous_entry_is_served(self, tmp_path):
        """Each of its collectors has a policy of its own, in a process of its own."""
        pytest.importorskip('ray')
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', ASYNCHRONOUS], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=600, check=False, cwd=tmp_path)
        assert 'trained: new' in done.stdout.splitlines(), done.stdout[-2000:]
        assert re.search(r'CollectorActor.*Searching in arrays', done.stdout)

    def test_a_command_does_not_train_asynchronously(self):
        key = '+policy.async_pipeline.enabled'
        assert not make_plan('config_new', overrides=[f'{key}=False']).main_config.policy.async_pipeline.enabled
        with pytest.raises(ConfigError, match='enabled=True, but train_unizero collects in this process'):
            make_plan('config_new', overrides=[f'{key}=True'])

    def test_policies_that_are_not_served_are_refused(self):
        assert checked().system == 'new'
        for interval in (0, 2000):
            assert checked(policy=dict(kv_cache_clear_interval=interval)).system == 'new'
        for wrong, message in (
            (dict(policy_type='unizero_multitask'), 'is not a UniZero policy'),
            (dict(obs_type='text'), "obs_type='text'"),
            (dict(policy=dict(contextual_reanalysis=True, reanalyze_ratio=0.5)), 'contextual_reanalysis=True'),
            (dict(policy=dict(kv_cache_clear_interval=20)), 'kv_cache_clear_interval=20'),
            *((dict(model={f'{name}_support_range': support}), f'policy.model.{name}_support_range=')
              for name in ('value', 'reward') for support in ((-50., 52., 1.), (-50., 51., 2.))),
        ):
            with pytest.raises(ConfigError, match=message):
                checked(**wrong)

    @pytest.mark.parametrize(('name', 'why'), [
        ('UniZeroMTModel', 'its contexts and heads belong to tasks'),
        ('SampledUniZeroMTModel', 'its contexts and heads belong to tasks'),
    ])
    def test_other_models_refuse_the_flag_and_are_otherwise_lightzeros(self, name, why, monkeypatch):
        built = []
        model = MODEL_REGISTRY.get(name)
        monkeypatch.setattr(model.__mro__[1], '__init__', lambda self, world_model_cfg: built.append(world_model_cfg))
        for flag, manager in ((False, 'new'), (True, 'lightzero')):
            model(world_model_cfg=EasyDict(use_new_cache_manager=flag, kv_cache_cfg=EasyDict(type=manager)))
        assert len(built) == 2
        with pytest.raises(ConfigError, match=f'{name} is not served: {why}'):
            model(world_model_cfg=EasyDict(use_new_cache_manager=True))
        assert len(built) == 2

    def test_its_zoo_is_listed_with_what_each_config_lacks(self):
        listed = dict(of_zoo())
        assert {'lightzero:cartpole_unizero_config', 'lightzero:pendulum_cont_sampled_unizero_config',
                'lightzero:atari_unizero_segment_config', 'lightzero:jericho_unizero_config'} <= listed.keys()
        assert not any(name.startswith('lightzero:test_') for name in listed)
        fails = f"LightZero's own {inspect.getsourcefile(UniZeroModel)}:89 fails: TypeError: "
        said = listed['lightzero:cartpole_unizero_config']
        assert fails in said if AS_SHIPPED else said == 'no extra: installed'
        assert listed['lightzero:cartpole_unizero_ppo_config'] == said

    @pytest.mark.parametrize(('system', 'validation'), [
        ('old', 'off'), ('lightzero', 'off'), ('new', 'exact'), ('new', 'legacy')])
    @pytest.mark.parametrize('improvement', ['ppo', 'mcts'])
    def test_ppo_is_served_in_all_three(self, system, validation, improvement):
        flag, manager = SYSTEMS[system]
        config = small_cartpole(flag, kv_cache_cfg=EasyDict(
            type=manager, search='tree', validation=validation, validation_freq=1, validation_action='raise'))
        config.policy.update(policy_improvement=improvement, collect_with_pure_policy=improvement == 'ppo')
        policy = create_policy(
            compiled(config, 'unizero_ppo').policy, enable_field=['learn', 'collect', 'eval'])
        head = policy._model.world_model.head_policy.head_module
        collector, evaluator = Worker(policy), Worker(policy, 'eval')
        for env_ids in ([0, 1, 2], [0, 2], [0, 1, 2]):
            evaluator.step([0, 1])
            output = collector.step(env_ids)
            for env_id in env_ids if improvement == 'ppo' else ():
                features = torch.as_tensor(output[env_id]['behavior_policy_features'])
                of_features = torch.log_softmax(head(features), -1)[output[env_id]['action']]
                assert output[env_id]['behavior_log_prob'] == pytest.approx(of_features.item(), abs=1e-6)
        counters = policy._model.world_model.kv_cache_manager.counters()
        assert counters['init']['queries'] == 5 + 4
        assert counters['init']['hits'] == (9 if system == 'new' else 0)
        assert counters['recur']['queries'] == (0 if improvement == 'ppo' else 4 * (8 + 6))

    @pytest.mark.parametrize('title', FAULTS)
    def test_a_fault_that_is_reported_is_there(self, title):
        program, last_line = FAULTS[title]
        mended = {'Models for vectors cannot be constructed': not AS_SHIPPED,
                  'Sampled UniZero cannot save a checkpoint': SAVES_SAMPLED}
        if mended.get(title):
            pytest.skip('it was mended by hand')
        done = subprocess.run([sys.executable, '-W', 'ignore', '-c', program], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=300, check=False)
        assert done.stdout.splitlines()[-1] == last_line

    def test_a_table_of_angles_grows_and_no_context_is_lost(self):
        case = Case(rotary=True, max_seq_len=32)
        model = cached_model(case, 2, 3)
        trace = random_trace(np.random.default_rng(3), case, 2, root_steps=4, simulations=3)
        for number, event in enumerate(event for event in trace.events if hasattr(event, 'obs')):
            event.timesteps[:] = [300 * number + 20, number + 1]
        play(Batch(model), trace)
        assert len(model.world_model.transformer.freqs_cis) >= 2 * 920
        assert model.world_model.kv_cache_manager.counters()['init']['misses'] == 0
        roots = [event for event in trace.events if hasattr(event, 'obs')]
        for event, timesteps, angle in ((roots[0], [-1, 0], -2), (roots[-1], [1, 0], -1)):
            with pytest.raises(ValueError, match=f'a rotary angle of {angle}, '):
                play(Batch(model), trace._replace(events=[event._replace(timesteps=timesteps)]))
