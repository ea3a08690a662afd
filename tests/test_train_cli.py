"""train.py: exit codes, where output goes, what nothing overwrites or tears, interrupts, and real trainings."""
import contextlib
import json
import logging
import multiprocessing
import os
import pickle
import pty
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import event_runs
import gymnasium
import pytest
import torch
from small_models import ON_MAIN
from torch import nn
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
from trainings import train as main

from lzero_kvcache import ConfigError
from lzero_kvcache.cli import commands
from lzero_kvcache.host import building
from lzero_kvcache.host.policies import UniZeroPolicy
from lzero_kvcache.host.states import fault_of_state
from lzero_kvcache.host.watched import restore
from lzero_kvcache.lock_files import check_not_trained_in, training_in
from lzero_kvcache.run_hooks import read_events
from lzero_kvcache.summary import (
    Evaluation,
    Result,
    Segment,
    read_progress,
    read_result,
    read_summary,
    reward_text,
    versions,
)
from lzero_kvcache.training import Plan, make_plan
from lzero_kvcache.training.checkpoints import STATE, Checkpoint, is_abandoned, read_checkpoint, save_atomically
from lzero_kvcache.training.error_hints import hint
from lzero_kvcache.training.past import Past
from lzero_kvcache.training.ranks import DataParallel
from lzero_kvcache.training.runner import Interrupted, _Training, claim_folder, remove_empty
from lzero_kvcache.training.terminal import Output
from lzero_kvcache.training.watch import Watch

SMALL = ['--threads', '1', '--set', 'policy.num_simulations=3', 'policy.batch_size=8', 'env.collector_env_num=2',
         'env.evaluator_env_num=1']


def a_watch(**options):
    """One of a result of its own."""
    result = Result(0, 'train', 'new', 0)
    return Watch(result, SimpleNamespace(line=print), DataParallel(), lambda: None, lambda path: None, **options)


# ---------------------------------------------------------------------------------------------------- usage


def test_a_run_that_is_refused_before_it_begins_leaves_nothing_behind(tmp_path):
    arguments = ['--config', 'config_new', *SMALL, 'policy.model.world_model_cfg.kv_cache_cfg.max_memory_mb=0.001']
    (code, said), = trained(tmp_path, [*arguments, '--exp-name', 'new/run'], short_episodes)
    assert code == 2
    assert 'max_memory_mb=0.001' in said.splitlines()[-1]
    assert [line.partition(':')[0] for line in said.splitlines()] == ['Config', 'lzero-kvcache']
    assert os.listdir(tmp_path) == ['printed0']


