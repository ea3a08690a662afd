"""LightZero's own entry, called from a script with the plugin loaded: lines of progress, a summary when it ends."""
import json
import logging
import os
import re
import traceback
import types
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from ding.worker.learner.learner_hook import build_learner_hook_by_cfg
from easydict import EasyDict
from event_runs import write_events
from forks import in_forks
from small_models import ON_MAIN
from tensorboard.summary.writer.record_writer import RecordWriter
from trainings import ITERATIONS, SMALL, WM, import_what_trainings_import, scalars, short_episodes, summary_of

from lzero_kvcache import ConfigError, run_hooks
from lzero_kvcache.host import entries
from lzero_kvcache.lock_files import check_not_trained_in
from lzero_kvcache.summary import Evaluation, read_progress, read_summary, version_of
from lzero_kvcache.telemetry import HOOK_KEY
from lzero_kvcache.training import make_plan

LOADED = 'policy.learn.learner.hook.load_ckpt_before_run'


def keep_progress(write, result, phase):
    """Write it, and append it to a file, with whether the folder is held then."""
    write(result, phase)
    [held] = in_forks({'another': is_refused}).values()
    with open('written', 'a') as file:
        file.write(json.dumps([read_progress('run'), held is not None]) + '\n')


def script(folder, new):
    """What such a script does. Its log is kept, and each iteration has a line."""
    from lzero.entry import train_unizero
    os.chdir(folder)
    short_episodes()
    run_hooks.EVERY_SECONDS = 0.
    logging.getLogger('lzero_kvcache').addHandler(logging.FileHandler('said', encoding='utf-8'))
    run_hooks.write_progress = partial(keep_progress, run_hooks.write_progress)
    overrides = SMALL[SMALL.index('--set') + 1:]
    plan = make_plan('config_new', cache='new' if new else 'old', exp_name='run', overrides=overrides)
    train_unizero([plan.main_config, plan.create_config], seed=4, max_train_iter=ITERATIONS)
    check_not_trained_in('run', 'run')  # also in a notebook, whose process goes on


@pytest.mark.slow
@pytest.mark.parametrize('new', [False, True], ids=['old', 'new'])
def test_it_says_how_far_it_is_and_leaves_a_summary(new, tmp_path):
    import_what_trainings_import()
    assert in_forks({'script': partial(script, str(tmp_path), new)}) == {'script': None}
    summary, lines = summary_of(tmp_path / 'run'), (tmp_path / 'said').read_text(encoding='utf-8').splitlines()
    progress = [line for line in lines if line.startswith('train ')]
    steps = summary['env_step']
    assert len(progress) == ITERATIONS
    [reward] = scalars(tmp_path / 'run', 'evaluator_iter/reward_mean')
    ends = [None, *(round(steps * ITERATIONS / iteration) for iteration in range(1, ITERATIONS))]
    for line, end in zip(progress, ends):
        how_far = rf'{steps}\+0' + (rf'/{end} \({steps / end:.0%}\), ' + (
            r'[\d:]+ left' if end > steps else 'the last updates') if end else '')
        assert re.fullmatch(
            rf'train    {how_far}  reward {reward.value:.1f}, best {reward.value:.1f}  loss \S+  hit rate \d+\.\d%  '
            r'[\d.]+ steps/s on cpu', line), line
    assert (summary['max_env_step'], summary['max_train_iter']) == (None, ITERATIONS)
    assert [(summary[name]) for name in ('cache', 'seed', 'task', 'exit_code', 'device', 'train_iter')] == [
        'new' if new else 'old', 4, 'train', 0, 'cpu', ITERATIONS]
    assert summary['counters']['total']['queries'] == scalars(tmp_path / 'run', 'kv_cache_iter/total_queries')[-1].value
    assert [list(evaluation.values()) for evaluation in summary['evaluations']] == [[0, 0, reward.value, 0., 1]]
    origin = [summary[name] for name in ('entry', 'config', 'processes')]
    assert origin == ['train_unizero', os.path.abspath(__file__), 1]
    assert summary['loss'] == scalars(tmp_path / 'run', 'learner_iter/weighted_total_loss_avg')[-1].value
    assert summary['last_reward'] == summary['best_reward'] == reward.value
    told = ' (main branch)' if ON_MAIN else ''
    assert summary['versions']['LightZero'] == version_of('LightZero') + told
    assert summary['machine']['cpu'] and summary['started'] <= summary['ended']
    rates = ', '.join(f'{pool} {summary["hit_rates"][pool]:.1%}' for pool in ('total', 'init', 'recur'))
    assert lines[-1] == (
        f'Hit rates of the cache: {rates}; its memory: {summary["cache_memory_mb"]:.1f} MiB; last reward '
        f'{reward.value:.1f}, best {reward.value:.1f}. run/summary.json has all numbers')
    assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['event_files'] == 'run/log/serial'
    # What there would be if it was killed, and that nobody else could have written there.
    written, held = zip(*map(json.loads, (tmp_path / 'written').read_text().splitlines()))
    assert held == (True, ) * (1 + ITERATIONS)
    assert [(at['phase'], at['train_iter']) for at in written] == [('start', 0), *(
        ('train', iteration) for iteration in range(ITERATIONS))]
    for at in written:
        assert [at[name] for name in ('exit_code', 'outcome', 'evaluations', 'seed', 'cache', 'event_files')] == [
            None, '', None, 4, summary['cache'], 'run/log/serial']
        assert at['run_id'] == summary['run_id'] != ''
    assert written[-1]['best_reward'] == reward.value
    progress = read_progress(str(tmp_path / 'run'))
    assert (progress['phase'], progress['exit_code'], progress['outcome']) == ('end', 0, 'done')
    assert {**progress, 'phase': None} == {**summary, 'phase': None}


