"""What tensorboard gets: the hook's values on scripted counters, and a real event file read back."""
import math
import types
from pathlib import Path

import pytest
import torch
from builders import Worker, make_policy
from ding.config.config import save_config_py
from small_models import ON_MAIN
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups, metadata
from torch.utils.tensorboard import SummaryWriter
from trainings import events_in

from lzero_kvcache import KVCacheManager
from lzero_kvcache.telemetry import (
    COMPARED,
    HOOK_KEY,
    HYPERPARAMETERS,
    KVCacheStatsHook,
    counters_of,
    write_hyperparameters,
)

BOTH_FLAGS = pytest.mark.parametrize('new', [False, True], ids=['old', 'new'])
OLD_TAGS = {
    f'{pool}_{metric}' for pool in ('init', 'recur', 'total') for metric in ('hit_rate', 'hits', 'misses', 'queries')
}
NEW_TAGS = OLD_TAGS | {
    f'{pool}_{metric}' for pool in ('init', 'recur', 'total') for metric in ('evictions', 'occupancy')
}
TIMES = {'search_ms', 'step_ms'}


def test_a_managers_methods_that_no_search_calls_are_told_of(registered, lines):
    def hierarchical_get(self, env_id, cache_key):
        raise AssertionError

    registered('mine', type('Mine', (KVCacheManager, ), dict(hierarchical_get=hierarchical_get)))
    policy = make_policy(True, simulations=2, kv_cache_cfg=dict(type='mine'))
    Worker(policy).step([0, 1])
    assert [text for level, text in lines() if level == 'WARNING'] == [
        'Mine has a hierarchical_get of its own, which searches do not call: they call find_init, store_init, '
        'find_recur and store_recur']


@BOTH_FLAGS
def test_memory_is_that_of_the_model_and_of_its_target_model(new):
    """The target model answers for target values and reanalyses, with a cache of its own."""
    policy = make_policy(new, simulations=2)
    managers = [model.world_model.kv_cache_manager for model in (policy._model, policy._target_model)]
    Worker(policy).step([0, 1])
    if new:
        managers[1].store.ready(64, torch.device('cpu'))
    memory = [manager.counters()['memory_mb'] for manager in managers]
    assert memory[0] > 0 and (not new or memory[1] > 0)
    for view in (policy.learn_mode, policy.eval_mode):
        assert counters_of(view)['memory_mb'] == sum(memory)
    assert counters_of(types.SimpleNamespace(get_attribute=without_a_target_of(policy)))['memory_mb'] == memory[0]


def without_a_target_of(policy):
    """As DI-engine answers for a policy that does not learn."""
    def get_attribute(name):
        if name == 'target_model':
            raise NotImplementedError
        return policy._get_attribute(name)
    return get_attribute


def hook():
    return KVCacheStatsHook(HOOK_KEY, 30, position='after_iter')


def values_of(hook, counters):
    return hook.values(counters, {})


def counters(*init_and_recur, **more):
    """Counters of (queries, hits) of the init and the recurrent pool, as a manager returns them."""
    pools = dict(zip(('init', 'recur'), init_and_recur))
    pools['total'] = tuple(map(sum, zip(*init_and_recur)))
    return {'memory_mb': 1.5, **{
        pool: {'queries': queries, 'hits': hits, 'misses': queries - hits, **more}
        for pool, (queries, hits) in pools.items()
    }}


def rates(values):
    return [values.get(f'{pool}_hit_rate') for pool in ('init', 'recur', 'total')]


class TestValues:

    def test_names(self):
        assert set(values_of(hook(), counters((4, 3), (8, 8)))) == OLD_TAGS | {'memory_mb'}
        assert set(values_of(hook(), counters((4, 3), (8, 8), evictions=0, occupancy=0.5))) == NEW_TAGS | {'memory_mb'}

    def test_rates_cover_the_searches_since_the_phase_before(self):
        used = hook()
        assert rates(values_of(used, counters((4, 3), (8, 8)))) == [0.75, 1.0, 11 / 12]
        assert rates(values_of(used, counters((8, 3), (16, 12)))) == [0., 0.5, 4 / 12]

    def test_rates_hold_between_phases(self):
        used = hook()
        values_of(used, counters((4, 3), (8, 8)))
        for _ in range(50):
            assert rates(values_of(used, counters((4, 3), (8, 8)))) == [0.75, 1.0, 11 / 12]
        assert rates(values_of(used, counters((6, 5), (8, 8)))) == [1.0, 1.0, 1.0]

    def test_no_rate_before_the_first_query(self):
        used = hook()
        assert rates(values_of(used, counters((0, 0), (0, 0)))) == [None, None, None]
        assert rates(values_of(used, counters((0, 0), (2, 2)))) == [None, 1.0, 1.0]
        assert rates(values_of(used, counters((2, 0), (2, 2)))) == [0.0, 1.0, 0.0]

    @pytest.mark.parametrize('after', [(4, 3), (12, 3), (10, 10), (40, 5), (12, 11)])
    def test_somebody_resets_the_statistics(self, after):
        """Rates are of what was counted since then, however much that is: never negative, never above 1."""
        used = hook()
        values_of(used, counters((10, 8), (10, 8)))
        for rate in rates(values_of(used, counters(after, after))):
            assert 0 <= rate <= 1