def test_wandb_without_a_login_is_refused(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('WANDB_MODE', 'WANDB_API_KEY'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('NETRC', str(tmp_path / 'netrc'))
    assert main(['--config', 'config_new', '--set', 'policy.use_wandb=True']) == 2
    error = capfd.readouterr().err
    assert 'run wandb login, or set WANDB_MODE=offline' in error
    assert error.count('\n') == 1


def test_a_mode_that_wandb_does_not_have_is_refused(tmp_path):

    def prepare():
        os.environ['WANDB_MODE'] = 'offlin'

    (code, said), = trained(tmp_path, ['--config', 'config_new', '--set', 'policy.use_wandb=True'], prepare)
    assert code == 2
    assert said.splitlines()[-1].endswith("(WANDB_MODE='offlin'): set WANDB_MODE=online or offline")


@pytest.mark.parametrize(('arguments', 'code', 'said'), [
    (['--help'], 0, 'It is Python code, and it will be run'), (['--version'], 0, 'lzero_kvcache 0.'),
    (['--colour'], 2, 'lzero-kvcache: error: '),
])
def test_what_needs_no_torch_is_answered_without_it(arguments, code, said, tmp_path):
    """Importing it takes seconds."""
    (tmp_path / 'torch.py').write_text('raise AssertionError')
    environment = dict(os.environ, PYTHONPATH=str(tmp_path))
    answer = subprocess.run([sys.executable, os.path.join(PROJECT_ROOT, 'train.py'), *arguments], cwd=str(tmp_path),
                            env=environment, encoding='utf-8', capture_output=True, check=False)
    assert answer.returncode == code
    assert said in ' '.join((answer.stdout + answer.stderr).split())


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_a_gpu_that_is_not_there():
    with pytest.raises(ConfigError, match='use --device cpu'):
        make_plan('config_new', device='cuda')


def test_an_error_of_the_environment_is_a_traceback_and_exit_code_1(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gymnasium, 'make', lambda *args, **kwargs: {}['the pole'])
    assert main(['--config', 'config_new']) == 1
    captured = capfd.readouterr()
    assert 'Traceback' in captured.err
    assert "KeyError: 'the pole'" in captured.err


def test_a_run_that_fails_before_it_begins_leaves_no_folder(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(UniZeroPolicy, '_init_learn', lambda self: {}['the optimizer'])
    assert main(['--config', 'config_old', '--exp-name', 'a/b']) == 1
    error = capfd.readouterr().err
    assert "KeyError: 'the optimizer'" in error and 'what led to it' not in error
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------- plans


def test_every_option_reaches_the_plan(monkeypatch):
    plans = []
    monkeypatch.setattr(commands, 'run_plan', lambda plan, *_: plans.append(plan) or SimpleNamespace(exit_code=0))
    assert main([
        '--config', 'config_new', '--cache', 'old', '--seed', '3', '--max-env-step', '2e3', '--max-train-iter', '7',
        '--device', 'cpu', '--resume', __file__, '--threads', '2', '--keep-checkpoints', '4', '--set',
        'policy.num_simulations=9', 'policy.batch_size=8', '--set', 'policy.td_steps=7']) == 0
    [plan] = plans
    assert (plan.seed, plan.max_env_step, plan.max_train_iter, plan.threads) == (3, 2000, 7, 2)
    assert (plan.task, plan.checkpoint, plan.in_place, plan.keep_checkpoints) == ('train', __file__, False, 4)
    policy = plan.main_config.policy
    assert (policy.num_simulations, policy.batch_size, policy.td_steps, policy.cuda) == (9, 8, 7, False)
    assert policy.model.world_model_cfg.use_new_cache_manager is False
    assert plan.main_config.exp_name.endswith('cartpole_old_seed3')


def test_in_place_is_in_the_checkpoints_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = make_plan('config_new', resume='runs/a/ckpt/ckpt_best.pth.tar', in_place=True, seed=3)
    assert plan.in_place
    assert plan.main_config.exp_name == str(tmp_path / 'runs' / 'a')
    assert not make_plan('config_new', resume='runs/a/ckpt/ckpt_best.pth.tar').in_place


# ---------------------------------------------------------------------------------------------------- what is written


def test_a_folder_is_never_claimed_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, made = zip(*(claim_folder(str(tmp_path / 'deep' / 'run')) for _ in range(4)))
    assert names[0] == os.path.join('deep', 'run')
    assert made == (['deep'], [], [], [])
    assert len(set(names)) == 4
    assert all(os.path.isdir(name) and not os.path.isabs(name) for name in names)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').write_text('')
    for name in ('file', 'file/run'):
        with pytest.raises(ConfigError, match='--exp-name'):
            claim_folder(str(tmp_path / name))
    assert os.listdir(tmp_path) == ['file']


def test_only_what_is_empty_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('shared/one', 'lone/deep'):
        os.makedirs(name)
    remove_empty(['shared', 'lone/deep', 'gone', 'lone'])
    assert os.listdir() == ['shared']


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    running, flushed = a_watch(keep_checkpoints=2), []
    writer = SimpleNamespace(flush=lambda: flushed.append(len(os.listdir(tmp_path))))
    running.learner = SimpleNamespace(tb_logger=writer)
    save = running.save
    for name, iteration in (('iteration_0', 0), ('ckpt_best', 0), ('iteration_9', 9), ('iteration_10', 10),
                            ('iteration_100', 100)):
        save(str(tmp_path / f'{name}.pth.tar'), {**dict.fromkeys(STATE, {}), 'last_iter': iteration})
    assert sorted(os.listdir(tmp_path)) == ['ckpt_best.pth.tar', 'iteration_10.pth.tar', 'iteration_100.pth.tar']
    assert flushed == [1, 2, 3, 4, 4]  # a training that is killed goes on from a checkpoint and the points before it


def test_any_error_of_the_first_rank_is_told_to_all(monkeypatch):
    told = []
    monkeypatch.setattr('torch.distributed.broadcast_object_list', lambda made, src: told.extend(made))

    def full():
        raise OSError('disk full')

    with pytest.raises(OSError, match='disk full'):
        DataParallel(0, 2, 2).from_main(full)
    assert [type(error) for error in told] == [OSError]


def test_a_failing_save_leaves_the_old_checkpoint(tmp_path):
    path = str(tmp_path / 'c.pth.tar')
    save_atomically({'a': 1}, path)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_atomically({'a': 2, 'unsaveable': lambda: None}, path)
    assert torch.load(path) == {'a': 1}
    assert os.listdir(tmp_path) == ['c.pth.tar']


class Payload:
    """Runs a command when it is unpickled carelessly."""

    def __reduce__(self):
        return os.mkdir, ('marker', )


@pytest.mark.parametrize('option', [
    ['--resume'], ['--eval'], ['--set', 'policy.model_path='],
    ['--set', 'policy.learn.learner.hook.load_ckpt_before_run='],
])
def test_a_checkpoint_runs_nothing_whichever_way_it_comes_in(option, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'model': Payload(), 'target_model': {}, 'optimizer_world_model': {}}, 'c.pth.tar')
    arguments = option + ['c.pth.tar'] if len(option) == 1 else ['--set', option[1] + 'c.pth.tar']
    assert main(['--config', 'config_new', *arguments]) == 2
    assert 'holds more than weights' in capfd.readouterr().err
    assert os.listdir(tmp_path) == ['c.pth.tar']


@pytest.mark.parametrize(('content', 'cut', 'message'), [
    ({'model': {}}, 0, 'no checkpoint of a UniZero training'),
    ([1, 2], 0, 'no checkpoint of a UniZero training'),
    ({'model': {}, 'target_model': {}, 'optimizer_world_model': {}}, 40, 'torn'),
])
def test_a_file_that_is_no_checkpoint(content, cut, message, tmp_path):
    path = tmp_path / 'c.pth.tar'
    torch.save(content, str(path))
    with open(path, 'r+b') as file:
        file.truncate(path.stat().st_size - cut)
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(str(path))


# ---------------------------------------------------------------------------------------------------- output


def _print_in_another_process():
    print('from a worker', flush=True)
    print('Cleared WorldModel in a worker', flush=True)


@pytest.mark.parametrize('verbose', [False, True])
def test_the_flood_goes_to_the_log_and_our_lines_to_the_terminal(verbose, capfd, tmp_path, monkeypatch):
    log = tmp_path / 'run' / 'log' / 'train.log'
    stdout = sys.stdout
    monkeypatch.setattr(logging.getLogger('lzero_kvcache'), 'level', logging.INFO)
    with Output(verbose) as output:
        print('before the folder is known')
        output.attach(str(log))
        print('Cleared World', end='')
        print('Model KV caches (NEW system).')
        print('flood', file=sys.stderr)
        os.write(1, b'from C\n')
        logging.getLogger('lzero_kvcache.cache.manager').info('✓ %s', 'message')
        logging.getLogger('lzero_kvcache.cache.manager').debug('a miss')
        logging.getLogger('ding').warning('someone else')
        worker = multiprocessing.get_context('fork').Process(target=_print_in_another_process)
        worker.start()
        worker.join()
        output.terminal.line('progress')
    assert sys.stdout is stdout
    written = log.read_text(encoding='utf-8')
    captured = capfd.readouterr()
    cleared = 'Cleared WorldModel KV caches (NEW system).'
    python_output = ['before the folder is known', cleared, 'flood', 'from a worker']
    assert all(line in written for line in python_output)
    if verbose:
        shown = captured.out + captured.err
        assert all(line in shown for line in [*python_output, 'from C', 'INFO: ✓ message', 'progress'])
    else:
        assert 'from C' in written
        assert captured.out == f'{cleared}\nINFO: ✓ message\nprogress\n'
        assert captured.err == ''


def test_a_log_file_is_added_to_and_not_replaced(tmp_path):
    log = tmp_path / 'train.log'
    log.write_text('earlier\n')
    with Output() as output:
        print('later')
        output.attach(str(log))
    assert log.read_text() == 'earlier\nlater\n'


# ---------------------------------------------------------------------------------------------------- interrupts


@pytest.fixture()
def a_run():
    return _Training(Plan('c', None, None, 'train_unizero'), SimpleNamespace(terminal=None), DataParallel())


def test_an_interrupt_waits_for_the_next_step_or_the_end_of_an_update(a_run):
    a_run.watch.phase = 'train'
    a_run._on_signal(signal.SIGINT, None)
    for leave in (a_run.ranks.in_collection, a_run.ranks.in_evaluation, a_run.ranks.after_update):
        with pytest.raises(Interrupted) as caught:
            leave()
        assert caught.value.signum == signal.SIGINT


def test_a_second_interrupt_waits_for_nothing_nor_does_one_before_the_training(a_run):
    with pytest.raises(Interrupted, match='SIGTERM'):
        a_run._on_signal(signal.SIGTERM, None)
    a_run.ranks.asked, a_run.watch.phase = None, 'train'
    a_run._on_signal(signal.SIGINT, None)
    with pytest.raises(Interrupted):
        a_run._on_signal(signal.SIGINT, None)
    a_run.result.outcome = 'done'
    a_run._on_signal(signal.SIGINT, None)


def test_an_interrupt_in_a_step_of_an_environment(a_run):
    """One that does not wait: DI-engine's environment manager retries, and raises an error of its own."""
    from ding.envs import BaseEnvManager

    class Env:
        def step(self, action):
            a_run._on_signal(signal.SIGINT, None)

    manager = BaseEnvManager.__new__(BaseEnvManager)
    manager._envs, manager._env_states, manager._step_timeout, manager._max_retry = [Env()], {}, None, 1
    assert a_run._interrupt(RuntimeError('it broke')) is None
    with pytest.raises(RuntimeError) as caught:
        manager._step(0, 1)
    assert a_run._interrupt(caught.value).signum == signal.SIGINT


# ---------------------------------------------------------------------------------------------------- hints


@pytest.mark.parametrize(('error', 'command'), [
    (ModuleNotFoundError("No module named 'cv2'", name='cv2'), "pip install 'opencv-python-headless<4.11'"),
    (ModuleNotFoundError("No module named 'Box2D.b2'", name='Box2D.b2'), 'pip install Box2D==2.3.10'),
    (ModuleNotFoundError("No module named 'xyz'", name='xyz'), "'xyz': put its folder on PYTHONPATH"),
    (AttributeError("module 'collections' has no attribute 'Mapping'"), 'pycolab 1.2 is older than Python 3.10'),
    (Exception('We\'re Unable to find the game "Pong". Note: Gym no longer distributes ROMs.'), 'ale-import-roms'),
])
def test_what_is_missing_comes_with_the_command_that_installs_it(error, command):
    assert command in hint(error)


@pytest.mark.parametrize(('saved', 'said'), [
    ([nn.Linear(2, 4), nn.Linear(4, 4)], ': 0.weight is [4, 2] in it, not [4, 3];'),
    ([nn.Linear(2, 5), nn.Linear(5, 4)], ': 0.weight is [5, 2] in it, not [4, 3], and 2 more;'),
    ([nn.Linear(3, 4), nn.ReLU()], ': 1.weight is not in it, and 1 more;'),
    ([nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)], ': 2.weight is only in it;'),
])
def test_a_checkpoint_of_another_model_says_the_first_difference(saved, said):
    with pytest.raises(RuntimeError) as caught:
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)).load_state_dict(nn.Sequential(*saved).state_dict())
    assert fault_of_state(caught.value) == (
        f'the checkpoint is of another model{said} use the config that it was trained with')


