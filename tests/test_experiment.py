"""``python -m lzero_kvcache experiment``: what is begun, gone on with, left alone and refused; a real one, cut off."""
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from fake_runs import checkpoint, result
from forks import environment
from trainings import PROJECT_ROOT, said_by, when

from lzero_kvcache import ConfigError, comparison
from lzero_kvcache.lock_files import training_in
from lzero_kvcache.summary import read_progress, read_summary
from lzero_kvcache.training import processes
from lzero_kvcache.training.checkpoints import abandon_later
from lzero_kvcache.training.experiment import Experiment, Trial, last_checkpoint
from lzero_kvcache.training.processes import TrialProcesses
from lzero_kvcache_options import TrainOptions, main

SMALL = ['policy.num_simulations=3', 'policy.batch_size=8', 'env.collector_env_num=2', 'env.evaluator_env_num=1']


def make(folder, caches=('old', 'new'), seeds=(0, 1), config='config_new', **changes):
    return Experiment(str(folder), TrainOptions(config, **{'max_env_step': 60, **changes}), caches, seeds)


@pytest.mark.parametrize('override', ['exp_name=x', '+exp_name=x', ' exp_name =x'])
def test_its_folders_have_no_other_name(override, tmp_path):
    with pytest.raises(ConfigError, match='--set exp_name: an experiment names its folders by system and seed; --out'):
        make(tmp_path, overrides=[override])
    assert not list(tmp_path.iterdir())


# ---- what is run -----------------------------------------------------------------------------------------------------

def test_a_run_is_begun_with_all_that_was_asked_for(tmp_path):
    made = make(tmp_path, device='cpu', overrides=SMALL)
    assert made.ask(made.trials[0], print) == TrainOptions(
        'config_new', max_env_step=60, device='cpu', overrides=SMALL, cache='old', seed=0,
        exp_name=str(tmp_path / 'old_seed0'))


def test_it_goes_on_from_the_last_whole_checkpoint(tmp_path):
    """Whatever the times of the files are, which a copy need not keep."""
    made = make(tmp_path)
    run, folder = made.trials[1], tmp_path / 'new_seed0' / 'ckpt'
    paths = [checkpoint(folder / f'iteration_{step}.pth.tar', step) for step in (0, 20, 40, 50, 60)]
    with open(paths[3], 'r+b') as file:
        file.truncate(100)
    for age, path in enumerate(paths):
        os.utime(path, (1e9 - age, 1e9 - age))
    asked = made.ask(run, print)
    assert (asked.resume, asked.in_place, asked.exp_name) == (paths[2], True, None)
    assert last_checkpoint(run.folder, 61) == paths[4]
    assert last_checkpoint(run.folder, 20) is None


def test_it_goes_on_from_no_checkpoint_that_was_abandoned(tmp_path):
    """It is further than the others where a training that went on from an earlier one was killed soon."""
    run, folder = make(tmp_path).trials[1], tmp_path / 'new_seed0' / 'ckpt'
    paths = [checkpoint(folder / f'iteration_{step}.pth.tar', step) for step in (20, 50)]
    assert last_checkpoint(run.folder, 60) == paths[1]
    assert abandon_later(paths[0], 2, 20) == ['iteration_50.pth.tar']
    assert last_checkpoint(run.folder, 60) == paths[0]


def test_it_begins_anew_beside_what_is_left_of_one_that_nothing_can_go_on_from(tmp_path):
    made = make(tmp_path)
    run = made.trials[0]
    for attempt in (1, 2):
        checkpoint(tmp_path / 'old_seed0' / 'ckpt' / 'iteration_0.pth.tar', 0)
        said = []
        asked = made.ask(run, said.append)
        assert (asked.resume, asked.in_place, asked.exp_name) == (None, False, run.folder)
        assert said == [
            f'old_seed0: has no checkpoint to go on from; its folder is now old_seed0_cut_off{attempt}']
        assert not os.path.exists(run.folder)
        assert (tmp_path / f'old_seed0_cut_off{attempt}' / 'ckpt' / 'iteration_0.pth.tar').exists()