class Engine:
    """As much of DI-engine's learner as a hook looks at."""

    def __init__(self, policy, tb_logger):
        self.policy, self.tb_logger = policy.learn_mode, tb_logger
        self.exp_name = tb_logger.log_dir + '_run'
        self.last_iter, self.collector_envstep = types.SimpleNamespace(val=0), 0

    def after_iteration(self, hook, envstep):
        self.collector_envstep = envstep
        hook(self)
        self.last_iter.val += 1


def read(folder):
    """Every tag's points (step, value) of an event file."""
    events = events_in(folder)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()['scalars']}


def run(new, folder, **options):
    """Two collections and three training iterations after each."""
    policy = make_policy(new, **options)
    worker, used = Worker(policy), hook()
    with SummaryWriter(str(folder)) as writer:
        engine = Engine(policy, writer)
        for phase in (1, 2):
            for _ in range(2):
                worker.step([0, 1, 2])
            for _ in range(3):
                engine.after_iteration(used, 6 * phase)
    return policy


class TestEventFile:

    @BOTH_FLAGS
    def test_a_point_at_every_iteration_under_every_tag(self, new, tmp_path):
        run(new, tmp_path)
        points = read(tmp_path)
        tags = (NEW_TAGS | {'skipped', 'captures'} if new else OLD_TAGS) | {'memory_mb'} | TIMES
        assert set(points) == {f'kv_cache_{axis}/{tag}' for axis in ('iter', 'step') for tag in tags}
        for tag, series in points.items():
            steps = list(range(6)) if tag.startswith('kv_cache_iter/') else [6] * 3 + [12] * 3
            assert [step for step, _ in series] == steps
            assert all(math.isfinite(value) for _, value in series)

    @BOTH_FLAGS
    def test_numbers(self, new, tmp_path):
        """Three environments, four simulations, two steps in each phase, nothing lost."""
        run(new, tmp_path)
        points = {tag: [value for _, value in series] for tag, series in read(tmp_path).items()}
        assert points['kv_cache_iter/init_queries'] == [3.] * 3 + [9.] * 3
        assert points['kv_cache_iter/recur_hits'] == [24.] * 3 + [48.] * 3
        if new or not ON_MAIN:  # whose old system finds no root of vector observations
            assert points['kv_cache_iter/total_misses'] == [0.] * 6
            assert points['kv_cache_iter/total_hit_rate'] == [1.] * 6
        assert min(points['kv_cache_iter/memory_mb']) > 0
        assert min(points['kv_cache_iter/search_ms']) > min(points['kv_cache_iter/step_ms']) > 0
        if new:
            assert 0 < min(points['kv_cache_iter/init_occupancy']) <= max(points['kv_cache_iter/init_occupancy']) <= 1

    @BOTH_FLAGS
    def test_without_counting_only_memory_and_times(self, new, tmp_path):
        run(new, tmp_path, kv_cache_cfg=dict(enable_stats=False))
        written = {'memory_mb', 'captures'} if new else {'memory_mb'}
        assert {tag.split('/')[1] for tag in read(tmp_path)} == written | TIMES

    @BOTH_FLAGS
    def test_the_layout_is_written_once_and_groups_the_tags(self, new, tmp_path):
        run(new, tmp_path)
        written = events_in(tmp_path).Tensors('custom_scalars__config__')
        assert len(written) == 1
        layout = layout_pb2.Layout.FromString(written[0].tensor_proto.string_val[0])
        charts = {category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
                  for category in layout.category}
        assert list(charts) == ['reward', 'kv_cache']
        assert charts['reward'] == {'evaluation': ['evaluator_iter/reward_mean']}
        # One chart for each pool and metric.
        assert charts['kv_cache'] == {tag: [f'kv_cache_iter/{tag}'] for tag in NEW_TAGS | TIMES | {'memory_mb'}}

    def test_a_policy_without_the_plugins_model(self, tmp_path):
        policy = make_policy(False)
        del policy._model.world_model.kv_cache_manager
        with SummaryWriter(str(tmp_path)) as writer:
            Engine(policy, writer).after_iteration(hook(), 5)
        assert read(tmp_path) == {}