@pytest.mark.slow
@pytest.mark.parametrize('cache', ['old', 'new'])
def test_segments_that_are_too_short_for_their_targets(cache, tmp_path):
    arguments = ['policy.game_segment_length=3', '--config', 'config_new', '--cache', cache]
    (code, said), = trained(tmp_path, [*IN_A_FORK, *arguments], short_episodes)
    assert code == 2 and said.endswith(
        'error: policy.game_segment_length=3 is too short, since an episode had more than twice as many steps: it must '
        'be at least policy.num_unroll_steps + policy.td_steps=10\n'), said


def test_a_compiled_model_is_told_of_by_the_names_of_its_parameters():
    with pytest.raises(RuntimeError) as caught:
        torch.compile(nn.Linear(3, 4)).load_state_dict(torch.compile(nn.Linear(2, 4)).state_dict())
    assert ': weight is [4, 2] in it, not [4, 3];' in fault_of_state(caught.value)


def test_an_optimizer_of_another_model():
    parameters = list(nn.Linear(3, 4).parameters())
    with pytest.raises(ValueError) as caught:
        torch.optim.Adam(parameters).load_state_dict(torch.optim.Adam(parameters[:1]).state_dict())
    assert fault_of_state(caught.value) == (
        'the checkpoint is of another model; use the config that it was trained with')


