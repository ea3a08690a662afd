"""Which runs are compared: sides, and the warnings that say which numbers are not comparable."""
import io
import json
import re
from pathlib import Path

import pytest
from event_runs import BEGAN, MACHINE, break_off, compared, event_file, pair, read, row, write_events, write_run
from matplotlib.figure import Figure
from rich.console import Console

from lzero_kvcache import ConfigError
from lzero_kvcache.comparison import compare_runs
from lzero_kvcache.comparison.judging import ALL, OF_A_WHOLE_RUN, OF_ONE_LENGTH, STOPPED, Caution
from lzero_kvcache.comparison.page import PANELS, _draw_panel, report_of
from lzero_kvcache.comparison.table import measures_table, runs_table, show

OF_WHOLE_RUNS = 'training times, host memory, counts and rewards are not comparable'
OF_OTHER_LENGTHS = 'training times, speeds, host memory, counts and rewards are not comparable'


# ---- sides and warnings ----------------------------------------------------------------------------------------------

class TestSides:

    def sides(self, folder, names, groups=(), **settings):
        for number, name in enumerate(names):
            write_run(folder / name, began=BEGAN + 1000 * number, config=False, **settings)
        comparison = compared(*(str(folder / name) for name in names), groups=groups)
        return {side.name: [run.name for run in side.runs] for side in comparison.sides}

    def test_names_without_their_seed(self, tmp_path):
        names = ['cartpole_lru_seed1', 'cartpole_lru_seed0_260101_120000', 'fifo-s3', 'fifo-s12', 'seed7', 'v2']
        assert self.sides(tmp_path, names) == {
            'cartpole_lru': names[:2], 'fifo': names[2:4], 'seed7': ['seed7'], 'v2': ['v2']
        }
        seeds = [run.seed for run in read(*(str(tmp_path / name) for name in names))]
        assert seeds == [1, 0, 3, 12, 7, None]

    def test_groups(self, tmp_path):
        names = ['x_lru_0', 'x_fifo_0', 'x_fifo_1', 'other']
        assert self.sides(tmp_path, names, groups=[('FIFO', '*_fifo_*'), ('LRU', '*lru*'), ('LRU', '*/x_*')]) == {
            'FIFO': names[1:3], 'LRU': names[:1], 'other': ['other']
        }

    def test_a_group_that_names_nothing(self, tmp_path):
        write_run(tmp_path / 'old_s0')
        with pytest.raises(ConfigError, match=r"--group a=b\*: it matches none of the runs \(old_s0\)"):
            compare_runs([str(tmp_path)], groups=[('a', 'b*')])
        with pytest.raises(ConfigError, match=r'--group b=old\*: the runs that it matches are all in earlier groups'):
            compare_runs([str(tmp_path)], groups=[('a', '*'), ('b', 'old*')])

    def test_the_old_system_comes_first(self, tmp_path):
        paths = pair(tmp_path)
        assert [side.name for side in compared(*reversed(paths)).sides] == ['old', 'new']
        groups = [('ours', 'new*')]
        comparison = compared(*paths, groups=groups)
        assert [side.name for side in comparison.sides] == ['ours', 'old']
        assert measures_table(comparison).headings[-1] == 'old against ours'

    def test_the_title_of_a_table_names_the_sides_that_it_shows(self, tmp_path):
        names = ('a', 'b', 'c')
        paths = [write_run(tmp_path / name, seed=seed, began=BEGAN + 1000 * seed) for seed, name in enumerate(names)]
        printed = io.StringIO()
        show(compared(*paths, groups=[(name, name) for name in names]), Console(file=printed, width=100))
        assert re.findall(r'Comparison: .*\S', printed.getvalue()) == ['Comparison: a / b', 'Comparison: a / c']


