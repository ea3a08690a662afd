"""What the version before the refactoring wrote (``fixtures/before_rooms``): read, compared, gone on with, refused."""
import json
import os
import shutil

import pytest
from small_models import ON_MAIN
from trainings import BATCH, PROJECT_ROOT, import_what_trainings_import, short_episodes, train, trained

from lzero_kvcache import comparison, config, summary
from lzero_kvcache.config import KV_CACHE_CFG
from lzero_kvcache.summary import read_summary
from lzero_kvcache.training import load_config, overrides
from lzero_kvcache.training.checkpoints import read_checkpoint
from lzero_kvcache.training.experiment import Trial
from lzero_kvcache.training.processes import TrialProcesses
from lzero_kvcache.training.terminal import summary_rows
from lzero_kvcache_options import main

BEFORE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'fixtures', 'before_rooms')
RUNS = ('experiment/old_seed0', 'experiment/new_seed0', 'single_old', 'single_new')
EACH_RUN = pytest.mark.parametrize('name', RUNS)
NEW_OPTION = 'policy.model.world_model_cfg.kv_cache_cfg.an_option_of_a_later_version'


def loaded(*path):
    with open(os.path.join(BEFORE, *path), encoding='utf-8') as file:
        return json.load(file)


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of all of it, which is the working directory."""
    shutil.copytree(BEFORE, str(tmp_path / 'copy'))
    monkeypatch.chdir(tmp_path / 'copy')
    yield tmp_path / 'copy'
    load_config(os.path.join(PROJECT_ROOT, 'configs', 'config_new.py'))  # or else the copy's could still be imported


@pytest.fixture
def a_new_option(monkeypatch):
    """The version that reads has one more option of the cache than the one that wrote."""
    name, read = NEW_OPTION.rsplit('.', 1)[-1], config._read_options
    monkeypatch.setitem(KV_CACHE_CFG, name, config.Option(int, 1, 'what it does'))
    monkeypatch.setattr(config, '_read_options', lambda *args: {
        key: value for key, value in read(*args).items() if key != name
    })
    monkeypatch.setitem(overrides.CACHE_PATHS, NEW_OPTION, None)


def rewritten(path, **changes):
    """Change fields of a JSON file; ``...`` takes one away."""
    held = {**json.loads(path.read_text(encoding='utf-8')), **changes}
    path.write_text(json.dumps({name: value for name, value in held.items() if value is not ...}), encoding='utf-8')


# ---------------------------------------------------------------------------------------------------- summaries


@EACH_RUN
def test_a_summary_is_read(name):
    held, result = loaded(name, 'summary.json'), read_summary(os.path.join(BEFORE, name))
    for key, value in held.items():
        if key != 'evaluations':
            assert getattr(result, key) == value
    unknown = dict(deviation=None, episodes=None)
    evaluations = [{**known, **unknown} for known in held['evaluations']]
    assert [vars(evaluation) for evaluation in result.evaluations] == evaluations
    assert dict(summary_rows(result))['cache system'] == held['cache']
    assert Trial(result.cache, result.seed, os.path.join(BEFORE, name)).result == result


@EACH_RUN
def test_a_summary_with_unknown_fields_is_read(name, copied):
    path = copied / name / 'summary.json'
    before = read_summary(str(path.parent))
    evaluations = [{**evaluation, 'a_field': 3} for evaluation in loaded(name, 'summary.json')['evaluations']]
    rewritten(path, a_field_of_a_later_version={'a': 1}, evaluations=evaluations)
    assert read_summary(str(path.parent)) == before


@pytest.mark.parametrize('missing', sorted(set(summary.Result.__dataclass_fields__) - {
    'exit_code', 'task', 'cache', 'seed'}))
def test_a_summary_without_a_field_is_read(missing, copied):
    path = copied / 'single_new' / 'summary.json'
    rewritten(path, **{missing: ...})
    result = read_summary(str(path.parent))
    assert summary_rows(result)
    assert summary.add_up(result, result).exit_code == 0
    assert Trial('new', 1, str(path.parent)).result == result


@pytest.mark.parametrize('missing', ['exit_code', 'task', 'cache', 'seed'])
def test_a_summary_that_does_not_say_which_run_it_is_counts_for_nothing(missing, copied):
    path = copied / 'single_new' / 'summary.json'
    rewritten(path, **{missing: ...})
    assert read_summary(str(path.parent)) is None


@pytest.mark.parametrize('odd', [dict(resumed_at=['a']), dict(overrides=3), dict(run_id=7), dict(evaluations=['a'])])
def test_a_summary_that_cannot_be_counts_for_nothing(odd, copied):
    path = copied / 'single_new' / 'summary.json'
    rewritten(path, **odd)
    assert read_summary(str(path.parent)) is None


# ---------------------------------------------------------------------------------------------------- comparison


def test_its_runs_are_compared_as_they_were(copied, capfd):
    assert main(['compare', 'experiment', '--out', 'again']) == 0
    now, before = json.loads((copied / 'again' / 'compare.json').read_text()), loaded('experiment', 'compare.json')
    assert [side['name'] for side in now['sides']] == [side['name'] for side in before['sides']] == ['old', 'new']
    rows = {row['name']: row for row in now['measures']}
    for row in before['measures']:
        assert rows[row['name']]['runs'] == pytest.approx(row['runs'])
    assert now['config_differences'] == before['config_differences']


# ---------------------------------------------------------------------------------------------------- the experiment


@pytest.fixture
def again(copied, monkeypatch):
    """A function that gives the stored experiment's own command again, and returns what it would train."""
    if ON_MAIN:
        pytest.skip('the experiment is one of the released LightZero, whose config has other values')
    monkeypatch.setattr(comparison, 'compare_runs', lambda *arguments: None)
    begun = []
    monkeypatch.setattr(TrialProcesses, 'start', lambda self, trial: begun.append(trial.name))
    held = loaded('experiment', 'experiment.json')

    def call(*further, caches=held['caches'], seeds=held['seeds']):
        begun.clear()
        assert main(['experiment', '--config', held['config'], '--cache', *caches, '--seeds', *map(str, seeds),
                     '--out', 'experiment', *held['options'], *further]) == 0
        return list(begun)

    return call