def test_an_evaluation_is_a_mean_with_its_deviation():
    assert reward_text(Evaluation(10, 2, 57.3, 4.1, 8)) == '57.3 ± 4.1 over 8 episodes'
    assert reward_text(Evaluation(10, 2, 57.3)) == reward_text(Evaluation(10, 2, 57.3, 0., 1)) == '57.3'


@pytest.mark.parametrize(('held', 'said'), [
    (dict(env_step=280, collected_env_step=300, max_env_step=600, env_steps_per_second=10., best_reward=12.,
          loss=0.51234, device='cpu'),
     'collect  280+20/600 (50%), 0:00:30 left  reward -, best 12.0  loss 0.512  hit rate -  10.0 steps/s on cpu'),
    (dict(env_step=650, collected_env_step=650, max_env_step=600), 'collect  650+0/600 (100%)  reward -, best -'),
    (dict(env_step=5, collected_env_step=5), 'collect  5+0  reward -'),
    (dict(env_step=200, collected_env_step=200, max_env_step=8000, train_iter=20, max_train_iter=50,
          env_steps_per_second=10.), 'collect  200+0/500 (40%), 0:00:30 left'),  # the iterations end it
    (dict(env_step=0, collected_env_step=20, max_train_iter=50), 'collect  0+20  reward -'),
    (dict(env_step=80, collected_env_step=80, train_iter=60, max_train_iter=50), 'collect  80+0/80 (100%)'),
])
def test_progress_says_how_much_is_done_and_left(held, said):
    assert Result(0, 'train', 'new', 0, **held).line('collect').startswith(said)


def test_a_line_says_that_a_run_finishes_what_it_began(a_run, tmp_path, monkeypatch):
    """Once, at the end of the collection that reaches the last step."""
    monkeypatch.chdir(tmp_path)
    lines = []
    a_run.terminal, a_run._bar = SimpleNamespace(line=lines.append), SimpleNamespace(update=lambda *shown: None)
    a_run.result.max_env_step, a_run.watch.collector = 60, SimpleNamespace(envstep=40)
    a_run.watch.learner, a_run.watch.phase = SimpleNamespace(train_iter=4), 'collect'
    for steps in (40, 66, 66):
        a_run.watch.collector.envstep = steps
        a_run._refresh(now=True)
    assert lines == ['66 env steps are collected: finishing the updates that go with them']


@pytest.mark.skipif(not os.path.exists(os.path.join(PROJECT_ROOT, '.git')), reason='this is no clone')
def test_a_run_says_of_which_commit_it_is():
    head = subprocess.run(['git', '-C', PROJECT_ROOT, 'rev-parse', 'HEAD'], capture_output=True, encoding='utf-8')
    assert head.stdout.startswith(versions()['commit'].replace('-dirty', ''))


def test_other_errors_are_not_explained_away():
    assert hint(ValueError('the ROM of my heart')) is None