class TestWarnings:

    def warnings(self, *paths):
        return [warning.text for warning in compared(*paths).warnings if not warning.text.startswith('One run of')]

    def test_nothing_to_say(self, tmp_path):
        assert self.warnings(*pair(tmp_path)) == []

    @pytest.mark.parametrize(('new', 'expected'), [
        (dict(seed=4), 'Different seeds: old: 0; new: 4'),
        (dict(env_id='MsPacman-v0'), 'Different environments (old: CartPole-v0; new: MsPacman-v0): nothing here is '
         'comparable'),
        (dict(env_steps=2000), f'Different budgets of environment steps (old: 1,000; new: 2,000): {OF_OTHER_LENGTHS}'),
    ])
    def test_what_a_run_was(self, tmp_path, new, expected):
        assert self.warnings(*pair(tmp_path, new=new)) == [expected]

    @pytest.mark.parametrize(('summary', 'expected'), [
        (dict(machine={**MACHINE, 'cpus': 64}), ['Different numbers of CPUs (old: 2; new: 64): times and memory are '
                                                 'not comparable']),
        (dict(machine={**MACHINE, 'gpu': 'H100'}), ['Different GPUs (old: none; new: H100): times and memory are not '
                                                    'comparable']),
        (dict(device='cuda'), ['Different devices (old: cpu; new: cuda): times and memory are not comparable']),
        (dict(processes=2), ['Different numbers of processes (old: 1; new: 2): times and memory are not comparable']),
        (dict(outcome='interrupted by SIGINT'), [f'new_seed0 has 1:40 for 1,000 environment steps (interrupted by '
                                                 f'SIGINT): {OF_WHOLE_RUNS}']),
        (dict(outcome='interrupted by SIGINT', env_step=900, seconds=90.),
         [f'new_seed0 has 1:30 for 900 of 1,000 environment steps (interrupted by SIGINT): {OF_WHOLE_RUNS}']),
        (dict(outcome=STOPPED), [
            f'Different ends (old: done; new: {STOPPED}): {OF_WHOLE_RUNS}',
            'new_seed0 ended when its reward reached env.stop_value, after 1,000 environment steps']),
        (dict(max_train_iter=50), []),
        (dict(versions=dict(LightZero='0.1.0', lzero_kvcache='0.2.0', commit='b')), [
            'Different versions of LightZero (old: 0.2.0; new: 0.1.0): what differs may come from these',
            'Different commits (old: a; new: b): what differs may come from these']),
    ])
    def test_what_a_summary_says(self, tmp_path, summary, expected):
        paths = pair(tmp_path)
        path, base = tmp_path / 'new_seed0' / 'summary.json', tmp_path / 'old_seed0' / 'summary.json'
        held = dict(json.loads(base.read_text()), versions=dict(LightZero='0.2.0', lzero_kvcache='0.2.0', commit='a'))
        base.write_text(json.dumps(held))
        path.write_text(json.dumps({**json.loads(path.read_text()), **summary}))
        assert self.warnings(*paths) == expected

    def test_runs_of_other_budgets_are_no_spread(self, tmp_path):
        """Also where all runs are of one side, as a first look and a full training are."""
        comparison = compared(*(write_run(tmp_path / f'new_{steps}', new=True, env_steps=steps, began=BEGAN + steps,
                                          summary=dict(max_env_step=steps)) for steps in (300, 5000)))
        said = ' '.join(warning.text for warning in comparison.warnings)
        assert f'Different budgets of environment steps (new: 300, 5,000): {OF_OTHER_LENGTHS}' in said
        spreads = {name: row(comparison, name).spreads['new'] for name in ('seconds', 'last_reward', 'init_hit_rate')}
        assert {name: spread and spread.runs for name, spread in spreads.items()} == dict(
            seconds=None, last_reward=None, init_hit_rate=2)
        assert list(row(comparison, 'seconds').values.values()) == [100., 100.]

    def test_budgets_of_runs_without_a_summary(self, tmp_path):
        paths = [write_run(tmp_path / 'old_s0'),
                 write_run(tmp_path / 'new_s0', new=True, env_steps=740, began=BEGAN + 500)]
        assert self.warnings(*paths) == [
            f'Different lengths in environment steps (old: old_s0 1,000; new: new_s0 740): {OF_OTHER_LENGTHS}']

    def test_runs_of_one_budget_that_ends_some_steps_later(self, tmp_path):
        """As a first look with three seeds: what one step takes is comparable, what all of them take is not."""
        lengths = dict(old_s0=389, old_s1=414, old_s2=342, new_s0=346, new_s1=350, new_s2=300)
        paths = [write_run(tmp_path / name, new='new' in name, seed=int(name[-1]), began=BEGAN + 1000 * number,
                           env_steps=steps, summary=dict(max_env_step=300))
                 for number, (name, steps) in enumerate(lengths.items())]
        comparison = compared(*paths)
        assert [warning.text for warning in comparison.warnings] == [
            'Different lengths (old: old_s2 342, old_s1 414; new: new_s2 300, new_s1 350) under one budget of 300 '
            'environment steps, which the last collection goes beyond: training times, host memory, counts and rewards '
            'are not comparable; a longer budget makes them alike']
        ratios = {row.measure.name: row.ratios['new'] for row in comparison.rows}
        assert [name for name in ('env_steps_per_second', 'search_ms', 'step_ms', 'init_hit_rate', 'seconds',
                                  'last_reward') if ratios[name] is None] == ['seconds', 'last_reward']

    @pytest.mark.parametrize('share', [0.5, 0.9])
    def test_the_length_of_a_run_is_that_of_its_summary(self, share, tmp_path):
        """Not that of its event file, if that is damaged."""
        paths = pair(tmp_path, new=dict(search_ms=range(100)))
        break_off(paths[1], share)
        [warning] = self.warnings(*paths)
        assert re.fullmatch(r'new_seed0: events\.\S+ breaks off or is damaged: its events end at step [\d,]+ of 1,000',
                            warning)
        assert row(compared(*paths), 'seconds').ratios['new'] == 1

    def test_a_damaged_run_without_a_summary_is_not_whole(self, tmp_path):
        paths = [write_run(tmp_path / 'old_s0', search_ms=range(100)),
                 write_run(tmp_path / 'new_s0', new=True, search_ms=range(100), began=BEGAN + 500)]
        break_off(paths[1], 0.9)
        comparison = compared(*paths)
        [said] = [text for text, blocks in comparison.warnings if blocks]
        assert re.match(r'new_s0 has 1:[23]\d for [89]\d\d environment steps \(its event files are damaged\): ', said)
        assert (row(comparison, 'seconds').ratios, row(comparison, 'seconds').spreads['new']) == ({'new': None}, None)

    def test_lengths_that_differ_a_little(self, tmp_path):
        """Times are compared, and what is not the cache's in them is said."""
        paths = pair(tmp_path, new=dict(env_steps=880))
        path = tmp_path / 'new_seed0' / 'summary.json'
        path.write_text(json.dumps({**json.loads(path.read_text()), 'max_env_step': 1000}))
        assert self.warnings(*paths) == [
            'Training times are of different numbers of environment steps (medians, old: 1,000; new: 880), which makes '
            'some of their difference; environment steps per second are without it']
        assert row(compared(*paths), 'seconds').ratios['new'] == 1

    def test_hosts(self, tmp_path):
        paths = pair(tmp_path)
        path = event_file(paths[1])
        path.rename(path.with_name('events.out.tfevents.1700000000.far.away.12.0'))
        [warning] = self.warnings(*paths)
        assert warning.startswith('Different hosts (old: ')
        assert warning.endswith('; new: far.away): times are comparable if these are of one kind')

    @pytest.mark.parametrize(('new', 'summary', 'without', 'with_one'), [
        (dict(env_id='MsPacman-v0'), {}, ('seconds', 'cache_memory_mb', 'init_hit_rate', 'last_reward'), ()),
        (dict(env_steps=300), {}, ('seconds', 'env_step', 'env_steps_per_second', 'last_reward', 'evictions',
                                   'host_memory_mb'), ('search_ms', 'cache_memory_mb', 'init_hit_rate')),
        ({}, dict(machine={**MACHINE, 'cpus': 64}), ('seconds', 'search_ms', 'host_memory_mb'),
         ('init_hit_rate', 'last_reward')),
        ({}, {}, (), ('seconds', 'search_ms', 'cache_memory_mb', 'init_hit_rate', 'last_reward')),
    ])
    def test_what_is_not_comparable_has_no_ratio(self, tmp_path, new, summary, without, with_one):
        paths = pair(tmp_path, new=new)
        path = tmp_path / 'new_seed0' / 'summary.json'
        path.write_text(json.dumps({**json.loads(path.read_text()), **summary}))
        comparison = compared(*paths)
        verdicts = {row.measure.name: cells[-1] for row, cells in zip(comparison.rows,
                                                                      measures_table(comparison).rows)}
        for name in without:
            assert (row(comparison, name).ratios['new'], verdicts[name]) == (None, '-')
        for name in with_one:
            assert row(comparison, name).ratios['new'] is not None
            assert verdicts[name] != '-'
        assert any(caution.blocks for caution in comparison.warnings) is bool(without)

    def test_runs_at_the_same_time(self, tmp_path):
        paths = [write_run(tmp_path / 'old_s0'), write_run(tmp_path / 'new_s0', new=True, began=BEGAN + 99)]
        assert self.warnings(*paths) == [
            'Runs went on at the same time on one machine, as old_s0 and new_s0: they took time from each other'
        ]

    def test_one_side(self, tmp_path):
        paths = [write_run(tmp_path / f'old_s{seed}', seed=seed, began=BEGAN + 1000 * seed) for seed in range(2)]
        comparison = compared(*paths)
        assert [warning.text for warning in comparison.warnings] == [
            "All runs are of one side, 'old': there is nothing to compare it to (--group makes sides)"
        ]
        assert measures_table(comparison).headings == ['median [least, greatest]', 'old, 2 runs']
        assert runs_table(comparison).headings == ['run', 'old_s0', 'old_s1']


