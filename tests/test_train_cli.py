"""train.py: exit codes, where output goes, what nothing overwrites or tears, interrupts, and real trainings."""
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
from types import SimpleNamespace

import gymnasium
import pytest
import torch

from lzero_kvcache import ConfigError
from lzero_kvcache.training import lightzero
from lzero_kvcache.training.checkpoints import Checkpoint, read_checkpoint, save_atomically
from lzero_kvcache.training.cli import build_parser, main, make_plan
from lzero_kvcache.training.config_file import PROJECT_ROOT
from lzero_kvcache.training.mending import mend
from lzero_kvcache.training.output import Output
from lzero_kvcache.training.runner import Interrupted, Plan, _Run, claim_folder
from lzero_kvcache.training.status import Status
from lzero_kvcache.training.terminal import Terminal

SMALL = ['--threads', '1', '--set', 'policy.num_simulations=3', 'policy.batch_size=8', 'env.collector_env_num=2',
         'env.evaluator_env_num=1']


def plan_of(*arguments):
    return make_plan(build_parser().parse_args(['--config', 'config_new', *arguments]))


# ---------------------------------------------------------------------------------------------------- usage


@pytest.mark.parametrize(('arguments', 'message'), [
    ([], '--config'),
    (['--config', 'nosuch'], 'nosuch: no such file'),
    (['--config', 'config_new', '--colour'], '--colour'),
    (['--config', 'config_new', '--cache', 'both'], "'both'"),
    (['--config', 'config_new', '--max-env-step', '0'], "'0' is not a whole number of at least 1"),
    (['--config', 'config_new', '--max-env-step', '1.5'], "'1.5' is not a whole number"),
    (['--config', 'config_new', '--set', 'policy.num_simulatons=1'], "did you mean 'policy.num_simulations'"),
    (['--config', 'config_new', '--set', 'policy.model.world_model_cfg.context_length=7'], 'context_length=7'),
    (['--config', 'config_new', '--set', 'policy.mcts_ctree=False'], 'policy.mcts_ctree=False cannot work'),
    (['--config', 'config_old', '--set', 'policy.mcts_ctree=False'], 'policy.mcts_ctree=False cannot work'),
    (['--config', 'config_new', '--set', 'policy.random_collect_episode_num=2'],
     'policy.random_collect_episode_num=2 cannot work'),
    (['--config', 'config_old', '--set', 'policy.random_collect_episode_num=2'],
     'policy.random_collect_episode_num=2 cannot work'),
    (['--config', 'config_new', '--set', 'policy.model_path=nosuch.pth.tar'], 'nosuch.pth.tar: no such checkpoint'),
    (['--config', 'config_new', '--resume', 'nosuch.pth.tar'], 'nosuch.pth.tar: no such checkpoint'),
    (['--config', 'config_new', '--resume', 'a', '--eval', 'b'], 'not allowed with'),
    (['--config', 'config_new', '--in-place'], 'give that, and no --exp-name'),
    (['--config', 'config_new', '--in-place', '--resume', 'a/ckpt/b', '--exp-name', 'c'], 'and no --exp-name'),
    (['--config', 'config_new', '--in-place', '--resume', 'a/b.pth.tar'], 'a/b.pth.tar is in no folder ckpt'),
])
def test_bad_usage_is_one_line_and_exit_code_2(arguments, message, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capfd.readouterr()
    assert message in captured.err
    assert captured.err.count('\n') == 1
    assert captured.out == ''
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_a_gpu_that_is_not_there(capfd):
    assert main(['--config', 'config_new', '--device', 'cuda']) == 2
    assert 'use --device cpu' in capfd.readouterr().err


def test_an_environment_that_is_not_there_is_one_line(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['--config', 'config_new', '--set', 'env.env_id=NoSuchPole-v0']) == 2
    line = capfd.readouterr().err
    assert line.count('\n') == 1
    assert 'env.env_id: Environment `NoSuchPole`' in line


@pytest.mark.parametrize(('change', 'message'), [
    ('create_config.env.type=cartpole_lightzer', "create_config.env.type='cartpole_lightzer' is registered by none"),
    ('+policy.model.type=UniZeroModl', "policy.model.type='UniZeroModl' is registered by none"),
])
def test_a_name_that_nobody_registered_is_one_line(change, message, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['--config', 'config_new', '--set', change]) == 2
    line = capfd.readouterr().err
    assert line.count('\n') == 1
    assert message in line
    assert 'did you mean' in line
    assert os.listdir(tmp_path) == []


def test_an_error_of_the_environment_is_a_traceback_and_exit_code_1(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gymnasium, 'make', lambda *args, **kwargs: {}['the pole'])
    assert main(['--config', 'config_new']) == 1
    captured = capfd.readouterr()
    assert 'Traceback' in captured.err
    assert "KeyError: 'the pole'" in captured.err


def test_options_override_the_config():
    plan = plan_of('--seed', '3', '--cache', 'old', '--max-env-step', '1e3', '--max-train-iter', '7', '--device', 'cpu')
    assert (plan.seed, plan.max_env_step, plan.max_train_iter) == (3, 1000, 7)
    assert plan.main_config.policy.model.world_model_cfg.use_new_cache_manager is False
    assert plan.main_config.exp_name.endswith('cartpole_old_seed3')
    assert plan.main_config.policy.cuda is False


def test_in_place_is_in_the_checkpoints_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = plan_of('--resume', 'runs/a/ckpt/ckpt_best.pth.tar', '--in-place', '--seed', '3')
    assert plan.in_place
    assert plan.main_config.exp_name == str(tmp_path / 'runs' / 'a')
    assert not plan_of('--resume', 'runs/a/ckpt/ckpt_best.pth.tar').in_place


def test_without_options_the_config_stands():
    plan = plan_of()
    assert (plan.seed, plan.max_env_step, plan.max_train_iter) == (0, 5000, None)
    assert plan.main_config.exp_name.endswith('cartpole_new_seed0')
    assert plan.main_config.policy.model.world_model_cfg.use_new_cache_manager is True


def test_the_plugin_is_loaded_for_any_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from zoo.classic_control.cartpole.config import cartpole_unizero_config as own
    plan = make_plan(build_parser().parse_args(['--config', own.__file__]))
    assert 'lzero_kvcache' in plan.create_config.policy.import_names
    assert not plan.main_config.policy.model.world_model_cfg.get('use_new_cache_manager', False)


# ---------------------------------------------------------------------------------------------------- what is written


def test_a_folder_is_never_claimed_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [claim_folder(str(tmp_path / 'deep' / 'run')) for _ in range(4)]
    assert names[0] == os.path.join('deep', 'run')
    assert len(set(names)) == 4
    assert all(os.path.isdir(name) and not os.path.isabs(name) for name in names)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match='--exp-name'):
        claim_folder(str(tmp_path / 'file' / 'run'))