# ---------------------------------------------------------------------------------------------------- real trainings


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
    assert first['started'] < first['ended']
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
def test_ctrl_c_on_a_terminal_leaves_a_whole_checkpoint(tmp_path):
    """It goes to the environments' processes as well."""
    terminal, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, os.path.join(PROJECT_ROOT, 'train.py'), '--config', 'config_new', '--exp-name', 'a', *SMALL,
         'create_config.env_manager.type=subprocess'],
        cwd=str(tmp_path), stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    shown = b''
    deadline = time.monotonic() + 300
    interrupted = False
    while time.monotonic() < deadline:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not interrupted and b'Cleared WorldModel' in shown and b'train  ' in shown.rsplit(b'Cleared', 1)[1]:
            os.killpg(process.pid, signal.SIGINT)
            interrupted = True
    assert process.wait(timeout=120) == 130
    text = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', shown.decode('utf-8'))
    assert 'interrupted by SIGINT' in text
    assert 'Traceback' not in text
    assert 'DeprecationWarning' not in text  # of the libraries, as all that is not ours
    assert 'DeprecationWarning' in (tmp_path / 'a' / 'log' / 'train.log').read_text(encoding='utf-8')
    summary = summary_of(tmp_path / 'a')
    checkpoint = read_checkpoint(str(tmp_path / summary['checkpoint']))
    assert checkpoint.train_iter == summary['train_iter'] > 0
    assert checkpoint.env_step == summary['env_step'] > 0
    assert summary['collected_env_step'] >= summary['env_step']
    assert not [name for name in os.listdir(tmp_path / 'a' / 'ckpt') if name.endswith('.tmp')]


@pytest.mark.parametrize('best', [None, 17.])
def test_a_training_in_place_replaces_only_what_it_betters_and_is_evaluated_at_its_end(best, monkeypatch):
    running = a_watch()
    last_iter, evaluations = SimpleNamespace(update=lambda value: None), []
    policy = SimpleNamespace(load_state_dict=lambda state: None)
    running.learner = SimpleNamespace(policy=policy, last_iter=last_iter, train_iter=5, save_checkpoint=None)
    running.collector = SimpleNamespace(envstep=50)
    running.evaluator = SimpleNamespace(_max_episode_return=float('-inf'),
                                        eval=lambda *arguments: evaluations.append(arguments))
    running.checkpoint, running.past = Checkpoint({}, 5, 50), Past(best_reward=best)
    restore(running)
    assert running.evaluator._max_episode_return == (float('-inf') if best is None else best)
    assert running.checkpoint is None  # as large as the model and its optimizer, for as long as the training lasts
    running.evaluate_last()
    assert evaluations == ([] if best is None else [(None, 5, 50)])


def test_what_was_collected_never_goes_back():
    """Also if a collection is cut off, whose steps no checkpoint counts."""
    running = a_watch()
    running.learner, running.collector = SimpleNamespace(train_iter=3), SimpleNamespace(envstep=100)
    running.phase = 'collect'
    for envstep, under_way, expected in ((100, 30, (100, 130)), (100, 0, (100, 130)), (160, 0, (160, 160))):
        running.collector.envstep, running.under_way = envstep, under_way
        running.look()
        assert (running.result.env_step, running.result.collected_env_step) == expected


def test_what_other_processes_collect_counts_when_it_is_known():
    """They collect less than this one, or more."""
    running = a_watch()
    running.ranks = DataParallel(0, 2, 2)
    running.learner, running.collector = SimpleNamespace(train_iter=3), SimpleNamespace(envstep=100)
    running.phase, shown = 'collect', []
    for envstep, under_way in ((100, 0), (100, 30), (135, 0), (135, 20), (195, 0)):
        running.collector.envstep, running.under_way = envstep, under_way
        running.look()
        shown.append(running.result.collected_env_step)
    assert shown == [100, 130, 135, 155, 195]


def test_a_run_that_goes_on_has_not_ended(a_run, tmp_path, monkeypatch):
    """Whether it is killed is seen by nobody; its evaluations are written down by then."""
    monkeypatch.chdir(tmp_path)
    a_run.terminal, a_run._bar = SimpleNamespace(line=print), SimpleNamespace(update=lambda *shown: None)
    a_run.watch.terminal, a_run.result.exp_name = a_run.terminal, str(tmp_path)
    a_run.watch.evaluated(Evaluation(40, 4, 20., 1., 8))
    a_run._refresh(now=True)
    progress = read_progress(str(tmp_path))
    assert (progress['exit_code'], progress['outcome']) == (None, '')
    assert progress['evaluations'] == [dict(env_step=40, train_iter=4, reward=20., deviation=1., episodes=8)]
    a_run._note(str(tmp_path / 'c.pth.tar'))
    assert read_result(str(tmp_path / 'c.json')).exit_code is None


