"""Data-parallel training: what ranks agree on, who writes, and two-process runs on the CPU with equal weights."""
import contextlib
import copy
import importlib
import math
import os
import signal
import subprocess
import sys
import time
import types

import gymnasium
import pytest
import torch
import torch.distributed as dist
from easydict import EasyDict
from forks import environment
from trainings import (
    ITERATIONS,
    PROJECT_ROOT,
    SMALL,
    WM,
    import_what_trainings_import,
    scalars,
    short_episodes,
    summary_of,
    trained_by_two,
    when,
)
from trainings import train as main

from lzero_kvcache import ConfigError, telemetry
from lzero_kvcache.host import building, data_parallel, entries
from lzero_kvcache.host.data_parallel import Interrupted
from lzero_kvcache.host.patches import applied
from lzero_kvcache.summary import read_progress
from lzero_kvcache.training import make_plan, runner
from lzero_kvcache.training.checkpoints import read_checkpoint
from lzero_kvcache.training.ranks import DataParallel
from lzero_kvcache_options import ranks_of_torchrun

# A segment of ten steps ends before its episode does.
SEGMENTS = """
from config_new import create_config, main_config
entry = {!r}
main_config.policy.update(num_segments=4, game_segment_length=10, reanalyze_batch_size=8, reanalyze_partition=1,
                          buffer_reanalyze_freq=1 / 100000)
main_config.policy.model.world_model_cfg.game_segment_length = 10
"""
OF_TORCHRUN = dict(RANK='3', WORLD_SIZE='4', LOCAL_WORLD_SIZE='2', MASTER_ADDR='localhost')
ENTRY = importlib.import_module('lzero.entry.train_unizero')


@pytest.fixture()
def group(tmp_path):
    """A process group of this process alone, in which a sum is one's own number."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize(('told', 'ranks'), [
    ({}, (0, 1, 1)), (dict(RANK='3', WORLD_SIZE='4'), (0, 1, 1)), (OF_TORCHRUN, (3, 4, 2)),
])
def test_alone_unless_torchrun_says_otherwise(told, ranks, monkeypatch):
    for name in OF_TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert ranks_of_torchrun() == ranks


def test_alone_nothing_is_exchanged():
    alone = DataParallel()
    alone.join('cpu')
    alone.in_collection()
    alone.in_evaluation()
    alone.after_update()
    alone.part()
    assert alone.main
    assert alone.from_main(lambda: 'made') == 'made'
    original = ENTRY.calculate_update_per_collect
    with applied(**data_parallel.replacements(alone)):
        assert ENTRY.calculate_update_per_collect is original


def test_as_many_gpus_as_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    with pytest.raises(ConfigError, match='2 processes need as many GPUs, and there are 1'):
        DataParallel(0, 2, 2).join('cuda')


def test_a_rank_takes_its_share(monkeypatch):
    plan = make_plan('config_new')
    monkeypatch.setattr('lzero.config.utils.get_world_size', lambda: 3)
    tree = building.completed(plan.main_config, plan.create_config)
    DataParallel(1, 3, 3).share_out(plan.main_config, tree, 'train_unizero')
    policy = plan.main_config.policy
    assert policy.multi_gpu is True
    assert policy.use_wandb is False
    assert (policy.batch_size, policy.n_episode) == (math.ceil(64 / 3), 3)
    assert plan.main_config.env.collector_env_num == policy.collector_env_num == 3
    # What compile_config makes of it is what a collector accepts.
    tree = building.completed(plan.main_config, plan.create_config)
    assert tree.policy.n_episode >= tree.env.collector_env_num


def test_a_config_for_several_processes_is_refused_in_one():
    plan = make_plan('config_new', overrides=['policy.multi_gpu=True'])
    with pytest.raises(ConfigError, match='torchrun --nproc_per_node'):
        DataParallel().share_out(plan.main_config, plan.main_config, plan.entry)


@pytest.mark.parametrize(('processes', 'segments', 'right'), [
    (1, 8, True), (1, 9, False), (2, 16, True), (2, 18, False)])
def test_each_process_collects_a_segment_of_each_of_its_environments(processes, segments, right, monkeypatch):
    """LightZero's collector asserts it."""
    monkeypatch.setattr('lzero.config.utils.get_world_size', lambda: processes)
    plan = make_plan('config_new', overrides=[f'+policy.num_segments={segments}'])
    tree = building.completed(plan.main_config, plan.create_config)
    ranks = DataParallel(0, processes, processes)
    ranks.share_out(copy.deepcopy(plan.main_config), tree, 'train_unizero')
    refused = contextlib.nullcontext() if right else pytest.raises(
        ConfigError, match='policy.num_segments=9 contradicts env.collector_env_num=8( in each process)?: it must be')
    with refused:
        ranks.share_out(plan.main_config, tree, 'train_unizero_segment')