def test_a_failing_save_leaves_the_old_checkpoint(tmp_path):
    path = str(tmp_path / 'c.pth.tar')
    save_atomically({'a': 1}, path)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_atomically({'a': 2, 'unsaveable': lambda: None}, path)
    assert torch.load(path) == {'a': 1}
    assert os.listdir(tmp_path) == ['c.pth.tar']


class Payload:
    """Runs a command when it is unpickled carelessly."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker, )


def test_a_checkpoint_runs_nothing(tmp_path):
    path, marker = str(tmp_path / 'c.pth.tar'), str(tmp_path / 'marker')
    torch.save({'model': Payload(marker), 'target_model': {}, 'optimizer_world_model': {}}, path)
    with pytest.raises(ConfigError, match='holds more than weights'):
        read_checkpoint(path)
    assert not os.path.exists(marker)


@pytest.mark.parametrize('option', [
    ['--resume'], ['--eval'], ['--set', 'policy.model_path='],
    ['--set', 'policy.learn.learner.hook.load_ckpt_before_run='],
])
def test_whichever_way_a_checkpoint_comes_in(option, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'model': Payload('marker'), 'target_model': {}, 'optimizer_world_model': {}}, 'c.pth.tar')
    arguments = option + ['c.pth.tar'] if len(option) == 1 else ['--set', option[1] + 'c.pth.tar']
    assert main(['--config', 'config_new', *arguments]) == 2
    assert 'holds more than weights' in capfd.readouterr().err
    assert os.listdir(tmp_path) == ['c.pth.tar']


def test_a_config_is_named_as_code_that_will_be_run(tmp_path, monkeypatch, capfd):
    with pytest.raises(SystemExit) as ended:
        main(['--help'])
    assert ended.value.code == 0
    assert 'It is Python code, and it will be run' in ' '.join(capfd.readouterr().out.split())
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'mine.py').write_text("open('was_run', 'w').close()\n")
    assert main(['--config', 'mine.py']) == 2
    assert (tmp_path / 'was_run').exists()


@pytest.mark.parametrize('content', [{'model': {}}, [1, 2]])
def test_a_file_that_is_no_checkpoint(content, tmp_path):
    torch.save(content, str(tmp_path / 'c.pth.tar'))
    with pytest.raises(ConfigError, match='no checkpoint of a UniZero training'):
        read_checkpoint(str(tmp_path / 'c.pth.tar'))


def test_a_torn_checkpoint(tmp_path):
    path = tmp_path / 'c.pth.tar'
    torch.save({'model': {}, 'target_model': {}, 'optimizer_world_model': {}}, str(path))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ConfigError, match='torn'):
        read_checkpoint(str(path))


# ---------------------------------------------------------------------------------------------------- output


def _print_in_another_process():
    print('from a worker', flush=True)
    print('Cleared WorldModel in a worker', flush=True)


@pytest.mark.parametrize('verbose', [False, True])
def test_the_flood_goes_to_the_log_and_our_lines_to_the_terminal(verbose, capfd, tmp_path):
    log = tmp_path / 'run' / 'log' / 'train.log'
    shown = []
    stdout = sys.stdout
    with Output(verbose) as output:
        output.on_log = shown.append
        output.on_printed = shown.append
        logging.getLogger('lzero_kvcache').setLevel(logging.INFO)
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
        output.terminal.write('progress\n')
    assert sys.stdout is stdout
    written = log.read_text(encoding='utf-8')
    captured = capfd.readouterr()
    cleared = 'Cleared WorldModel KV caches (NEW system).'
    python_output = ['before the folder is known', cleared, 'flood', 'from a worker']
    assert all(line in written for line in python_output)
    assert 'INFO: ✓ message' in shown
    assert 'progress' in captured.out
    if verbose:
        assert all(line in captured.out + captured.err for line in [*python_output, 'from C'])
        assert shown == ['INFO: ✓ message']
    else:
        assert 'from C' in written
        assert captured.out == 'progress\n'
        assert captured.err == ''
        assert shown == [cleared, 'INFO: ✓ message']


def test_a_log_file_is_added_to_and_not_replaced(tmp_path):
    log = tmp_path / 'train.log'
    log.write_text('earlier\n')
    with Output() as output:
        print('later')
        output.attach(str(log))
    assert log.read_text() == 'earlier\nlater\n'


def test_plain_output_has_no_bar_and_counts_repetitions(tmp_path):
    with open(tmp_path / 'out', 'w+', encoding='utf-8') as file:
        terminal = Terminal(file)
        terminal.start(100)
        for _ in range(3):
            terminal.repeated('Cleared')
        terminal.update(Status(env_step=1))
        terminal.line('[not] markup')
        terminal.finish(Status(env_step=100, hit_rate=0.875, seconds=10.))
        terminal.table('Done', [('event files', 'x' * 150)])
        file.seek(0)
        text = file.read()
    assert '\x1b' not in text
    assert text.splitlines()[:4] == [
        'Cleared', '[not] markup',
        '100/100 env steps, 0 iterations  reward -  hit rate 87.5%  10.0 steps/s', 'Cleared (3 times)',
    ]
    assert 'x' * 150 in text


# ---------------------------------------------------------------------------------------------------- interrupts


@pytest.fixture()
def a_run(tmp_path):
    with open(tmp_path / 'out', 'w') as file:
        yield _Run(Plan(None, None, 'train_unizero', 'c'), None, Terminal(file))


def test_an_interrupt_waits_for_the_end_of_an_update(a_run):
    a_run.watch.updating = True
    a_run._on_signal(signal.SIGINT, None)
    with pytest.raises(Interrupted) as caught:
        a_run._stop_if_asked()
    assert caught.value.signum == signal.SIGINT


def test_an_interrupt_outside_of_an_update_is_at_once(a_run):
    with pytest.raises(Interrupted, match='SIGTERM'):
        a_run._on_signal(signal.SIGTERM, None)


def test_a_second_interrupt_waits_for_nothing(a_run):
    a_run.watch.updating = True
    a_run._on_signal(signal.SIGINT, None)
    with pytest.raises(Interrupted):
        a_run._on_signal(signal.SIGINT, None)


def test_an_interrupt_in_a_step_of_an_environment(a_run):
    """DI-engine's environment manager retries, and raises an error of its own."""
    from ding.envs import BaseEnvManager

    class Env:
        def step(self, action):
            a_run._on_signal(signal.SIGINT, None)

    manager = BaseEnvManager.__new__(BaseEnvManager)
    manager._envs, manager._env_states, manager._step_timeout, manager._max_retry = [Env()], {}, None, 1
    with pytest.raises(RuntimeError) as caught:
        manager._step(0, 1)
    assert a_run._interrupt(caught.value).signum == signal.SIGINT