def test_a_checkpoint_is_not_saved_anew_where_a_run_goes_on_from_it(tmp_path, monkeypatch):
    """But for the best one, if there is a better one."""
    monkeypatch.chdir(tmp_path)
    running = a_watch()
    running.learner = SimpleNamespace(tb_logger=SimpleNamespace(flush=lambda: None))
    save = running.save
    for name in ('iteration_5', 'ckpt_best'):
        save(f'./{name}.pth.tar', dict(last_iter=5, weights=1))
        running.past = Past((str(tmp_path / f'{name}.pth.tar'), 5))
        save(f'./{name}.pth.tar', dict(last_iter=5, weights=2))
        assert torch.load(f'{name}.pth.tar')['weights'] == 1
        save(f'./{name}.pth.tar', dict(last_iter=6, weights=3))
        assert torch.load(f'{name}.pth.tar')['weights'] == 3


def a_run_in_place(tmp_path, monkeypatch, *, ended=None, progress=None, noted=None, config=None):
    """One that is about to go on from iteration 5, with what is there of its past, and the lines that it shows."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'runs' / 'a' / 'ckpt' / 'c.pth.tar'
    path.parent.mkdir(parents=True)
    torch.save(dict(model={}, target_model={}, optimizer_world_model={}, last_iter=5, last_step=50), str(path))
    if ended is not None:
        replace(ended, exp_name='runs/a').write()
    if progress is not None:
        Result(0, 'train', progress, 0, exp_name='runs/a', collected_env_step=90).write_progress('train')
    if noted is not None:
        noted.write(str(path.with_name('c.json')))
    if config is not None:
        (tmp_path / 'runs' / 'a' / 'total_config.py').write_text(f'exp_config = {config}')
    plan = make_plan('config_new', resume=str(path), in_place=True)
    run = _Training(plan, SimpleNamespace(terminal=SimpleNamespace(shown=[]), attach=lambda path: None), DataParallel())
    run.terminal.line = run.terminal.shown.append
    monkeypatch.setattr(building, 'try_policy', lambda *args: None)  # it is the checkpoint of no model
    run._check()
    return run


@pytest.mark.parametrize('ended', [
    dict(ended=Result(130, 'train', 'old', 0)), dict(progress='old'),
    dict(config={'policy': {'model': {'world_model_cfg': {'context_length': 8}}}}),  # of LightZero's own entry
])
def test_a_folder_of_the_other_system_is_not_gone_on_in(ended, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="runs/a was trained with cache system 'old', not 'new'"):
        a_run_in_place(tmp_path, monkeypatch, **ended)


@pytest.mark.parametrize('way', ['--eval {}', '--resume {}', '--set +policy.model_path={}',
                                 '--set +policy.learn.learner.hook.load_ckpt_before_run={}'])
def test_a_checkpoint_of_another_model_is_named_with_its_option(way, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(model={}, target_model={}, optimizer_world_model={}), 'other')
    assert main(['--config', 'config_new', *way.format('other').split()]) == 2
    error = capfd.readouterr().err
    source = way.format('other').replace('--set +', '')
    assert error.startswith(f'lzero-kvcache: error: {source}: the checkpoint is of another model: ')
    assert error.count('\n') == 1 and os.listdir() == ['other']


def test_a_folder_that_a_refused_run_would_go_on_in_stays_as_it_is(capfd, tmp_path, monkeypatch):
    a_run_in_place(tmp_path, monkeypatch, ended=noted(30.))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    assert main(['--config', 'config_new', '--resume', 'runs/a/ckpt/c.pth.tar', '--in-place']) == 2
    captured = capfd.readouterr()
    assert re.fullmatch(r'Config: .*\n', captured.out) and 'the checkpoint is of another model' in captured.err
    assert captured.err.count('\n') == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before


def test_a_folder_that_another_training_holds_stays_as_it_is(capfd, tmp_path, monkeypatch):
    """Whichever of the two began first; the other one's end frees it."""
    a_run_in_place(tmp_path, monkeypatch, ended=noted(30.))
    event_runs.write_events(tmp_path / 'runs' / 'a' / 'log' / 'serial', [(1, 9, 'learner_iter/loss', 1.)])
    in_place = ['--config', 'config_new', '--resume', 'runs/a/ckpt/c.pth.tar', '--in-place']
    with training_in('runs/a', 'runs/a'):
        before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
        assert main(in_place) == 2
        assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before
    assert capfd.readouterr().err == (
        f'lzero-kvcache: error: runs/a is being trained by process {os.getpid()}; wait for it, or end it\n')
    run = _Training(make_plan('config_new', resume=in_place[3], in_place=True), SimpleNamespace(
        terminal=SimpleNamespace(line=print), attach=lambda path: None), DataParallel())
    run._check()
    with training_in('runs/a', 'runs/a'), pytest.raises(ConfigError, match='runs/a is being trained by process'):
        run._make_folder()
    with run._holding:
        run._make_folder()
        with pytest.raises(ConfigError, match='runs/a is being trained by process'):
            check_not_trained_in('runs/a', 'runs/a')
    check_not_trained_in('runs/a', 'runs/a')


def test_the_first_rank_alone_holds_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = DataParallel(1, 2, 2)
    for name in ('join', 'share_out'):
        monkeypatch.setattr(DataParallel, name, lambda *args: None)
    monkeypatch.setattr(DataParallel, 'from_main', lambda self, make: make() if self.main else 'run')
    output = SimpleNamespace(terminal=None, attach=lambda path: None)
    plan = make_plan('config_new', exp_name='run')
    first, second = (_Training(plan, output, ranks) for ranks in (DataParallel(0, 2, 2), others))
    with first._holding:
        first._make_folder()
        second._make_folder()
        assert os.path.exists('run/train.lock')


