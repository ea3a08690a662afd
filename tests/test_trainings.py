"""Real trainings of seconds: in either system, gone on with, evaluated, and logged by wandb."""
import contextlib
import json
import os
import re
import signal
import subprocess
import sys

import event_runs
import pytest
from small_models import ON_MAIN
from trainings import (
    ITERATIONS,
    PROJECT_ROOT,
    WM,
    import_what_trainings_import,
    scalars,
    short_episodes,
    summary_of,
    trained,
    when,
)
from trainings import SMALL as IN_A_FORK

from lzero_kvcache.summary import read_progress
from lzero_kvcache.training.checkpoints import read_checkpoint


def in_a_fork(folder, *arguments):
    """The exit code of a training of seconds, and what it printed."""
    import_what_trainings_import()
    (code, said), = trained(folder, [*IN_A_FORK, *arguments], short_episodes)
    return code, said


def assert_gone_on(folder, was, now, cache):
    """Steps, iterations and the optimizer's own count are those of both runs together."""
    assert now['cache'] == cache
    assert now['env_step'] > was['env_step']
    assert now['train_iter'] > was['train_iter']
    checkpoint = read_checkpoint(str(folder / now['checkpoint']))
    assert (checkpoint.env_step, checkpoint.train_iter) == (now['env_step'], now['train_iter'])
    steps = {int(state['step']) for state in checkpoint.state['optimizer_world_model']['state'].values()}
    assert steps == {now['train_iter']}


SAMPLED = """
from zoo.classic_control.pendulum.config.pendulum_cont_sampled_unizero_config import create_config, main_config

main_config.policy.model.num_of_sampled_actions = 4
main_config.policy.model.world_model_cfg.num_of_sampled_actions = 4
"""


@pytest.mark.slow
@pytest.mark.parametrize('config', ['config_old', pytest.param('sampled.py', marks=pytest.mark.skipif(
    ON_MAIN, reason="its old system cannot collect after it has evaluated"))])
def test_train_resume_in_either_system_and_evaluate(config, tmp_path):
    (tmp_path / 'sampled.py').write_text(SAMPLED)

    def run(name, cache, *arguments):
        code, said = in_a_fork(tmp_path, '--config', config, '--cache', cache, *arguments, '--exp-name', name)
        assert code == 0, said
        return summary_of(tmp_path / re.search(r' into (\S+)$', said, re.MULTILINE).group(1)), said

    first, said = run('a', 'old', '--max-train-iter', '2')
    assert 'INFO: Using OLD cache system (original implementation)' in said
    assert 'Cleared WorldModel past_kv_cache (OLD system).' in said
    assert first['cache'] == 'old'
    assert json.loads((tmp_path / 'a' / 'progress.json').read_text())['env_step'] == first['env_step']

    there = sorted(os.listdir(tmp_path))
    code, said = in_a_fork(tmp_path, '--config', config, '--resume', first['checkpoint'], '--exp-name', 'never',
                           '--max-train-iter', '9', '--set', 'policy.model.world_model_cfg.embed_dim=64')
    assert code == 2
    assert f'error: --resume {first["checkpoint"]}: the checkpoint is of another model: ' in said.splitlines()[-1]
    code, said = in_a_fork(tmp_path, '--config', config, '--eval', first['checkpoint'], '--exp-name', 'never',
                           '--set', 'policy.model.world_model_cfg.embed_dim=64')
    assert code == 2
    assert f'error: --eval {first["checkpoint"]}: the checkpoint is of another model: ' in said.splitlines()[-1]
    for key in ('policy.model_path', 'policy.learn.learner.hook.load_ckpt_before_run'):
        other = ['policy.model.world_model_cfg.embed_dim=64', f'+{key}={first["checkpoint"]}']
        code, said = in_a_fork(tmp_path, '--config', config, '--exp-name', 'never', '--set', *other)
        assert code == 2, said
        assert f'error: {key}={first["checkpoint"]}: the checkpoint is of another model: ' in said.splitlines()[-1]
    assert sorted(os.listdir(tmp_path)) == there

    evaluation = first['evaluations'][-1]
    assert evaluation['episodes'] == 1 and evaluation['deviation'] == 0
    assert first['versions'].keys() - {'commit'} == {'lzero_kvcache', 'LightZero', 'DI-engine', 'torch'}
    assert first['started'] <= first['ended']
    assert first['machine']['cpu']
    assert first['resumed_at'] == []

    second, said = run('b', 'new', '--resume', first['checkpoint'], '--max-train-iter', str(first['train_iter'] + 2))
    assert 'INFO: ✓ Using NEW KVCacheManager for cache management' in said
    assert 'no replay buffer' in said
    assert_gone_on(tmp_path, first, second, 'new')
    assert second['hit_rates']['total'] == 1
    assert second['resumed_at'] == [first['env_step']]
    points = scalars(tmp_path / 'b', 'kv_cache_iter/total_hit_rate')
    assert [point.step for point in points] == list(range(first['train_iter'], second['train_iter']))
    assert summary_of(tmp_path / 'a') == first

    third, said = run('b', 'old', '--resume', second['checkpoint'], '--max-train-iter', str(second['train_iter'] + 2))
    assert_gone_on(tmp_path, second, third, 'old')
    assert 'b is there already, so this run has another folder: b_' in said
    evaluated, said = run(str(tmp_path / 'e'), 'new', '--eval', third['checkpoint'])
    assert f"into {tmp_path / 'e'}" in said and evaluated['exp_name'] == str(tmp_path / 'e')  # as it was given
    assert evaluated['train_iter'] == third['train_iter']
    assert [evaluation['env_step'] for evaluation in evaluated['evaluations']] == [third['env_step']]
    assert evaluated['hit_rates']['init'] == 1


