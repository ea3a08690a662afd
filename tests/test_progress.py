"""A run while it goes on: how it is interrupted, and what it counts and shows."""
import os
import pty
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from fake_runs import a_watch
from trainings import PROJECT_ROOT, summary_of

from lzero_kvcache.host.watched import _watched_collector
from lzero_kvcache.summary import Evaluation, Result, read_progress, read_result, reward_text, versions
from lzero_kvcache.training import Plan
from lzero_kvcache.training.checkpoints import read_checkpoint
from lzero_kvcache.training.ranks import DataParallel
from lzero_kvcache.training.runner import Interrupted, _Training
from lzero_kvcache.training.terminal import summary_rows


@pytest.fixture()
def a_run():
    return _Training(Plan('c', None, None, 'train_unizero'), SimpleNamespace(terminal=None), DataParallel())


# ---- interrupts ------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(('phase', 'counted'), [('collect', 40), ('train', 40), ('evaluate', 66)])
def test_a_collection_whose_last_updates_are_cut_off_is_not_trained_on(phase, counted, a_run):
    """From a checkpoint that had all steps nothing could go on. The last evaluation comes after all updates."""
    watch = a_run.watch
    base = type('Base', (), {'reset_policy': None, 'envstep': property(lambda self: self._total_envstep_count)})
    watch.collector = _watched_collector(watch, base)()
    watch.collector._begun_at, watch.collector._total_envstep_count = 40, 66
    watch.learner, watch.phase = SimpleNamespace(train_iter=4), phase
    watch.cut_off(67)
    assert watch.collector.envstep == 66  # these were no last updates
    watch.cut_off(60)
    watch.look()
    assert (watch.result.env_step, watch.result.collected_env_step) == (counted, 66)


def test_a_run_that_is_cut_off_before_it_collects_has_nothing_to_take_back(a_run):
    """An evaluation, or a training from a checkpoint that has all steps."""
    watch = a_run.watch
    watch.result.env_step, watch.phase = 70, 'start'
    assert watch.collector is None
    watch.cut_off(60)
    assert watch.result.env_step == 70


def test_a_run_without_an_evaluation_is_told_how_to_have_one_if_it_is_a_training(a_run):
    for task, said in (('train', '- (no evaluation yet; policy.eval_freq says how often)'), ('evaluate', '-')):
        a_run.result.task = task
        assert dict(summary_rows(a_run.result))['last reward'] == said


SMALL = ['--threads', '1', '--set', 'policy.num_simulations=3', 'policy.batch_size=8', 'env.collector_env_num=2',
         'env.evaluator_env_num=1']


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


# ---- counts and lines ------------------------------------------------------------------------------------------------

def test_an_evaluation_is_a_mean_with_its_deviation():
    assert reward_text(Evaluation(10, 2, 57.3, 4.1, 8)) == '57.3 ± 4.1 over 8 episodes'
    assert reward_text(Evaluation(10, 2, 57.3)) == reward_text(Evaluation(10, 2, 57.3, 0., 1)) == '57.3'


@pytest.mark.parametrize(('held', 'said'), [
    (dict(env_step=280, collected_env_step=300, max_env_step=600, env_steps_per_second=10., best_reward=12.,
          loss=0.51234, device='cpu'),
     'collect  280+20/600 (50%), 0:30 left  reward -, best 12.0  loss 0.512  hit rate -  10.0 steps/s on cpu'),
    (dict(env_step=650, collected_env_step=650, max_env_step=600), 'collect  650+0/600 (100%)  reward -, best -'),
    (dict(env_step=650, collected_env_step=650, max_env_step=600, env_steps_per_second=10.),
     'collect  650+0/600 (100%)  reward -, best -'),
    (dict(env_step=5, collected_env_step=5), 'collect  5+0  reward -'),
    (dict(env_step=200, collected_env_step=200, max_env_step=8000, train_iter=20, max_train_iter=50,
          env_steps_per_second=10.), 'collect  200+0/500 (40%), 0:30 left'),  # the iterations end it
    (dict(env_step=0, collected_env_step=20, max_train_iter=50), 'collect  0+20  reward -'),
    (dict(env_step=80, collected_env_step=80, train_iter=60, max_train_iter=50), 'collect  80+0/80 (100%)'),
])
def test_progress_says_how_much_is_done_and_left(held, said):
    assert Result(0, 'train', 'new', 0, **held).line('collect').startswith(said)


def test_no_time_is_said_to_be_left_while_the_last_updates_are_made():
    result = Result(0, 'train', 'new', 0, env_step=650, collected_env_step=650, max_env_step=600,
                    env_steps_per_second=10.)
    assert result.line('train').startswith('train    650+0/600 (100%), the last updates  reward')


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