def noted(seconds, **more):
    return Result(0, 'train', 'new', 0, seconds=seconds, train_iter=5, env_step=50, **more)


@pytest.mark.parametrize(('ended', 'seconds'), [
    (Result(130, 'train', 'new', 0, seconds=30., train_iter=5, env_step=50, best_reward=20.), 30.),  # it ended there
    (Result(130, 'train', 'new', 0, seconds=99., train_iter=9, best_reward=20.), 12.),  # it went on, and came back
    (Result(130, 'train', 'new', 0, seconds=99., train_iter=5, env_step=60, best_reward=20.), 12.),  # it collected more
    (None, 12.),  # it was killed
])
def test_what_came_after_the_checkpoint_adds_nothing(ended, seconds, tmp_path, monkeypatch):
    """Neither time nor counts; its best reward stays what a better one must surpass."""
    run = a_run_in_place(tmp_path, monkeypatch, ended=ended, noted=noted(12., best_reward=15.))
    run._make_folder()
    assert run.watch.past.result.seconds == seconds
    assert (run.result.env_step, run.result.collected_env_step) == (50, 50)
    assert run.watch.past.best_reward == (15. if ended is None else 20.)
    run.watch.terminal, run.watch.on_change = SimpleNamespace(line=print), lambda: None
    run.watch.evaluated(Evaluation(60, 6, 10.))
    assert run.result.best_reward == run.watch.past.result.best_reward  # as the bar and the summary say


def test_a_checkpoint_of_an_earlier_version_has_no_note(tmp_path, monkeypatch):
    run = a_run_in_place(tmp_path, monkeypatch, ended=Result(130, 'train', 'new', 0, seconds=99., train_iter=9))
    run._make_folder()
    assert run.watch.past.result is None


@pytest.mark.parametrize('other', [dict(train_iter=9), dict(env_step=90)])
def test_a_note_of_another_state_is_not_that_of_the_checkpoint(other, tmp_path, monkeypatch):
    run = a_run_in_place(tmp_path, monkeypatch, noted=replace(noted(30., best_reward=7.), **other))
    run._make_folder()
    assert run.watch.past.result is None and run.result.best_reward is None
    assert run.watch.past.best_reward == 7.
    assert run.terminal.shown == [
        'Nothing says what this training had taken at its checkpoint: summary.json will have the time, the counts and '
        'the evaluations from here on']


def test_the_best_checkpoint_of_lightzeros_own_entry_is_replaced_by_a_better_one_alone(tmp_path, monkeypatch):
    """Nothing but its event files has the rewards, those after the checkpoint among them."""
    event_runs.write_events(tmp_path / 'runs' / 'a' / 'log' / 'serial', [
        (index, step, f'evaluator_{kind}/reward_mean', reward) for index, (at, reward) in enumerate([
            ((0, 0), 5.), ((40, 3), 41.), ((90, 9), 60.)]) for kind, step in zip(('step', 'iter'), at)])
    run = a_run_in_place(tmp_path, monkeypatch)
    run._make_folder()
    assert run.watch.past.best_reward == 60.


@pytest.mark.parametrize('before', [20, 50])
def test_an_evaluation_that_nobody_noted_comes_again_if_it_may_come_after_the_checkpoint(before, tmp_path, monkeypatch):
    """As a part that is killed soon after it went on leaves it; one of fewer steps comes before, and stays."""
    event_runs.write_events(tmp_path / 'runs' / 'a' / 'log' / 'serial', [
        (0, at, f'evaluator_{axis}/reward_mean', 9.) for axis, at in (('iter', 5), ('step', before))])
    run = a_run_in_place(tmp_path, monkeypatch, noted=noted(9.))
    run._make_folder()
    assert run.watch.past.evaluated_at == (5 if before == 20 else None)
    assert len(read_events('runs/a/log/serial').evaluations) == (before == 20)
    assert run.watch.past.best_reward == 9.


def test_nothing_goes_on_from_what_was_abandoned(capfd, tmp_path, monkeypatch):
    """In its own folder, where branches would blend; also from a checkpoint beside which nothing was noted."""
    run = a_run_in_place(tmp_path, monkeypatch, noted=noted(9.))
    counts = dict(iteration_4=4, iteration_9=9, iteration_20=20)
    paths = [f'runs/a/ckpt/{name}.pth.tar' for name in counts]
    for path, train_iter in zip(paths, counts.values()):
        torch.save(dict(model={}, target_model={}, optimizer_world_model={}, last_iter=train_iter), path)
    replace(noted(20.), train_iter=9).write('runs/a/ckpt/iteration_9.json')
    with run._holding:
        run._make_folder()
    assert [is_abandoned(path) for path in paths] == [False, True, True]
    assert read_result('runs/a/ckpt/iteration_9.json').seconds == 20
    for path in paths[1:]:
        capfd.readouterr()
        assert main(['--config', 'config_new', '--resume', path, '--in-place']) == 2
        assert capfd.readouterr().err == (
            f'lzero-kvcache: error: --in-place: {path} is of a part that was abandoned when the training went on from '
            'an earlier one; give --exp-name in its place, and the training goes on in a folder of its own\n')
    run._bar = SimpleNamespace(update=lambda *shown: None)
    run._note(str(tmp_path / paths[1]))  # the part that goes on has come there too
    assert not is_abandoned(paths[1])