def test_an_error_is_no_interrupt(a_run):
    assert a_run._interrupt(RuntimeError('it broke')) is None


def test_saving_is_not_interrupted(a_run):
    a_run._saving = True
    a_run._on_signal(signal.SIGINT, None)


# ---------------------------------------------------------------------------------------------------- mending


@pytest.mark.parametrize(('error', 'command'), [
    (ModuleNotFoundError("No module named 'cv2'", name='cv2'), "pip install 'opencv-python-headless<4.11'"),
    (ModuleNotFoundError("No module named 'Box2D.b2'", name='Box2D.b2'), 'pip install Box2D==2.3.10'),
    (ModuleNotFoundError("No module named 'xyz'", name='xyz'), "'xyz': put its folder on PYTHONPATH"),
    (gymnasium.error.NameNotFound("Environment `Pongg` doesn't exist."), "env.env_id: Environment `Pongg`"),
    (Exception('We\'re Unable to find the game "Pong". Note: Gym no longer distributes ROMs.'), 'ale-import-roms'),
    (TypeError('Descriptors cannot be created directly.'), "'protobuf<6'"),
])
def test_what_is_missing_comes_with_the_command_that_mends_it(error, command):
    assert command in mend(error)


def test_other_errors_are_not_explained_away():
    assert mend(ValueError('the ROM of my heart')) is None