def test_no_two_environments_have_one_seed():
    seeds = [DataParallel(rank, 3, 3).seed(5, 4) + index for rank in range(3) for index in range(4)]
    assert seeds == list(range(5, 17))


def test_usage_errors_are_said_once(monkeypatch, capfd):
    for name, value in OF_TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert main(['--config', 'nosuch']) == 2
    assert main(['--colour']) == 2
    assert capfd.readouterr() == ('', '')


# ---------------------------------------------------------------------------------------------------- agreement


@pytest.mark.usefixtures('group')
class TestAgreement:

    @pytest.fixture()
    def ranks(self):
        return DataParallel(0, 2, 2)

    @pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
    def test_at_the_end_of_a_collection(self, ranks, signum):
        reduced = data_parallel.replacements(ranks)['allreduce'](None)
        assert reduced(3, 'sum') == 3
        assert isinstance(reduced(3, 'sum'), int)
        assert reduced(1.5, 'avg') == 0.75
        ranks.in_collection()
        ranks.asked = signum
        for leave in (ranks.in_collection, lambda: reduced(3, 'sum')):
            with pytest.raises(Interrupted) as caught:
                leave()
            assert (caught.value.signum, caught.value.agreed) == (signum, True)

    def test_after_an_evaluation(self, ranks):
        outcome = [True, {'eval_episode_return': 2.}]
        ranks.broadcast(outcome, src=0)
        assert outcome == [True, {'eval_episode_return': 2.}]
        ranks.asked = signal.SIGTERM
        with pytest.raises(Interrupted, match='SIGTERM'):
            ranks.in_evaluation()

    def test_after_an_update(self, ranks):
        ranks.after_update()
        ranks.asked = signal.SIGINT
        with pytest.raises(Interrupted, match='SIGINT'):
            ranks.after_update()

    def test_an_error_of_the_first_rank_is_everybodys(self, ranks):
        assert ranks.from_main(lambda: 'folder') == 'folder'

        def fail():
            raise ConfigError('no room')

        with pytest.raises(ConfigError, match='no room'):
            ranks.from_main(fail)

    def test_equal_numbers_of_updates(self, ranks):
        segments = [range(7), range(4)], None
        config = EasyDict(policy=dict(update_per_collect=None, game_segment_length=5, replay_ratio=0.25))
        original = ENTRY.calculate_update_per_collect
        with applied(**data_parallel.replacements(ranks)):
            assert ENTRY.calculate_update_per_collect(config, segments, world_size=2) == 2
            config.policy.update_per_collect = 6
            assert ENTRY.calculate_update_per_collect(config, segments, world_size=2) == 6
        assert ENTRY.calculate_update_per_collect is original

    def test_a_buffer_counts_as_the_emptiest_does(self, ranks):
        buffer = types.SimpleNamespace(get_num_of_transitions=lambda: 9, get_num_of_game_segments=lambda: 2, size=4)
        common = data_parallel.replacements(ranks)['buffers'](lambda config: buffer)('config')
        assert (common.get_num_of_transitions(), common.get_num_of_game_segments(), common.size) == (9, 2, 4)


@pytest.mark.usefixtures('group')
def test_sums_of_counts_and_means_of_occupancies(monkeypatch):
    pool = {'queries': 8, 'hits': 7, 'occupancy': 0.5}
    numbers = {'memory_mb': 1.5, 'init': pool, 'search': {'count': 3, 'seconds': 0.25}}
    assert telemetry.summed_over_ranks(numbers) is numbers
    monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
    monkeypatch.setattr(dist, 'all_gather_object', lambda held, own: held.__setitem__(slice(None), [own, own]))
    summed = telemetry.summed_over_ranks(numbers)
    assert summed == {'memory_mb': 3., 'init': {'queries': 16, 'hits': 14, 'occupancy': 0.5},
                      'search': {'count': 6, 'seconds': 0.5}}
    assert [type(summed['init'][name]) for name in pool] == [int, int, float]