def test_a_summary_of_its_past_is_not_that_of_a_run_that_goes_on(tmp_path, monkeypatch):
    """It would be taken for the whole, if the run was killed; it is kept beside the checkpoint."""
    run = a_run_in_place(tmp_path, monkeypatch, ended=noted(30.), progress='new')
    run._make_folder()
    assert read_summary('runs/a') is None and read_progress('runs/a') == {}
    assert read_result('runs/a/ckpt/c.json').seconds == 30


@pytest.mark.parametrize(('past', 'kept'), [
    (dict(noted=dict(run_id='a')), 'a'), (dict(ended=dict(run_id='a')), 'a'), (dict(noted={}), '')])
def test_a_training_has_one_id_for_all_of_its_parts(past, kept, tmp_path, monkeypatch):
    """And none, if it was begun by a version that gave none."""
    run = a_run_in_place(tmp_path, monkeypatch, **{name: noted(9., **held) for name, held in past.items()})
    other = run.result.run_id
    run._make_folder()
    assert run._completed({}).run_id == read_result('runs/a/ckpt/c.json').run_id == kept != other


def test_checkpoints_that_it_abandons_are_told_of(tmp_path, monkeypatch):
    run = a_run_in_place(tmp_path, monkeypatch, noted=noted(9.))
    for name, train_iter in (('before', 4), ('iteration_9', 9), ('ckpt_best', 7)):
        path = tmp_path / 'runs' / 'a' / 'ckpt' / f'{name}.pth.tar'
        path.write_text('')
        os.utime(path, (train_iter, train_iter))
        replace(noted(20.), train_iter=train_iter).write(str(path.with_name(f'{name}.json')))
    run._make_folder()
    assert run.terminal.shown == [
        'ckpt_best.pth.tar, iteration_9.pth.tar: of the part after the checkpoint, abandoned, not removed']


def test_speed_is_that_of_all_parts_wherever_it_is_shown(tmp_path, monkeypatch):
    run = a_run_in_place(tmp_path, monkeypatch, noted=noted(1000., env_steps_per_second=2.))
    run._make_folder()
    lines, moment = [], run._started + 1000.
    monkeypatch.setattr('lzero_kvcache.training.runner.time.monotonic', lambda: moment)
    run._bar = SimpleNamespace(update=lambda done, text, total: lines.append(text))
    run.result.collected_env_step = 50 + 6000
    run._refresh(now=True)
    assert '  4.0 steps/s' in lines[-1]
    assert run._completed({}).env_steps_per_second == read_progress('runs/a')['env_steps_per_second'] == 4.


def test_a_run_that_is_killed_as_it_goes_on_leaves_a_record(tmp_path, monkeypatch):
    """With what each part was started with; its summary would only come at its end."""
    before = noted(9., command=['a'], overrides=['a=1'], resumed_at=[20], env_steps_per_second=2.)
    run = a_run_in_place(tmp_path, monkeypatch, ended=before)
    run._make_folder()
    run._announce()
    run._bar = SimpleNamespace(update=lambda *shown: None)
    run._refresh(now=True)
    event_runs.write_events(tmp_path / 'runs' / 'a' / 'log' / 'serial', [(1, 0, 'learner_iter/loss', 1.)])
    read, = event_runs.read('runs/a')
    assert [part['command'] for part in read.parts] == [['a'], run.result.command]
    assert read.summary['resumed_at'] == [20, 50] and read.summary['seconds'] > 9
    told = ' '.join(warning.text for warning in event_runs.compared('runs/a').warnings)
    assert 'it went on from a checkpoint at 20; it was killed, or failed, or is not done yet' in told


def test_a_training_whose_learner_loads_a_checkpoint_says_that_its_buffer_is_empty():
    plan, lines = make_plan('config_new', overrides=['+policy.learn.learner.hook.load_ckpt_before_run=a.pth.tar']), []
    _Training(plan, SimpleNamespace(terminal=SimpleNamespace(line=lines.append)), DataParallel())._announce()
    assert lines[-1].startswith(
        'Going on from a.pth.tar (policy.learn.learner.hook.load_ckpt_before_run). A checkpoint holds no replay buffer')


def test_a_run_that_goes_on_keeps_what_each_part_was_started_with(tmp_path, monkeypatch):
    """Through the files that it leaves."""
    run = a_run_in_place(tmp_path, monkeypatch, noted=noted(
        9., command=['b'], overrides=['b=2'], earlier=[Segment(['a'], ['a=1'])]))
    run._make_folder()
    run._completed({}).write()
    assert read_summary('runs/a').earlier == [Segment(['a'], ['a=1']), Segment(['b'], ['b=2'])]


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