@pytest.mark.slow
@pytest.mark.parametrize('cache', ['old', 'new'])
def test_a_training_with_other_numbers_of_environments_than_the_policys(cache, tmp_path):
    """More of them, but for the main branch, which then fails in either system."""
    policy = 3 if ON_MAIN else 1
    code, said = in_a_fork(
        tmp_path, '--config', 'config_new', '--cache', cache, '--set', 'env.evaluator_env_num=2',
        f'policy.collector_env_num={policy}', f'policy.evaluator_env_num={policy}', f'{WM}.env_num=3')
    assert code == 0, said
    summary = summary_of(tmp_path / 'run')
    assert (summary['train_iter'], summary['evaluations'][0]['episodes']) == (ITERATIONS, 2)
    assert cache == 'old' or summary['hit_rates'] == dict(total=1., init=1., recur=1.)


@pytest.mark.slow
@pytest.mark.parametrize('frequency', [0, 1, 100])
def test_each_evaluation_of_a_run_in_place_is_in_its_files_and_its_summary_once(frequency, tmp_path):
    def assert_agreed():
        evaluations = summary_of(tmp_path / 'run')['evaluations']
        points = scalars(tmp_path / 'run', 'evaluator_iter/reward_mean')
        assert [(held['train_iter'], held['reward']) for held in evaluations] == [
            (point.step, pytest.approx(point.value)) for point in points]
        steps = [held['train_iter'] for held in evaluations]
        assert steps == sorted(set(steps))
        curve = event_runs.read(str(tmp_path / 'run'))[0].curves['evaluator_step/reward_mean']
        assert curve.steps.tolist() == [held['env_step'] for held in evaluations]
        return steps

    arguments = ['--config', 'config_new', '--set', f'policy.eval_freq={frequency}']
    code, said = in_a_fork(tmp_path, *arguments)
    assert code == 0, said
    assert assert_agreed() == [0, ITERATIONS]
    for iteration in (ITERATIONS, 0):
        options = IN_A_FORK[:IN_A_FORK.index('--exp-name')] + IN_A_FORK[IN_A_FORK.index('--set'):]
        (code, said), = trained(tmp_path, [
            *options, *arguments[2:], *arguments[:2], '--max-train-iter',
            str(iteration + ITERATIONS), '--resume', f'run/ckpt/iteration_{iteration}.pth.tar', '--in-place'],
            short_episodes)
        assert code == 0, said
        assert iteration in assert_agreed()