@pytest.mark.parametrize(('changes', 'is_done'), [
    (dict(), True), (dict(outcome='reward reached env.stop_value'), True), (dict(exit_code=130), False),
    (dict(seed=1), False), (dict(cache='old'), False), (dict(task='evaluate'), False), (dict(cache='mine'), True),
])
def test_which_runs_are_done(changes, is_done, tmp_path):
    run = Trial('new', 0, str(tmp_path))
    assert run.result is None
    result(exp_name=str(tmp_path), **changes).write()
    assert (run.result is not None) == is_done
    whole = (tmp_path / 'summary.json').read_text()
    (tmp_path / 'summary.json').write_text(whole[:len(whole) // 2])
    assert run.result is None


# ---- its folder ------------------------------------------------------------------------------------------------------

def opened(made):
    with made.opened():
        pass


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(max_env_step=70), 'max_env_step 60, not 70'),
    (dict(threads=2), 'threads 1, not 2'),
    (dict(overrides=['policy.num_simulations=3']), "options .'--max-env-step=60'"),
    (dict(config='cartpole_unizero_config', threads=1), 'config_new.py as it'),
])
def test_an_experiment_of_other_settings_is_refused(changes, message, tmp_path):
    opened(make(tmp_path))
    before = (tmp_path / 'experiment.json').read_text()
    with pytest.raises(ConfigError, match=message):
        opened(make(tmp_path, **changes))
    assert (tmp_path / 'experiment.json').read_text() == before


def test_seeds_and_systems_can_be_added(tmp_path):
    opened(make(tmp_path, caches=['new'], seeds=[0]))
    opened(make(tmp_path, caches=['old'], seeds=[2, 0]))
    held = json.loads((tmp_path / 'experiment.json').read_text())
    assert (held['caches'], held['seeds']) == (['new', 'old'], [0, 2])


def test_a_folder_that_is_something_else_is_refused(tmp_path):
    (tmp_path / 'work').write_text('')
    with pytest.raises(ConfigError, match='is not empty, and is no experiment'):
        opened(make(tmp_path))
    (tmp_path / 'experiment.json').write_text('{"caches": [')
    with pytest.raises(ConfigError, match='experiment.json cannot be read'):
        opened(make(tmp_path))
    with pytest.raises(ConfigError, match='cannot be written'):
        opened(make(tmp_path / 'work' / 'below'))


def test_a_config_that_never_ends_is_refused(tmp_path):
    config = tmp_path / 'endless.py'
    config.write_text('from zoo.classic_control.cartpole.config.cartpole_unizero_config import '
                      'create_config, main_config\n')
    with pytest.raises(ConfigError, match='--max-env-step'):
        make(tmp_path, config=str(config), max_env_step=None)


# ---- its processes ---------------------------------------------------------------------------------------------------