class TestParts:
    """Runs that went on from a checkpoint in a folder of their own have a part of a training's time."""

    def test_a_part_is_not_compared_with_a_whole_run(self, tmp_path):
        paths = pair(tmp_path, old=dict(seconds=130.), new=dict(seconds=12., resumed_at=614, env_steps=1046))
        path = tmp_path / 'new_seed0' / 'summary.json'
        path.write_text(json.dumps({**json.loads(path.read_text()), 'max_env_step': 1000}))
        comparison = compared(*paths)
        assert Caution('new_seed0 has 0:12 for 432 of its 1,046 environment steps (it went on from a checkpoint at '
                       f'614): {OF_OTHER_LENGTHS}', OF_ONE_LENGTH) in comparison.warnings
        cells = {cells[0]: cells[1:] for cells in measures_table(comparison).rows}
        assert cells['training time'] == ['2:10', '-', '-']
        assert cells['last reward'] == ['150.0', '-', '-']
        assert cells['environment steps per second'] == ['7.69', '36.0', '-']
        assert cells['search, ms'] == ['60.0', '60.0', 'the same']
        printed = io.StringIO()
        show(comparison, Console(file=printed, width=200))
        assert re.search(r'Each run\b.*│ training time +│ +2:10 │ +0:12 │', printed.getvalue(), re.DOTALL)

    def test_the_speed_of_a_part_that_is_about_as_long(self, tmp_path):
        comparison = compared(*pair(tmp_path, new=dict(seconds=40., resumed_at=200)))
        assert Caution('new_seed0 has 0:40 for 800 of its 1,000 environment steps (it went on from a checkpoint at '
                       f'200): {OF_WHOLE_RUNS}', OF_A_WHOLE_RUN) in comparison.warnings
        assert row(comparison, 'env_steps_per_second').ratios == {'new': 0.5}
        assert row(comparison, 'seconds').ratios == {'new': None}

    def test_a_part_of_lightzeros_own_entry(self, tmp_path):
        """It counts environment steps anew, and its summary does not say that it went on."""
        paths = pair(tmp_path)
        part = Path(write_run(tmp_path / 'new_part', new=True, summary={}, began=BEGAN + 2000, resumed_at=288))
        text = (part / 'total_config.py').read_text()
        loaded = "'learn': {'learner': {'hook': {'load_ckpt_before_run': 'new_seed0/ckpt/iteration_72.pth.tar'}}},"
        (part / 'total_config.py').write_text(text.replace("'learning_rate'", f"{loaded} 'learning_rate'"))
        path = part / 'summary.json'
        path.write_text(json.dumps({**json.loads(path.read_text()), 'resumed_at': []}))
        comparison = compared(*paths, str(part))
        assert ('new_part has 1:40 for 1,000 environment steps (it went on from a checkpoint of iteration 72): '
                f'{OF_WHOLE_RUNS}', OF_A_WHOLE_RUN) in comparison.warnings
        assert row(comparison, 'seconds').ratios == {'new': 1, 'new_part': None}
        assert ('new_part went on with an empty replay buffer at iteration 72, which bends its curves'
                in [warning.text for warning in comparison.warnings])

    def test_a_part_in_place_has_its_own_time(self, tmp_path):
        """LightZero's own entry was killed, and nothing says what it had taken; nor does a summary of the other run."""
        part = write_run(tmp_path / 'new_s0', new=True, env_steps=500, seconds=90.,
                         summary=dict(resumed_at=[500], earlier=[], env_step=900, max_env_step=None))
        write_events(tmp_path / 'new_s0' / 'log' / 'serial', [
            (at, step, 'kv_cache_step/memory_mb', 2.) for at, step in ((0, 501), (50, 900))], BEGAN + 500)
        comparison = compared(part, write_run(tmp_path / 'old_s0', began=BEGAN + 2000))
        assert any(text.startswith('new_s0 has 0:50 for 400 of its 900 environment steps (it went on from a checkpoint '
                                   'at 500): ') for text, _ in comparison.warnings)
        assert row(comparison, 'env_steps_per_second').values['new_s0'] == 8

    @pytest.mark.parametrize('summary', [{}, None])
    def test_a_run_and_its_continuation_are_no_repeats(self, summary, tmp_path):
        """With train.py's summaries, and by the event files alone."""
        whole = write_run(tmp_path / 'new_whole', new=True, summary=summary, env_steps=1000)
        part = write_run(tmp_path / 'new_part', new=True, summary=summary, began=BEGAN + 500, seconds=50.,
                         resumed_at=500, env_steps=1000)
        comparison = compared(whole, part)
        assert [[run.name for run in side.runs] for side in comparison.sides] == [['new_whole'], ['new_part']]
        assert row(comparison, 'seconds').ratios == {'new_part': None}
        assert row(comparison, 'env_steps_per_second').values == {'new_whole': 10, 'new_part': 10}
        grouped = compared(whole, part, groups=[('all', 'new_*')])
        assert {spread for each in grouped.rows for spread in each.spreads.values()} == {None}
        assert Caution("Of 'all', new_part went on from a checkpoint, and other runs did not: they are no repeats of "
                       'each other', ALL) in grouped.warnings

    def test_parts_of_one_training(self, tmp_path):
        """The second went on from the first, or both from one checkpoint; with other seeds they would be repeats."""
        parts = [write_run(tmp_path / f'new_{number}', new=True, summary={}, began=BEGAN + number, resumed_at=number,
                           seed=number // 700) for number in (500, 600, 700)]
        said = 'went on from checkpoints with one seed: they are taken to be parts or copies of one training, and no '
        for paths, together in ((parts[:2], True), (parts[1:], False)):
            comparison = compared(*paths)
            assert any(said in text for text, _ in comparison.warnings) is together
            assert (row(comparison, 'init_hit_rate').spreads['new'] is None) is together
            assert row(comparison, 'seconds').spreads['new'] is None

    def test_a_copy_is_no_repeat(self, tmp_path):
        """As a folder that was copied before its training went on."""
        paths = [write_run(tmp_path / name, new=True, summary={}, env_steps=steps)
                 for name, steps in (('new_seed0', 1000), ('new_seed0_copy', 1100))]
        comparison = compared(*paths)
        assert ('new_seed0 and new_seed0_copy began at the same moment: they are taken to be parts or copies of one '
                'training, and no repeats of each other', ALL) in comparison.warnings
        assert {spread for each in comparison.rows for spread in each.spreads.values()} == {None}

    @pytest.mark.parametrize('groups', [[], [('a', '*_copy'), ('b', '*')]], ids=['one side', 'two sides'])
    def test_branches_of_one_training_are_told_by_its_id(self, groups, tmp_path):
        """As two copies of a folder that both went on, one after the other: what they have in common shared nothing."""
        paths = [write_run(tmp_path / name, new=True, summary=dict(run_id='a'), seed=seed)
                 for seed, name in enumerate(('new_s0', 'new_s0_copy'))]
        for number, path in enumerate(paths, 1):
            write_events(Path(path) / 'log' / 'serial', [(at, 1000 + at, 'kv_cache_step/memory_mb', 2.)
                                                         for at in (1, 100)], BEGAN + 1000 * number)
        comparison = compared(*paths, groups=groups)
        names = ' and '.join(run.name for run in comparison.runs)
        assert comparison.warnings[0] == (f'{names} are copies or branches of one training, and not two: nothing is '
                                          'comparable between them', ALL)
        assert not any('at the same time' in text or 'no repeats' in text for text, _ in comparison.warnings)
        assert {ratio for each in comparison.rows for ratio in each.ratios.values()} <= {None}
        (tmp_path / 'new_s0' / 'summary.json').write_text(json.dumps(dict(run_id='b')))
        assert not any(text.startswith(names) for text, _ in compared(*paths, groups=groups).warnings)

    def test_a_run_that_went_on_in_place_is_whole(self, tmp_path):
        paths = pair(tmp_path, new=dict(seconds=120.))
        path = tmp_path / 'new_seed0' / 'summary.json'
        held = {**json.loads(path.read_text()), 'resumed_at': [500], 'earlier': [dict(command=[], overrides=[])]}
        path.write_text(json.dumps(held))
        assert row(compared(*paths), 'seconds').ratios['new'] == pytest.approx(100 / 120)
        path.write_text(json.dumps({**held, 'earlier': []}))  # nothing was left of the part before
        assert row(compared(*paths), 'seconds').ratios['new'] is None

    def test_curves_against_minutes_are_without_parts(self, tmp_path):
        paths = pair(tmp_path, new=dict(resumed_at=500))
        comparison = compared(*paths)
        for panel in PANELS:
            axes = Figure().add_subplot()
            _draw_panel(axes, panel, comparison)
            assert len(axes.lines) == (2 if panel.against == 'environment steps' else 1)
        report = report_of(comparison)
        assert ('Curves against minutes are without new_seed0: the minutes before its checkpoint are not known.'
                in report)
        assert report.index('new_seed0 has 1:40 for') < report.index('new_seed0 went on with an empty replay buffer')


def test_a_run_that_went_on_without_its_replay_buffer_is_marked(tmp_path):
    paths = [write_run(tmp_path / 'old_s0', summary=dict(resumed_at=[1200])), write_run(tmp_path / 'new_s0', new=True)]
    said = [warning.text for warning in compared(*paths).warnings]
    assert 'old_s0 went on with an empty replay buffer at 1,200 environment steps, which bends its curves' in said


def test_other_trainings_are_told_of_above_the_table(tmp_path):
    """By the keys in which configs differ, but for those of the cache."""
    paths = pair(tmp_path)
    assert not [warning for warning in compared(*paths).warnings if 'configs differ' in warning.text]
    config = Path(paths[1]) / 'total_config.py'
    others = "'batch_size': 8, 'gamma': 1, 'rate': 2, 'rate_of'"
    config.write_text(config.read_text().replace("'learning_rate'", others))
    first, *_ = compared(*paths).warnings
    assert first.text == ('The configs differ in more than the cache, in policy.batch_size, policy.gamma, '
                          'policy.learning_rate and 2 more: what differs may come from these')
    printed = io.StringIO()
    show(compared(*paths), Console(file=printed, width=100))
    assert printed.getvalue().index('The configs differ') < printed.getvalue().index('training time')


def test_more_runs_of_one_seed_are_no_other_seeds(tmp_path):
    paths = [*pair(tmp_path), write_run(tmp_path / 'new_again_seed0', new=True, summary={}, began=BEGAN + 2000)]
    said = [warning.text for warning in compared(*paths).warnings]
    assert "More than one run of 'new' has seed 0: their spread is not one of seeds" in said
    assert not [text for text in said if text.startswith('Different seeds')]


def test_the_plugins_own_hooks_are_no_difference_of_configs(tmp_path):
    paths = pair(tmp_path)
    for path, hooks in zip(paths, ({}, {'kv_cache_stats': {'name': 'a', 'priority': 15}})):
        learn = {'learner': {'hook': {'log_show_after_iter': len(hooks), **hooks}}}
        (Path(path) / 'total_config.py').write_text(f'exp_config = {{"policy": {{"learn": {learn}}}}}')
    assert list(compared(*paths).differences) == ['policy.learn.learner.hook.log_show_after_iter']