@pytest.mark.slow
def test_one_process_at_a_time_trains_in_a_folder_until_it_is_killed(tmp_path):
    """A killed one frees its folder at once, though it leaves the processes of its environments behind."""
    of_first = [{'create_config.env_manager.type=base': 'create_config.env_manager.type=subprocess'}.get(given, given)
                for given in [*IN_A_FORK, '--config', 'config_new']]
    of_first[of_first.index('--max-train-iter') + 1] = '100000'
    options = IN_A_FORK[:IN_A_FORK.index('--exp-name')] + IN_A_FORK[IN_A_FORK.index('--set'):]
    in_place = [*options, '--config', 'config_new', '--resume', 'run/ckpt/iteration_0.pth.tar', '--in-place',
                '--max-train-iter', str(ITERATIONS)]
    saved, events = tmp_path / 'run' / 'ckpt' / 'iteration_0.pth.tar', tmp_path / 'run' / 'log' / 'serial'
    import_what_trainings_import()
    first = subprocess.Popen([sys.executable, os.path.join(PROJECT_ROOT, 'train.py'), *of_first], cwd=str(tmp_path),
                             stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        when(lambda: saved.with_name('iteration_0.json').exists(), lambda: None).join()
        content, (points,) = saved.read_bytes(), events.iterdir()
        size = points.stat().st_size
        (code, said), = trained(tmp_path, in_place, short_episodes)
        assert code == 2
        assert said.splitlines()[1:] == [
            f'lzero-kvcache: error: run is being trained by process {first.pid}; wait for it, or end it']
        assert first.poll() is None and saved.read_bytes() == content
        assert list(events.iterdir()) == [points] and points.stat().st_size >= size
        first.kill()
        first.wait()
        killed = read_progress(str(tmp_path / 'run'))
        assert (killed['exit_code'], killed['outcome'], killed['collected_env_step'] > 0) == (None, '', True)
        assert [held['train_iter'] for held in killed['evaluations']] == [0]
        (code, said), = trained(tmp_path, in_place, short_episodes)
        assert code == 0, said
        assert saved.read_bytes() == content
        assert summary_of(tmp_path / 'run')['train_iter'] == ITERATIONS
        assert [point.step for point in scalars(tmp_path / 'run', 'kv_cache_iter/total_hit_rate')] == list(
            range(ITERATIONS))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize('cache', ['old', 'new'])
def test_wandb_offline_has_the_last_evaluation(cache, tmp_path):

    def prepare():
        short_episodes()
        os.environ['WANDB_MODE'] = 'offline'

    import_what_trainings_import()
    (code, said), = trained(
        tmp_path, [*IN_A_FORK, 'policy.use_wandb=True', '--config', 'config_new', '--cache', cache], prepare)
    assert code == 0, said
    summary = summary_of(tmp_path / 'run')
    assert summary['evaluations'][-1]['train_iter'] == summary['train_iter'] == ITERATIONS
    logged, = (tmp_path / 'wandb').glob('offline-run-*/*.wandb')
    points = list(wandb_points(logged))
    assert points[-1]['evaluator_step/reward_mean'] == summary['last_reward']
    # wandb's steps are LightZero's, environment steps: all updates after a collection are one point.
    collected = {point.step for point in scalars(tmp_path / 'run', 'kv_cache_step/total_hit_rate')}
    of_cache = [point for point in points if 'kv_cache_step/total_hit_rate' in point]
    assert [point['_step'] for point in of_cache] == sorted(collected)
    assert all('learner_step/lr' in point or 'learner_iter_vs_env_step' in point for point in of_cache)


def wandb_points(path):
    """What an offline run of wandb has logged."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore
    store = DataStore()
    store.open_for_scan(str(path))
    for data in iter(store.scan_data, None):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof('record_type') == 'history':
            yield {item.key or '/'.join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