def settings(copied):
    return json.loads((copied / 'experiment' / 'experiment.json').read_text(encoding='utf-8'))


def test_the_same_command_trains_nothing_again(again, copied, capfd):
    before = {name: (copied / 'experiment' / name / 'summary.json').read_bytes() for name in ('old_seed0', 'new_seed0')}
    assert again() == []
    said = capfd.readouterr().out
    assert all(f'{name}: is done already' in said for name in before)
    assert '2 of 2 runs are done' in said
    for name, content in before.items():
        assert (copied / 'experiment' / name / 'summary.json').read_bytes() == content


@pytest.mark.usefixtures('a_new_option')
def test_nor_where_the_cache_has_another_option(again):
    assert again() == []


def test_nor_where_an_option_was_removed(again, monkeypatch):
    left = {path: value for path, value in overrides.CACHE_PATHS.items() if not path.endswith('.validation_freq')}
    monkeypatch.setattr(overrides, 'CACHE_PATHS', left)
    assert again() == []


def test_its_settings_are_written_anew_and_hold_where_an_option_is_added(again, copied, monkeypatch, request):
    assert 'values_version' not in settings(copied)
    assert again() == []
    written = settings(copied)
    assert written['values_version'] == 2
    request.getfixturevalue('a_new_option')
    assert again() == []
    assert settings(copied) == written


def test_more_seeds_are_trained_beside_it(again, copied):
    assert again(seeds=[0, 1]) == ['old_seed1', 'new_seed1']
    assert settings(copied)['seeds'] == [0, 1]


@pytest.mark.usefixtures('a_new_option')
@pytest.mark.parametrize('rewrite', [False, True], ids=['as stored', 'written anew'])
@pytest.mark.parametrize('assignment', [
    f'{NEW_OPTION}=3', 'policy.model.world_model_cfg.kv_cache_cfg.eviction=lru', 'policy.num_simulations=3',
])
def test_other_values_are_another_experiment(assignment, rewrite, again, copied, capfd):
    if rewrite:
        again()
    before = settings(copied)
    with pytest.raises(AssertionError):
        again('--set', assignment)
    assert 'is an experiment with' in capfd.readouterr().err
    assert settings(copied) == before


def test_a_default_that_is_given_changes_nothing(again):
    assert again('--set', 'policy.model.world_model_cfg.kv_cache_cfg.eviction=None') == []


def test_an_experiment_with_unknown_settings_is_gone_on_with(again, copied):
    rewritten(copied / 'experiment' / 'experiment.json', a_field_of_a_later_version=1, options=...)
    assert again() == []


def test_an_experiment_of_a_later_version_is_refused(again, copied, capfd):
    rewritten(copied / 'experiment' / 'experiment.json', values_version=99)
    with pytest.raises(AssertionError):
        again()
    error = capfd.readouterr().err
    assert 'of a later version' in error and 'values_version=99' in error
    assert error.count('\n') == 1


# ---------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize('name', ['single_old', 'single_new'])
def test_its_checkpoint_says_where_it_stands(name):
    held = loaded(name, 'summary.json')
    checkpoint = read_checkpoint(os.path.join(BEFORE, held['checkpoint']))
    assert (checkpoint.train_iter, checkpoint.env_step) == (held['train_iter'], held['env_step'])


@pytest.mark.slow
@pytest.mark.skipif(ON_MAIN, reason='its model is one of the released LightZero')
@pytest.mark.parametrize(('name', 'cache'), [('single_new', 'new'), ('single_old', 'old'), ('single_old', 'new')])
def test_its_checkpoint_is_gone_on_with(name, cache, copied):
    import_what_trainings_import()
    before = read_summary(name)
    in_place = cache == before.cache
    (code, said), = trained(copied, [
        '--config', before.config, '--cache', cache, '--seed', str(before.seed), '--resume', before.checkpoint,
        *(['--in-place'] if in_place else ['--exp-name', 'gone_on']),
        '--max-env-step', str(before.env_step + 20), *loaded('experiment', 'experiment.json')['options'][2:],
        BATCH
    ], short_episodes)
    assert code == 0, said
    assert f'Going on from {before.checkpoint}' in said
    folder = name if in_place else 'gone_on'
    after = read_summary(folder)
    assert (after.outcome, after.cache) == ('done', cache)
    assert after.env_step >= before.env_step + 20 and after.train_iter > before.train_iter
    assert len(os.listdir(os.path.join(folder, 'log', 'serial'))) == 1 + in_place
    if in_place:
        assert after.seconds > before.seconds
        assert after.evaluations[:len(before.evaluations)] == before.evaluations


# ---------------------------------------------------------------------------------------------------- refused


def test_the_backend_that_was_removed_is_refused_in_one_line(copied, capfd):
    there = sorted(os.listdir(copied))
    assert train(['--config', 'config_compile.py']) == 2
    error = capfd.readouterr().err
    assert "policy.model.world_model_cfg.kv_cache_cfg.backend='compile' was removed: use 'auto'" in error
    assert error.count('\n') == 1
    assert sorted(set(os.listdir(copied)) - {'__pycache__'}) == there