@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Trainings that are ``fake_trainer.py``; a function that says what they do, and one that says which were begun."""
    script, started = tmp_path / 'script.json', tmp_path / 'started'
    monkeypatch.setenv('FAKE_TRAINER', str(script))
    monkeypatch.setattr(processes, 'PROGRAM', (sys.executable, os.path.join(os.path.dirname(__file__),
                                                                            'fake_trainer.py')))
    monkeypatch.setattr(processes, 'POLL_SECONDS', 0.02)
    compared = []
    monkeypatch.setattr(comparison, 'compare_runs', lambda *arguments: compared.append(arguments[:3]))

    def do(**runs):
        script.write_text(json.dumps(dict(
            runs=runs, started=str(started), summary=asdict(result()),
            checkpoint=checkpoint(tmp_path / 'a.pth.tar', 30))))

    def begun():
        lines = started.read_text().split('\n')[:-1] if started.exists() else []
        return [json.loads(line) for line in lines]

    do()
    (tmp_path / 'e').mkdir()
    return SimpleNamespace(do=do, begun=begun, compared=compared, folder=str(tmp_path / 'e'))


def run_experiment(fake, *arguments):
    return main(['experiment', '--config', 'config_new', '--max-env-step', '60', '--out', fake.folder, *arguments])


def test_all_are_run_and_compared(fake, capfd):
    assert run_experiment(fake, '--seeds', '0', '1') == 0
    names = ['old_seed0', 'new_seed0', 'old_seed1', 'new_seed1']
    assert [name for name, _ in fake.begun()] == names
    assert fake.compared == [(
        [os.path.join(fake.folder, name) for name in names], fake.folder,
        [('old', 'old_seed*'), ('new', 'new_seed*')]
    )]
    said = capfd.readouterr().out
    assert all(f'{name}: done, 60 env steps in 0:12, last reward 15.0' in said for name in names)
    assert '4 of 4 runs are done' in said
    assert '\x1b' not in said


def test_one_that_fails_does_not_stop_the_others(fake, capfd):
    fake.do(old_seed0='fail')
    assert run_experiment(fake, '--seeds', '0', '1') == 1
    log = os.path.join(fake.folder, 'old_seed0.log')
    said = capfd.readouterr().out
    assert f'old_seed0: failed with exit code 1; {log} says why' in said
    assert 'it broke' in open(log).read()
    assert '3 of 4 runs are done' in said
    (folders, _, groups), = fake.compared
    assert len(folders) == 3
    assert [name for name, _ in groups] == ['old', 'new']
    fake.do()
    assert run_experiment(fake, '--seeds', '0', '1') == 0
    assert [name for name, _ in fake.begun()][4:] == ['old_seed0']


def test_one_that_is_killed_is_told_of_by_the_signal(fake, capfd):
    fake.do(old_seed0='die')
    assert run_experiment(fake, '--seeds', '0') == 1
    assert 'old_seed0: was killed (SIGKILL)\n' in capfd.readouterr().out


def test_an_error_leaves_no_training_to_nobody(fake):
    fake.do(old_seed0='wait')
    made = make(fake.folder)
    with made.opened() as lock:
        os.mkdir(made.trials[1].log)
        children = TrialProcesses(made, lock, 2)
        with pytest.raises(IsADirectoryError):
            children.run()
    try:
        assert [process.poll() is not None for process in children.running.values()] == [True]
    finally:
        for process in children.running.values():
            process.kill()


def test_a_folder_in_which_somebody_trains_is_left_alone(fake, capfd):
    """It would be renamed, since nothing can go on from what is in it."""
    folder = os.path.join(fake.folder, 'old_seed0')
    opened(make(fake.folder))
    os.makedirs(folder)
    with training_in(folder, folder):
        assert run_experiment(fake, '--seeds', '0') == 1
    assert os.listdir(folder) == ['train.lock']
    assert [name for name, _ in fake.begun()] == ['new_seed0']
    said = capfd.readouterr().out
    assert f'old_seed0: {folder} is being trained by process {os.getpid()}; wait for it, or end it\n' in said
    assert run_experiment(fake, '--seeds', '0') == 0


def log_has(folder, name, text):
    path = os.path.join(folder, name + '.log')
    return os.path.exists(path) and text in open(path).read()


@pytest.fixture
def interruptible():
    """Tests that run in the background of a shell are born deaf to interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_all_and_the_same_command_goes_on(fake, capfd, interruptible):
    fake.do(old_seed0='wait', new_seed0='wait')
    folders = [os.path.join(fake.folder, f'{cache}_seed0') for cache in ('old', 'new')]
    thread = when(lambda: all(read_progress(folder).get('collected_env_step') == 30 for folder in folders),
                  lambda: os.kill(os.getpid(), signal.SIGINT))
    assert run_experiment(fake, '--seeds', '0', '1', '--jobs', '2') == 130
    thread.join()
    said = capfd.readouterr().out
    assert said.count(': interrupted') == 2
    assert '0 of 4 runs are done' in said
    assert fake.compared == []
    assert sorted(name for name, _ in fake.begun()) == ['new_seed0', 'old_seed0']
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    fake.do()
    assert run_experiment(fake, '--seeds', '0', '1') == 0
    again = dict(fake.begun()[2:])
    for name in ('old_seed0', 'new_seed0'):
        path = os.path.join(fake.folder, name, 'ckpt', 'iteration_3.pth.tar')
        assert ' '.join(again[name]).endswith(f'--resume={path} --in-place')
        assert f'{name}: goes on from {path}' in capfd.readouterr().out or name == 'new_seed0'
    assert '--resume' not in ' '.join(again['old_seed1'])
    assert len(fake.compared[0][0]) == 4