def hyperparameters(folder):
    """Values and metrics as tensorboard's page of hyperparameters reads them, from a run's only event file."""
    assert len(list(folder.iterdir())) == 1
    held = events_in(folder).PluginTagToContent(metadata.PLUGIN_NAME)
    assert set(held) == {metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG}
    start = metadata.parse_session_start_info_plugin_data(held[metadata.SESSION_START_INFO_TAG])
    experiment = metadata.parse_experiment_plugin_data(held[metadata.EXPERIMENT_TAG])
    values = {name: getattr(value, value.WhichOneof('kind')) for name, value in start.hparams.items()}
    assert {info.name for info in experiment.hparam_infos} == set(HYPERPARAMETERS) >= set(values)
    return values, [info.name.tag for info in experiment.metric_infos]


class TestHyperparameters:

    @pytest.fixture(autouse=True)
    def saved_config(self, tmp_path):
        """What DI-engine's ``compile_config`` leaves in the experiment's folder."""
        folder = Path(f'{tmp_path}_run')
        folder.mkdir()
        save_config_py(dict(env=dict(env_id='CartPole-v0'), seed=7), str(folder / 'total_config.py'))

    def test_of_the_new_system(self, tmp_path):
        policy = run(True, tmp_path, kv_cache_cfg=dict(eviction='lru', init_pool_size=9, dtype='bfloat16'))
        values, metrics = hyperparameters(tmp_path)
        manager = policy._model.world_model.kv_cache_manager
        assert values == {
            'cache_system': 'new', 'environment': 'CartPole-v0', 'seed': 7,
            'sizes.context_length': policy._cfg.model.world_model_cfg.context_length, 'sizes.env_num': 3,
            'sizes.init_pool_size': 9, 'sizes.num_simulations': 4,
            'sizes.recurrent_pool_size': manager.recur_pool.pool_size, 'storage.backend': 'eager',
            'storage.dtype': 'bfloat16', 'storage.eviction': 'lru',
        }
        assert {pool.pool_size for pool in manager.init_pools} == {9}
        assert metrics == list(COMPARED)

    def test_of_the_old_system(self, tmp_path):
        world_model = run(False, tmp_path)._model.world_model
        values, metrics = hyperparameters(tmp_path)
        assert values == {
            'cache_system': 'old', 'environment': 'CartPole-v0', 'seed': 7,
            'sizes.context_length': world_model.context_length, 'sizes.env_num': 3,
            'sizes.init_pool_size': len(world_model.shared_pool_init_infer[0]), 'sizes.num_simulations': 4,
            'sizes.recurrent_pool_size': len(world_model.shared_pool_recur_infer),
        }
        assert metrics == list(COMPARED)

    def test_the_page_filters_runs_of_both_systems(self, tmp_path):
        """As tensorboard's own backend answers, whichever run it takes the list of names from."""
        run(False, tmp_path / 'a_old')
        run(True, tmp_path / 'b_new', kv_cache_cfg=dict(eviction='lru'))
        multiplexer = EventMultiplexer()
        multiplexer.AddRunsFromDirectory(str(tmp_path))
        multiplexer.Reload()
        context = backend_context.Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(tmp_path))))
        experiment = get_experiment.Handler(RequestContext(), context, '', api_pb2.GetExperimentRequest()).run()
        # The page shows five, and what tells runs must be among them.
        names = [info.name for info in experiment.hparam_infos]
        assert sorted(names) == sorted(HYPERPARAMETERS) and sorted(names)[:3] == ['cache_system', 'environment', 'seed']

        def found(name, pattern):
            columns = [api_pb2.ColParams(hparam=name, filter_regexp=pattern, exclude_missing_values=True)]
            request = api_pb2.ListSessionGroupsRequest(
                slice_size=9, col_params=columns + [api_pb2.ColParams(metric=info.name)
                                                    for info in experiment.metric_infos],
                allowed_statuses=[api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_RUNNING])
            groups = list_session_groups.Handler(RequestContext(), context, '', request).run().session_groups
            return {group.name: {metric.name.tag: metric.value for metric in group.metric_values} for group in groups}

        assert list(found('cache_system', 'old')) == ['a_old']
        assert list(found('storage.eviction', 'lru|fifo')) == list(found('storage.backend', 'eager')) == ['b_new']
        written = read(tmp_path / 'b_new')
        assert found('cache_system', 'new')['b_new'] == {
            tag: pytest.approx(written[tag][-1][1]) for tag in COMPARED if tag.startswith('kv_cache')
        }

    def test_with_the_writer_of_tensorboardx(self, tmp_path):
        tensorboardX = pytest.importorskip('tensorboardX')
        with tensorboardX.SummaryWriter(str(tmp_path)) as writer:
            write_hyperparameters(writer, dict(cache_system='new', seed=3))
        assert hyperparameters(tmp_path) == (dict(cache_system='new', seed=3), list(COMPARED))