# ---------------------------------------------------------------------------------------------------- real trainings


def train(tmp_path, *arguments):
    command = [sys.executable, os.path.join(PROJECT_ROOT, 'train.py'), *arguments]
    return subprocess.run(command, cwd=str(tmp_path), encoding='utf-8', timeout=300, capture_output=True, check=False)


def summary_of(folder):
    return json.loads((folder / 'summary.json').read_text())


def assert_gone_on(folder, was, now, cache):
    """Steps, iterations and the optimizer's own count are those of both runs together."""
    assert now['cache'] == cache
    assert now['env_step'] > was['env_step']
    assert now['train_iter'] > was['train_iter']
    checkpoint = read_checkpoint(str(folder / now['checkpoint']))
    assert (checkpoint.env_step, checkpoint.train_iter) == (now['env_step'], now['train_iter'])
    steps = {int(state['step']) for state in checkpoint.state['optimizer_world_model']['state'].values()}
    assert steps == {now['train_iter']}


@pytest.mark.slow
def test_train_resume_in_the_other_system_and_evaluate(tmp_path):
    first = train(tmp_path, '--config', 'config_old', '--exp-name', str(tmp_path / 'a'), '--max-env-step', '60', *SMALL)
    assert first.returncode == 0, first.stderr
    assert 'INFO: Using OLD cache system (original implementation)' in first.stdout
    assert 'Cleared WorldModel past_kv_cache (OLD system).' in first.stdout
    assert 'Name  | reward_mean' not in first.stdout
    assert 'reward_mean' in (tmp_path / 'a' / 'log' / 'train.log').read_text(encoding='utf-8')
    was = summary_of(tmp_path / 'a')
    assert was['env_step'] >= 60
    assert was['cache'] == 'old'
    checkpoint = tmp_path / was['checkpoint']

    bound = was['env_step'] + 40
    second = train(tmp_path, '--config', 'config_new', '--exp-name', str(tmp_path / 'a'), '--resume', str(checkpoint),
                   '--max-env-step', str(bound), *SMALL)
    assert second.returncode == 0, second.stderr
    assert 'INFO: ✓ Using NEW KVCacheManager for cache management' in second.stdout
    assert 'no replay buffer' in second.stdout
    resumed, = (path for path in tmp_path.iterdir() if path.name.startswith('a_'))
    now = summary_of(resumed)
    assert now['env_step'] >= bound
    assert_gone_on(tmp_path, was, now, 'new')
    assert now['hit_rates']['total'] is not None
    # Nothing of the first run was touched.
    assert summary_of(tmp_path / 'a') == was

    steps = scalars(resumed, 'kv_cache_iter/total_hit_rate')
    assert [point.step for point in steps] == list(range(was['train_iter'], now['train_iter']))

    back = train(tmp_path, '--config', 'config_old', '--exp-name', 'b', '--resume', now['checkpoint'],
                 '--max-train-iter', str(now['train_iter'] + 2), *SMALL)
    assert back.returncode == 0, back.stderr
    assert_gone_on(tmp_path, now, summary_of(tmp_path / 'b'), 'old')

    third = train(tmp_path, '--config', 'config_new', '--exp-name', 'e', '--eval', str(checkpoint), *SMALL)
    assert third.returncode == 0, third.stderr
    evaluated = summary_of(tmp_path / 'e')
    assert len(evaluated['evaluations']) == 1
    assert evaluated['train_iter'] == was['train_iter']


