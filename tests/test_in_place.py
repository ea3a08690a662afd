"""Trainings that go on in their own folder: what they take up, add up and abandon."""
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import event_runs
import pytest
import torch
from fake_runs import a_watch, checkpoint, result
from tensorboard.summary.writer.record_writer import RecordWriter
from trainings import train as main

from lzero_kvcache import ConfigError
from lzero_kvcache.host import building
from lzero_kvcache.host.watched import restore
from lzero_kvcache.lock_files import check_not_trained_in, training_in
from lzero_kvcache.run_hooks import read_events
from lzero_kvcache.summary import Evaluation, Result, Segment, add_up, read_progress, read_result, read_summary
from lzero_kvcache.training import make_plan
from lzero_kvcache.training.checkpoints import Checkpoint, is_abandoned
from lzero_kvcache.training.past import Past, take_up
from lzero_kvcache.training.ranks import DataParallel
from lzero_kvcache.training.runner import _Training


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


def noted(seconds, **more):
    return Result(0, 'train', 'new', 0, seconds=seconds, train_iter=5, env_step=50, **more)


# ---- what is refused -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('ended', [
    dict(ended=Result(130, 'train', 'old', 0)), dict(progress='old'),
    dict(config={'policy': {'model': {'world_model_cfg': {'context_length': 8}}}}),  # of LightZero's own entry
])
def test_a_folder_of_the_other_system_is_not_gone_on_in(ended, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="runs/a was trained with cache system 'old', not 'new'"):
        a_run_in_place(tmp_path, monkeypatch, **ended)


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


def test_an_event_file_that_cannot_be_read_loses_nothing_of_the_record(tmp_path):
    path = checkpoint(tmp_path / 'ckpt' / 'iteration_20.pth.tar', 20)
    result(exp_name=str(tmp_path)).write()
    events = tmp_path / 'log' / 'serial'
    events.mkdir(parents=True)
    with open(events / 'events.out.tfevents.1.host', 'wb') as file:
        RecordWriter(file).write(b'no event')
    with pytest.raises(ConfigError, match=r'tfevents\.1\.host is no event file; move it away'):
        take_up(str(tmp_path), path, 2, 20, print)
    assert read_summary(str(tmp_path)) == result(exp_name=str(tmp_path))


# ---- what is taken up ------------------------------------------------------------------------------------------------

def test_in_place_is_in_the_checkpoints_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = make_plan('config_new', resume='runs/a/ckpt/ckpt_best.pth.tar', in_place=True, seed=3)
    assert plan.in_place
    assert plan.main_config.exp_name == str(tmp_path / 'runs' / 'a')
    assert not make_plan('config_new', resume='runs/a/ckpt/ckpt_best.pth.tar').in_place


@pytest.mark.parametrize('best', [None, 17.])
def test_a_training_in_place_replaces_only_what_it_betters_and_is_evaluated_at_its_end(best, monkeypatch):
    running = a_watch()
    last_iter, evaluations = SimpleNamespace(update=lambda value: None), []
    policy = SimpleNamespace(load_state_dict=lambda state: None)
    running.learner = SimpleNamespace(policy=policy, last_iter=last_iter, train_iter=5, save_checkpoint=None)
    running.collector = SimpleNamespace(envstep=50)
    running.evaluator = SimpleNamespace(_max_episode_return=float('-inf'),
                                        eval=lambda *arguments: evaluations.append(arguments))
    running.loaded, running.past = Checkpoint({}, 5, 50), Past(best_reward=best)
    restore(running)
    assert running.evaluator._max_episode_return == (float('-inf') if best is None else best)
    assert running.loaded is None  # as large as the model and its optimizer, for as long as the training lasts
    running.evaluate_last()
    assert evaluations == []  # it was too short for any
    running.result.resumed_at = [50]
    running.evaluate_last()
    assert evaluations == [(None, 5, 50)]


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
        'No file has the time and the counts of this training up to its checkpoint: summary.json will have the time, '
        'the counts and the evaluations from here on']


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
    shown = run._completed({}).env_steps_per_second, read_progress('runs/a')['env_steps_per_second']
    assert shown == pytest.approx((4., 4.))  # clocks that have run for long round the seconds between


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


# ---- what parts add up to --------------------------------------------------------------------------------------------

def test_two_parts_add_up():
    counts = dict(queries=10, hits=5, misses=5, occupancy=0.5)
    before = result(seconds=10., env_steps_per_second=4., host_memory_mb=9., best_reward=20., last_reward=20.,
                    counters=dict(total=counts, skipped=5, captures=2), evaluations=[Evaluation(0, 0, 20.)],
                    exit_code=130)
    after = result(seconds=30., env_steps_per_second=2., host_memory_mb=7., best_reward=12., last_reward=12.,
                   counters=dict(total=dict(counts, hits=10, misses=0), memory_mb=2., skipped=1, captures=3),
                   evaluations=[Evaluation(60, 6, 12.)])
    before.command, before.overrides = ['train.py', '--set', 'a=1'], ['a=1']
    after.command = ['train.py', '--in-place']
    both = add_up(before, after)
    assert (both.command, both.overrides) == (['train.py', '--in-place'], [])
    assert both.earlier == [Segment(['train.py', '--set', 'a=1'], ['a=1'])]
    assert [part.command[-1] for part in add_up(both, after).earlier] == ['a=1', '--in-place']
    assert (both.seconds, both.env_steps_per_second, both.host_memory_mb) == (40., 2.5, 9.)
    assert (both.best_reward, both.last_reward, both.exit_code, both.outcome) == (20., 12., 0, 'done')
    assert both.counters == dict(
        total=dict(queries=20, hits=15, misses=5, occupancy=0.5), memory_mb=2., skipped=6, captures=5)
    assert both.hit_rates == dict(init=None, recur=None, total=0.75)
    assert [evaluation.reward for evaluation in both.evaluations] == [20., 12.]


def test_a_part_without_steps_or_evaluations_adds_nothing():
    after = result(seconds=2., env_steps_per_second=None, best_reward=None, last_reward=None)
    both = add_up(result(), after)
    assert (both.last_reward, both.best_reward) == (15., 15.)
    assert both.env_steps_per_second == pytest.approx(60 / 14)