# ---------------------------------------------------------------------------------------------------- real trainings

# A batch of one can be masked as a whole, and its loss is nan.
FOR_TWO = ['env.collector_env_num=4', 'policy.batch_size=16']
ALL = [f'{pool}_{name}' for pool in ('init', 'recur', 'total') for name in ('queries', 'hits', 'misses')]


def two_ranks(folder, arguments, prepare):
    """Exit codes and output of two processes; ``prepare`` is called in each with its rank."""
    import_what_trainings_import()
    return trained_by_two(folder, [*SMALL, *FOR_TWO, *arguments], lambda rank: (short_episodes(), prepare(rank)))


def keep_what_it_ends_with(rank):
    """In a file: the weights and counts of a rank."""
    run_entry, new_watch, watches = entries.run_entry, runner.Watch, []

    def keep(entry, configs, **arguments):
        policy, result = run_entry(entry, configs, **arguments), watches[0].result
        watches[0].look()
        torch.save(dict(
            state=(policy._learn_model.state_dict(), policy._target_model.state_dict()), seed=arguments['seed'],
            counters=result.counters, train_iter=result.train_iter, env_step=result.env_step), f'rank{rank}.pt')
        return policy

    entries.run_entry = keep
    runner.Watch = lambda *given, **options: watches.append(new_watch(*given, **options)) or watches[0]


@pytest.mark.slow
@pytest.mark.parametrize('entry', ['train_unizero', 'train_unizero_segment'])
def test_two_processes_end_with_equal_weights(entry, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(os.path.join(PROJECT_ROOT, 'configs'))
    (tmp_path / 'config.py').write_text(SEGMENTS.format(entry))

    def prepare(rank):
        keep_what_it_ends_with(rank)
        runner.REFRESH_SECONDS = 0.
        if rank == 1 and entry == 'train_unizero':  # it collects less than the one that counts
            for spec in gymnasium.registry.values():
                spec.max_episode_steps = 8

    ends = two_ranks(tmp_path, ['--config', 'config.py'], prepare)
    assert [code for code, _ in ends] == [0, 0], "\n".join(said for _, said in ends)
    first, second = (torch.load(str(tmp_path / f'rank{rank}.pt')) for rank in range(2))
    folder = tmp_path / 'run'
    summary = summary_of(folder)

    assert first['train_iter'] == second['train_iter'] == summary['train_iter'] == ITERATIONS
    assert first['env_step'] == second['env_step'] == summary['env_step'] == summary['collected_env_step'] > 0
    speed = summary['env_steps_per_second'] * summary['seconds']
    assert speed == pytest.approx(summary['env_step'])
    assert read_progress(str(folder))['collected_env_step'] == summary['env_step']
    assert first['seed'] != second['seed']
    for one, other in zip(first['state'], second['state']):
        for name, value in one.items():
            # Statistics of batch normalisation are each rank's own.
            if 'running_' not in name:
                assert torch.equal(value, other[name]), name
    saved = read_checkpoint(str(tmp_path / summary['checkpoint'])).state['model']
    assert all(torch.equal(value, saved[name]) for name, value in first['state'][0].items())

    # Only the first rank spoke and wrote, in one folder, and the sums are of both.
    assert ends[0][1].count('Training: done') == ends[0][1].count(' into run\n') == 1
    assert ends[1][1] == ''
    logs = sorted(name for name in os.listdir(str(folder / 'log')) if name.endswith('.log'))
    assert logs == ['train.log', 'train_rank1.log']
    assert len(os.listdir(str(folder / 'log' / 'serial'))) == 1
    assert summary['processes'] == 2
    points = scalars(folder, 'kv_cache_iter/recur_queries')
    assert [point.step for point in points] == list(range(ITERATIONS))
    assert summary['counters']['recur']['queries'] >= points[-1].value > second['counters']['recur']['queries'] > 0
    for name in ALL:
        pool, name = name.split('_')
        assert summary['counters'][pool][name] == first['counters'][pool][name] + second['counters'][pool][name]


# What a fork cannot do once its parent has used a GPU.
OF_ONE_RANK = """
import os, sys
from test_several_processes import keep_what_it_ends_with
from trainings import short_episodes, train
short_episodes()
keep_what_it_ends_with(int(os.environ['RANK']))
sys.exit(train(sys.argv[1:]))
"""


def searched_by_two_ranks(folder, device):
    """What two ranks end with whose searches are in arrays, each on a device of its own; and what their logs say."""
    (folder / 'rank.py').write_text(OF_ONE_RANK)
    arguments = [*SMALL, *FOR_TWO, f'{WM}.kv_cache_cfg.search=device']
    arguments[arguments.index('--device') + 1] = device
    ended = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'rank.py', '--config',
         'config_new', *arguments],
        cwd=str(folder), encoding='utf-8', stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=500,
        env=environment(PROJECT_ROOT, os.path.join(PROJECT_ROOT, 'tests'), OMP_NUM_THREADS='1'))
    assert ended.returncode == 0, ended.stdout[-5000:]
    logs = [(folder / 'run' / 'log' / name).read_text(encoding='utf-8') for name in ('train.log', 'train_rank1.log')]
    ends = [torch.load(str(folder / f'rank{rank}.pt'), map_location='cpu') for rank in range(2)]
    for one, other in zip(ends[0]['state'], ends[1]['state']):
        for name, value in one.items():
            if 'running_' not in name:
                torch.testing.assert_close(value, other[name], rtol=0, atol=0, msg=name)
    return ends, logs


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='there are no two GPUs')
def test_two_gpus_search_in_arrays_and_end_with_equal_weights(tmp_path):
    ends, logs = searched_by_two_ranks(tmp_path, 'cuda')
    for rank, (end, log) in enumerate(zip(ends, logs)):
        assert f'Searching in arrays, since the model is on cuda:{rank}, where triton runs' in log
        assert end['counters']['captures'] > 0 and end['counters']['recur']['queries'] > 0
    summary = summary_of(tmp_path / 'run')['counters']
    for count in (lambda counters: counters['captures'], lambda counters: counters['recur']['queries']):
        assert count(summary) == sum(count(end['counters']) for end in ends)