def refused(folder, overrides, way):
    """What an entry is refused with that is given a checkpoint of another model, or a cache that is too small."""
    from lzero.entry import train_unizero
    os.chdir(folder)
    short_episodes()
    torch.save(dict(model={}, target_model={}, optimizer_world_model={}), 'other')
    plan = make_plan('config_new', exp_name='run', overrides=[*SMALL[SMALL.index('--set') + 1:], *overrides])
    try:
        train_unizero([plan.main_config, plan.create_config], max_train_iter=ITERATIONS, **way)
    except ConfigError as error:
        return [str(error), traceback.format_exc().count('Traceback'), os.path.exists('run')]


@pytest.mark.parametrize(('overrides', 'way', 'said', 'leaves'), [
    ([], dict(model_path='other'), 'model_path=other: the checkpoint is of another model: ', False),
    ([], dict(model_path='nosuch'), 'model_path=nosuch: there is no such file', False),
    ([f'+{LOADED}=other'], {}, f'{LOADED}=other: the checkpoint is of another model: ', True),  # the log is begun
    ([f'{WM}.kv_cache_cfg.max_memory_mb=0.001'], {}, f'{WM}.kv_cache_cfg.max_memory_mb=0.001 is too small', False),
], ids=['entry', 'no file', 'learner', 'policy'])
def test_an_entry_that_is_refused_says_one_error_and_leaves_no_folder(overrides, way, said, leaves, tmp_path):
    answered = in_forks({'entry': partial(refused, str(tmp_path), overrides, way)})['entry']
    assert isinstance(answered, list), answered
    assert answered[0].startswith(said) and '\n' not in answered[0]
    assert answered[1:] == [1, leaves]


def a_learner():
    """What the hooks see of DI-engine's learner."""
    counted = dict(total=dict(queries=4, hits=1), memory_mb=1.)
    model = SimpleNamespace(world_model=SimpleNamespace(
        kv_cache_manager=SimpleNamespace(counters=lambda: counted), lightzero_version='0'))
    attributes = dict(model=model, target_model=model, cfg=EasyDict(device='cpu', model=dict(world_model_cfg={})))
    return SimpleNamespace(
        policy=SimpleNamespace(get_attribute=attributes.get), rank=0, world_size=1, exp_name='run',
        collector_envstep=40, last_iter=SimpleNamespace(val=7), log_buffer=dict(scalar={}),
        tb_logger=SimpleNamespace(flush=lambda: None))


def the_hooks():
    """By position, as a learner makes them of the default config."""
    configs = {name: config for name, config in run_hooks.HOOKS.items() if name != HOOK_KEY}
    return {position: hooks[0] for position, hooks in build_learner_hook_by_cfg(EasyDict(configs)).items() if hooks}


def test_the_hooks_of_a_learner_tell_of_one_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir('run')
    made, begun = [], run_hooks.begun
    monkeypatch.setattr(run_hooks, 'begun', lambda *args, **known: made.append(begun(*args, **known)) or made[-1])
    hooks, learner, told = the_hooks(), a_learner(), []
    for position in ('before_run', 'after_iter', 'after_run'):
        hooks[position](learner)
        told.append([read_progress('run')[name] for name in ('phase', 'run_id', 'train_iter')])
    assert told == [[phase, made[0].run_id, 7] for phase in ('start', 'train', 'end')]
    assert len(made) == 1
    assert read_summary('run').hit_rates == dict(total=0.25, init=None, recur=None)