def test_no_more_run_at_once_than_jobs(fake, tmp_path, monkeypatch):
    at_once = []
    show = TrialProcesses._show
    monkeypatch.setattr(TrialProcesses, '_show', lambda self, bar: at_once.append(len(self.running)) or show(self, bar))
    assert run_experiment(fake, '--seeds', '0', '1', '2', '--jobs', '2') == 0
    assert max(at_once) == 2
    assert len(fake.begun()) == 6


def test_nobody_else_works_on_it_while_any_of_its_processes_lives(fake):
    """Which are told of, since they outlive an experiment that is killed."""
    fake.do(old_seed0='wait')
    made = make(fake.folder)
    refused = pytest.raises(ConfigError, match=rf'still going on, in process {os.getpid()}; wait for them, or end them')
    with made.opened() as lock:
        with refused:
            opened(make(fake.folder))
        children = TrialProcesses(made, lock, 1)
        children.start(made.trials[0])
    process = children.running[made.trials[0]]
    try:
        with pytest.raises(ConfigError, match=rf'going on, in processes {os.getpid()}, {process.pid}; wait for them'):
            opened(make(fake.folder))
    finally:
        process.kill()
        process.wait()
    opened(make(fake.folder))


def test_what_has_ended_is_not_told_of(fake):
    with make(fake.folder).opened() as lock:
        TrialProcesses(make(fake.folder), lock, 1).run()
        with pytest.raises(ConfigError, match=rf'going on, in process {os.getpid()}; wait for them'):
            opened(make(fake.folder))


# ---- a real one ------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_real_experiment_is_cut_off_and_goes_on(tmp_path):
    command = [sys.executable, '-m', 'lzero_kvcache', 'experiment', '--config', 'config_new', '--seeds', '0',
               '--threads', '1', '--max-env-step', '120', '--out', str(tmp_path / 'e'), '--set', *SMALL,
               'policy.eval_freq=1000']

    def start(*more):
        return subprocess.Popen([*command, *more], cwd=str(tmp_path), env=environment(PROJECT_ROOT),
                                stdout=subprocess.PIPE, encoding='utf-8')

    process = start()
    thread = when(lambda: log_has(str(tmp_path / 'e'), 'old_seed0', 'Cleared WorldModel'),
                  lambda: process.send_signal(signal.SIGINT))
    said = said_by(process, tmp_path)
    thread.join()
    assert process.returncode == 130, said
    cut_off = read_summary(str(tmp_path / 'e' / 'old_seed0'))
    assert cut_off.outcome == 'interrupted by SIGINT' and 0 < cut_off.env_step < 120

    process = start('--jobs', '2')
    said = said_by(process, tmp_path)
    assert process.returncode == 0, said
    assert 'old_seed0: goes on from' in said and 'new_seed0: begins' in said
    old, new = (read_summary(str(tmp_path / 'e' / f'{cache}_seed0')) for cache in ('old', 'new'))
    assert old.env_step >= 120 and new.env_step >= 120
    assert (old.cache, new.cache) == ('old', 'new')
    assert old.seconds > cut_off.seconds
    assert old.counters['total']['queries'] > cut_off.counters['total']['queries']
    assert old.evaluations[:len(cut_off.evaluations)] == cut_off.evaluations
    assert old.evaluations[-1].train_iter == old.train_iter
    events = tmp_path / 'e' / 'old_seed0' / 'log' / 'serial'
    assert len(list(events.iterdir())) == 2
    assert (tmp_path / 'e' / 'compare.json').exists()