def assert_ended_together(folder, signum):
    summary = summary_of(folder / 'run')
    assert summary['outcome'] == f'interrupted by {signum.name}'
    assert summary['exit_code'] == 128 + signum
    checkpoint = read_checkpoint(str(folder / summary['checkpoint']))
    assert checkpoint.train_iter == summary['train_iter'] > 0
    assert not [name for name in os.listdir(str(folder / 'run' / 'ckpt')) if name.endswith('.tmp')]
    assert 'Traceback' not in (folder / 'run' / 'log' / 'train_rank1.log').read_text(encoding='utf-8')


@pytest.mark.slow
@pytest.mark.parametrize(('signum', 'rank'), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_ranks_end_together_when_one_is_asked_to(signum, rank, tmp_path):
    moment = 3 * float(torch.rand(()))

    def prepare(own):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if own == rank:
            when(lambda: 'Cleared WorldModel' in (tmp_path / 'printed0').read_text(encoding='utf-8'),
                 lambda: (time.sleep(moment), os.kill(os.getpid(), signum)))

    ends = two_ranks(tmp_path, ['--config', 'config_new', '--max-train-iter', '100000'], prepare)
    assert [code for code, _ in ends] == [128 + signum] * 2, ends
    assert f'Training: interrupted by {signum.name}' in ends[0][1]
    assert_ended_together(tmp_path, signum)


@pytest.mark.slow
def test_under_torchrun_ctrl_c_ends_all(tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               os.path.join(PROJECT_ROOT, 'train.py'), '--config', 'config_new', *SMALL, *FOR_TWO]
    command[command.index('--max-train-iter') + 1] = '100000'
    process = subprocess.Popen(
        command, cwd=str(tmp_path), encoding='utf-8', stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=environment(PROJECT_ROOT, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))
    try:
        for line in process.stdout:
            if line.startswith('Cleared WorldModel'):
                process.send_signal(signal.SIGINT)
                break
        shown = process.communicate(timeout=240)[0]
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode != 0
    assert 'Training: interrupted by SIGINT' in shown
    assert_ended_together(tmp_path, signal.SIGINT)


def test_any_error_of_the_first_rank_is_told_to_all(monkeypatch):
    told = []
    monkeypatch.setattr('torch.distributed.broadcast_object_list', lambda made, src: told.extend(made))

    def full():
        raise OSError('disk full')

    with pytest.raises(OSError, match='disk full'):
        DataParallel(0, 2, 2).from_main(full)
    assert [type(error) for error in told] == [OSError]