def is_refused():
    try:
        check_not_trained_in('run', 'run')
    except ConfigError as error:
        return str(error)


def test_a_script_that_is_refused_keeps_its_own_folder(tmp_path):
    def script(cfg, create_cfg):
        with entries.leaving_no_folder():
            raise ConfigError('refused')

    (tmp_path / 'total_config.py').write_text('')
    with pytest.raises(ConfigError, match='refused'):
        script(SimpleNamespace(exp_name=str(tmp_path)), None)
    assert os.listdir(tmp_path) == ['total_config.py']


def test_an_evaluation_is_read_with_its_deviation_if_it_is_there(tmp_path):
    points = []
    for iteration, reward in ((0, 20.), (7, 57.25)):
        for name, value in (('episode_count', 8.), ('reward_mean', reward), ('reward_std', 4.)):
            points += [(iteration, at, f'evaluator_{axis}/{name}', value)
                       for axis, at in (('iter', iteration), ('step', 10 * iteration))]
    write_events(tmp_path / 'a', points)
    seen = run_hooks.read_events(str(tmp_path / 'a'))
    assert (seen.evaluations, seen.loss) == ([Evaluation(0, 0, 20., 4., 8), Evaluation(70, 7, 57.25, 4., 8)], None)
    loss = [(9, 9, 'learner_iter/weighted_total_loss_avg', 0.5)]
    write_events(tmp_path / 'b', [point for point in points if 'reward_mean' in point[2]] + loss)
    seen = run_hooks.read_events(str(tmp_path / 'b'))
    assert (seen.evaluations, seen.loss) == ([Evaluation(0, 0, 20.), Evaluation(70, 7, 57.25)], 0.5)
    assert run_hooks.read_events(str(tmp_path / 'none')).evaluations == []


def test_an_evaluation_that_breaks_off_shifts_no_other(tmp_path):
    """A kill leaves its mean against iterations alone; the training goes on in another file."""
    for began, steps in ((1, [(0, 0), (7, None)]), (2, [(5, 50), (9, 90)])):
        write_events(tmp_path, [(at, at, f'evaluator_{axis}/reward_mean', float(iteration)) for iteration, step in steps
                                for axis, at in (('iter', iteration), ('step', step)) if at is not None], began)
    assert run_hooks.read_events(str(tmp_path)).evaluations == [
        Evaluation(0, 0, 0.), Evaluation(50, 5, 5.), Evaluation(90, 9, 9.)]


def test_what_is_no_event_file_is_told_of(tmp_path, caplog):
    """The training has ended well, whatever a user keeps there."""
    write_events(tmp_path, [(at, at, f'evaluator_{axis}/reward_mean', 4.) for axis, at in (('iter', 7), ('step', 70))])
    (tmp_path / 'a folder of tfevents').mkdir()
    (tmp_path / 'x.tfevents.txt').write_text('what is written here is no event')
    with open(tmp_path / 'y.tfevents', 'wb') as file:
        RecordWriter(file).write(b'no event')
    assert run_hooks.read_events(str(tmp_path)).evaluations == [Evaluation(70, 7, 4.)]
    assert [record.getMessage() for record in caplog.records if record.name == run_hooks.__name__] == [
        f'{tmp_path}/a folder of tfevents cannot be read (Is a directory); move it away',
        f'{tmp_path}/y.tfevents is no event file; move it away']


def test_a_function_of_a_users_is_no_entry():
    def script(max_env_step, max_train_iter, evaluator, reward):
        return entries.entry_that_trains(), entries.rewards_of_entry()

    assert script(300, 20, None, {'eval_episode_return': [4.]}) == ({}, {})


def test_rewards_are_those_of_the_entrys_last_evaluation_and_of_its_best_one():
    returned = iter([[30., 50.], [10., 20.]])

    def entry():
        evaluator, said = SimpleNamespace(_max_episode_return=float('-inf')), [entries.rewards_of_entry()]
        for best in (40., 40.):
            evaluator._max_episode_return, reward = best, {'eval_episode_return': next(returned)}
            said.append(entries.rewards_of_entry())
        return said, reward

    of_lightzero = types.FunctionType(
        entry.__code__, {**globals(), '__name__': 'lzero.entry.train_unizero'}, closure=entry.__closure__)
    assert of_lightzero()[0] == [
        {}, dict(last_reward=40., best_reward=40.), dict(last_reward=15., best_reward=40.)]
    assert entries.rewards_of_entry() == {}