SAMPLED = """
import gymnasium
from zoo.classic_control.pendulum.config.pendulum_cont_sampled_unizero_config import create_config, main_config

gymnasium.spec('Pendulum-v1').max_episode_steps = 40
main_config.policy.update_per_collect = 2
main_config.policy.model.num_of_sampled_actions = 4
main_config.policy.model.world_model_cfg.update(num_of_sampled_actions=4, embed_dim=32, num_heads=2)
create_config.env_manager.type = 'base'
"""


@pytest.mark.slow
def test_sampled_unizero_resumes_in_either_system_and_is_evaluated(tmp_path):
    (tmp_path / 'sampled.py').write_text(SAMPLED)

    def run(name, cache, *arguments):
        ended = train(tmp_path, '--config', 'sampled.py', '--exp-name', name, '--cache', cache, *arguments, *SMALL)
        assert ended.returncode == 0, ended.stderr
        return summary_of(tmp_path / name)

    first = run('a', 'old', '--max-train-iter', '2')
    second = run('b', 'new', '--resume', first['checkpoint'], '--max-train-iter', '4')
    assert_gone_on(tmp_path, first, second, 'new')
    third = run('c', 'old', '--resume', second['checkpoint'], '--max-train-iter', '6')
    assert_gone_on(tmp_path, second, third, 'old')
    evaluated = run('e', 'new', '--eval', third['checkpoint'])
    assert evaluated['train_iter'] == third['train_iter']
    assert [evaluation['env_step'] for evaluation in evaluated['evaluations']] == [third['env_step']]
    assert evaluated['hit_rates']['init'] == 1


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder / 'log' / 'serial'), size_guidance={'scalars': 0})
    events.Reload()
    return events.Scalars(tag)


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    first = train(tmp_path, '--config', 'config_new', '--exp-name', 'a', '--max-train-iter', '1', *SMALL)
    assert first.returncode == 0, first.stderr
    checkpoint = summary_of(tmp_path / 'a')['checkpoint']
    second = train(tmp_path, '--config', 'config_new', '--exp-name', 'b', '--eval', checkpoint, *SMALL,
                   'policy.model.world_model_cfg.embed_dim=32')
    assert second.returncode == 2
    assert 'of another model' in second.stderr
    assert second.stderr.count('\n') == 1


@pytest.mark.slow
@pytest.mark.parametrize('manager', ['base', 'subprocess'])
def test_ctrl_c_on_a_terminal_leaves_a_whole_checkpoint(manager, tmp_path):
    terminal, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, os.path.join(PROJECT_ROOT, 'train.py'), '--config', 'config_new', '--exp-name', 'a', *SMALL,
         'create_config.env_manager.type=' + manager],
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
    ended = summary_of(tmp_path / 'a')
    checkpoint = read_checkpoint(str(tmp_path / ended['checkpoint']))
    assert checkpoint.train_iter == ended['train_iter'] > 0
    assert checkpoint.env_step == ended['env_step'] > 0
    assert not [name for name in os.listdir(tmp_path / 'a' / 'ckpt') if name.endswith('.tmp')]


@pytest.mark.parametrize('best', [None, 17.])
def test_a_training_in_place_replaces_only_what_it_betters_and_is_evaluated_at_its_end(best, monkeypatch):
    monkeypatch.setattr(lightzero, 'load_state', lambda policy, checkpoint: None)
    watch = lightzero.Watch(lambda: None, lambda: None)
    last_iter, evaluations = SimpleNamespace(update=lambda value: None), []
    watch.learner = SimpleNamespace(policy=None, last_iter=last_iter, train_iter=5, save_checkpoint=None)
    watch.collector = SimpleNamespace(envstep=50)
    watch.evaluator = SimpleNamespace(_max_episode_return=float('-inf'), policy=None,
                                      eval=lambda *arguments: evaluations.append(arguments))
    watch.checkpoint, watch.best_reward = Checkpoint({}, 5, 50), best
    watch.restore()
    assert watch.evaluator._max_episode_return == (float('-inf') if best is None else best)
    watch.evaluate_last()
    assert evaluations == ([] if best is None else [(None, 5, 50)])


def test_the_watch_knows_nothing_before_the_training_does():
    watch = lightzero.Watch(lambda: None, lambda: None)
    assert (watch.env_step, watch.train_iter, watch.cache) == (0, 0, None)
    assert watch.save_checkpoint() is None
    watch.close()
