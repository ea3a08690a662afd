"""train.py: exit codes, plans, what nothing overwrites, and where output goes."""
import logging
import multiprocessing
import os
import subprocess
import sys
from types import SimpleNamespace

import gymnasium
import pytest
import torch
from trainings import PROJECT_ROOT, short_episodes, trained
from trainings import train as main

from lzero_kvcache import ConfigError
from lzero_kvcache.cli import commands
from lzero_kvcache.host.policies import UniZeroPolicy
from lzero_kvcache.training import make_plan
from lzero_kvcache.training.runner import claim_folder, remove_empty
from lzero_kvcache.training.terminal import Output

SMALL = ['--threads', '1', '--set', 'policy.num_simulations=3', 'policy.batch_size=8', 'env.collector_env_num=2',
         'env.evaluator_env_num=1']


# ---- usage -----------------------------------------------------------------------------------------------------------

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


# ---- plans -----------------------------------------------------------------------------------------------------------

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


# ---- folders ---------------------------------------------------------------------------------------------------------

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


# ---- output ----------------------------------------------------------------------------------------------------------

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
