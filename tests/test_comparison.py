"""Comparing runs: exact numbers, sides, warnings, and what is printed and written."""
import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from event_runs import (
    BEGAN,
    MACHINE,
    break_off,
    compare_json,
    compared,
    event_file,
    pair,
    read,
    row,
    write_events,
    write_run,
)
from forks import environment
from matplotlib.figure import Figure
from rich.console import Console

from lzero_kvcache import ConfigError
from lzero_kvcache.__main__ import main
from lzero_kvcache.comparison import compare_runs
from lzero_kvcache.comparison.comparable import ALL, OF_A_WHOLE_RUN, OF_ONE_LENGTH, STOPPED, Caution
from lzero_kvcache.comparison.judging import MEASURES, summed_up
from lzero_kvcache.comparison.page import PANELS, _draw_panel, report_of
from lzero_kvcache.comparison.table import default_console, measures_table, origin, runs_table, show

OF_WHOLE_RUNS = 'training times, host memory, counts and rewards are not comparable'
OF_OTHER_LENGTHS = 'training times, speeds, host memory, counts and rewards are not comparable'
FLAG = 'policy.model.world_model_cfg.use_new_cache_manager'
ROOT = Path(__file__).resolve().parents[1]


# ---- a whole comparison: three seeds a side, one torn at its start, one empty, one of another environment ------------

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    for seed in range(3):
        write_run(folder / f'cartpole_old_seed{seed}', seed=seed, seconds=100. + 10 * seed, began=BEGAN + 1000 * seed,
                  rewards=(10., 190. - 20 * seed, 150. + 10 * seed), hits=(50, 100 + 8 * seed), queries=(100, 200),
                  search_ms=(90., 70., 80.), step_ms=(4. + seed, 2. + seed))
        write_run(folder / f'cartpole_new_seed{seed}', new=True, seed=seed, seconds=50. + 5 * seed,
                  began=BEGAN + 1000 * seed + 500, rewards=(20., 100. + 50 * seed), hits=(99, 200), queries=(99, 200),
                  search_ms=(20., 20., 20.), step_ms=(1., 1.5), memory_mb=(1., 1.5, 1.25), evictions=(0., 10. * seed))
    write_run(folder / 'cartpole_old_seed3', seed=3)
    break_off(folder / 'cartpole_old_seed3', 0.01)
    write_run(folder / 'cartpole_new_seed3', new=True, seed=3)
    event_file(folder / 'cartpole_new_seed3').write_bytes(b'')
    write_run(folder / 'pong_new_seed0', new=True, env_id='PongNoFrameskip-v4', began=BEGAN + 9000,
              rewards=(-21., -20.))
    printed = io.StringIO()
    compare_runs([str(folder)], str(folder / 'out'), console=Console(file=printed, width=110))
    return folder / 'out', printed.getvalue()


@pytest.fixture(scope='module')
def data(whole):
    return compare_json(whole[0])


class TestWhole:

    def test_sides(self, whole, data):
        assert data['baseline'] == 'old'
        assert [(side['name'], [run['seed'] for run in side['runs']]) for side in data['sides']] == [
            ('old', [0, 1, 2]), ('cartpole_new', [0, 1, 2]), ('pong_new', [0])
        ]

    @pytest.mark.parametrize(('name', 'old', 'new', 'ratio'), [
        # least, greatest, median
        ('seconds', (100, 120, 110), (50, 60, 55), 2),
        ('env_step', (1000, 1000, 1000), (1000, 1000, 1000), 1),
        ('search_ms', (80, 80, 80), (20, 20, 20), 4),
        ('step_ms', (3, 5, 4), (1.25, 1.25, 1.25), 3.2),
        ('host_memory_mb', (640, 640, 640), (640, 640, 640), 1),
        ('cache_memory_mb', (2, 2, 2), (1.5, 1.5, 1.5), 4 / 3),
        ('init_hit_rate', (0.5, 0.58, 0.54), (1, 1, 1), 0.54),
        ('last_reward', (150, 170, 160), (100, 200, 150), 160 / 150),
        ('best_reward', (170, 190, 170), (100, 200, 150), 170 / 150),
    ])
    def test_numbers(self, data, name, old, new, ratio):
        [measure] = [measure for measure in data['measures'] if measure['name'] == name]
        for side, expected in (('old', old), ('cartpole_new', new)):
            spread = measure['sides'][side]
            assert [spread[key] for key in ('low', 'high', 'centre')] == pytest.approx(expected)
            assert (spread['runs'], spread['statistic']) == (3, 'median')
        assert measure['ratios']['cartpole_new'] == pytest.approx(ratio)

    def test_what_one_side_does_not_have(self, data):
        measures = {measure['name']: measure for measure in data['measures']}
        assert measures['evictions']['sides']['old'] is None
        assert measures['evictions']['sides']['cartpole_new']['centre'] == 10
        assert measures['evictions']['ratios']['cartpole_new'] is None
        assert measures['device_memory_mb']['sides'] == dict.fromkeys(('old', 'cartpole_new', 'pong_new'))
        assert {measure['ratios']['pong_new'] for measure in data['measures']} == {None}  # of another environment

    def test_the_table(self, whole):
        lines = [[cell.strip() for cell in re.split('[│┃]', line)[1:-1]] for line in whole[1].split('\n')]
        assert ['median [least, greatest]', 'old, 3 runs', 'cartpole_new, 3 runs', 'cartpole_new against old'] in lines
        assert ['training time', '1:50 [1:40, 2:00]', '0:55 [0:50, 1:00]', '2.00 x faster'] in lines
        assert ['environment steps', '1,000', '1,000', '-'] in lines
        assert ['environment steps', '1,000', '1,000', 'the same'] not in lines
        assert ['peak cache memory, MiB', '2.00', '1.50', '1.33 x less'] in lines
        assert ['hit rate, roots', '54.0% [50.0%, 58.0%]', '100.0%', '46.0 points higher'] in lines
        assert ['evictions', '-', '10 [0, 20]', '-'] in lines
        assert ['peak device memory, MiB', '-', '-', '-'] in lines
        assert ['last reward', '160.0 [150.0, 170.0]', '150.0 [100.0, 200.0]', '10.0 lower'] in lines
        assert ['search, ms', '80.0', '60.0', '-'] in lines  # of another environment

    @pytest.mark.parametrize(('old', 'new', 'said'), [
        (10.75, 9.5, ['10.8', '9.50', '1.3 lower']), (-10.75, -9.5, ['-10.8', '-9.50', '1.3 higher']),
        (1000.5, 9.5, ['1,000', '9.50', '990 lower']), (9.503, 9.5, ['9.50', '9.50', 'the same']),
    ])
    def test_a_difference_is_that_of_the_numbers_shown(self, old, new, said, tmp_path):
        paths = pair(tmp_path, old=dict(rewards=(old, )), new=dict(rewards=(new, )))
        rows = {cells[0]: cells[1:] for cells in measures_table(compared(*paths)).rows}
        assert rows['last reward'] == said

    def test_config_differences(self, whole, data):
        assert data['config_differences'] == [
            dict(key='env.env_id', values={'old': "'CartPole-v0'", 'cartpole_new': "'CartPole-v0'",
                                           'pong_new': "'PongNoFrameskip-v4'"}),
            dict(key=FLAG, values={'old': 'False', 'cartpole_new': 'True', 'pong_new': 'True'}),
        ]
        assert FLAG in whole[1]

    def test_one_line_for_each_run_that_cannot_be_read(self, whole, data):
        lines = [line for line in whole[1].split('\n') if 'left out' in line]
        assert len(lines) == 2
        assert re.fullmatch(r'cartpole_new_seed3 is left out: no scalar in events\.\S+', lines[0])
        assert re.fullmatch(r'cartpole_old_seed3 is left out: events\.\S+ breaks off or is damaged', lines[1])
        assert list(data['left_out']) == ['cartpole_new_seed3', 'cartpole_old_seed3']

    def test_warnings(self, whole, data):
        assert data['warnings'] == [
            'Other environments (old: CartPole-v0; cartpole_new: CartPole-v0; pong_new: PongNoFrameskip-v4): nothing '
            'here is comparable',
            'Other seeds: old: 0, 1, 2; cartpole_new: 0, 1, 2; pong_new: 0',
            "One run of 'pong_new': without a spread, chance cannot be told from effect",
        ]
        lines = whole[1].split('\n')
        table = next(index for index, line in enumerate(lines) if line.startswith('Comparison: '))
        reason, *others = [lines.index(f'WARNING: {warning}') for warning in data['warnings']]
        assert reason < table < min(others)


class Page(HTMLParser):
    """The page's tables, whatever it refers to, and what its tags hold."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.references, self.tags, self._text = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.references += [attributes[name] for name in ('src', 'srcset', 'href') if name in attributes]
        if tag == 'table':
            self.tables.append([])
        elif tag == 'tr':
            self.tables[-1].append([])
        elif tag in ('td', 'th'):
            self.tables[-1][-1].append('')
            self._text = True

    def handle_endtag(self, tag):
        if tag in ('td', 'th'):
            self._text = None

    def handle_data(self, data):
        if self._text:
            self.tables[-1][-1][-1] += data


class TestPage:

    @pytest.fixture(scope='class')
    def text(self, whole):
        return (whole[0] / 'report.html').read_text(encoding='utf-8')

    @pytest.fixture(scope='class')
    def page(self, text):
        return Page(text)

    def test_every_row_of_the_terminal(self, whole, page):
        printed = [[cell.strip() for cell in re.split('[│┃]', line)[1:-1]] for line in whole[1].split('\n')]
        printed = [row for row in printed if row]
        measures, configs, runs = page.tables
        assert [row[:4] for row in measures] == printed[:len(measures)]
        assert configs == printed[-len(configs):]
        assert len(measures) == 1 + len(MEASURES)
        assert len(runs) == 3 + len(MEASURES)

    def test_every_run(self, page):
        names = [f'cartpole_{side}_seed{seed}' for side in ('old', 'new') for seed in range(3)]
        runs_of_page = page.tables[2]
        assert runs_of_page[0] == ['run', *names, 'pong_new_seed0']
        assert runs_of_page[2] == ['seed', '0', '1', '2', '0', '1', '2', '0']
        assert runs_of_page[3] == ['training time', '1:40', '1:50', '2:00', '0:50', '0:55', '1:00', '1:40']

    def test_every_warning(self, text, data):
        for line in [*data['warnings'], *data['left_out'].values()]:
            assert line.replace("'", '&#x27;') in text
        assert '<footer class="quiet"><p>Trained 2023-11-14 22:13 to ' in text

    def test_it_needs_nothing_but_itself(self, page, text):
        assert page.references and all(link.startswith('data:image/png;base64,') for link in page.references)
        assert not re.search(r'url\(|@import|https?:', text)
        assert not [tag for tag, _ in page.tags if tag in ('script', 'link', 'iframe')]
        assert ('meta', {'http-equiv': 'Content-Security-Policy',
                         'content': "default-src 'none'; img-src data:; style-src 'unsafe-inline'"}) in page.tags

    def test_who_cannot_see_it(self, page):
        tags = page.tags
        assert ('html', {'lang': 'en'}) in tags
        assert [tag for tag, _ in tags].count('caption') == [tag for tag, _ in tags].count('table') == 3
        assert all(attributes.get('scope') in ('col', 'row') for tag, attributes in tags if tag == 'th')
        [image] = [attributes for tag, attributes in tags if tag == 'img']
        assert 'Reward of evaluations against environment steps' in image['alt']

    def test_names_are_text(self, tmp_path):
        paths = [write_run(tmp_path / '<b>$old_{s0', config=False), write_run(tmp_path / '_[red]new_s0', config=False)]
        printed = io.StringIO()
        compare_runs(paths, str(tmp_path / 'out'), console=Console(file=printed, width=200))
        assert '_[red]new' in printed.getvalue()
        page = (tmp_path / 'out' / 'report.html').read_text(encoding='utf-8')
        assert '<b>' not in page
        assert '&lt;b&gt;$old_{s0, 1 run' in page


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
        (dict(seed=4), 'Other seeds: old: 0; new: 4'),
        (dict(env_id='MsPacman-v0'), 'Other environments (old: CartPole-v0; new: MsPacman-v0): nothing here is '
         'comparable'),
        (dict(env_steps=2000), f'Other budgets of environment steps (old: 1,000; new: 2,000): {OF_OTHER_LENGTHS}'),
    ])
    def test_what_a_run_was(self, tmp_path, new, expected):
        assert self.warnings(*pair(tmp_path, new=new)) == [expected]

    @pytest.mark.parametrize(('summary', 'expected'), [
        (dict(machine={**MACHINE, 'cpus': 64}), ['Other numbers of CPUs (old: 2; new: 64): times and memory are not '
                                                 'comparable']),
        (dict(machine={**MACHINE, 'gpu': 'H100'}), ['Other GPUs (old: none; new: H100): times and memory are not '
                                                    'comparable']),
        (dict(device='cuda'), ['Other devices (old: cpu; new: cuda): times and memory are not comparable']),
        (dict(processes=2), ['Other numbers of processes (old: 1; new: 2): times and memory are not comparable']),
        (dict(outcome='interrupted by SIGINT'), [f'new_seed0 has 1:40 for 1,000 environment steps (interrupted by '
                                                 f'SIGINT): {OF_WHOLE_RUNS}']),
        (dict(outcome='interrupted by SIGINT', env_step=900, seconds=90.),
         [f'new_seed0 has 1:30 for 900 of 1,000 environment steps (interrupted by SIGINT): {OF_WHOLE_RUNS}']),
        (dict(outcome=STOPPED), [
            f'Other ends (old: done; new: {STOPPED}): {OF_WHOLE_RUNS}',
            'new_seed0 ended when its reward reached env.stop_value, after 1,000 environment steps']),
        (dict(max_train_iter=50), []),
        (dict(versions=dict(LightZero='0.1.0', lzero_kvcache='0.2.0', commit='b')), [
            'Other versions of LightZero (old: 0.2.0; new: 0.1.0): what differs may come from these',
            'Other commits (old: a; new: b): what differs may come from these']),
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
        assert f'Other budgets of environment steps (new: 300, 5,000): {OF_OTHER_LENGTHS}' in said
        spreads = {name: row(comparison, name).spreads['new'] for name in ('seconds', 'last_reward', 'init_hit_rate')}
        assert {name: spread and spread.runs for name, spread in spreads.items()} == dict(
            seconds=None, last_reward=None, init_hit_rate=2)
        assert list(row(comparison, 'seconds').values.values()) == [100., 100.]

    def test_budgets_of_runs_without_a_summary(self, tmp_path):
        paths = [write_run(tmp_path / 'old_s0'),
                 write_run(tmp_path / 'new_s0', new=True, env_steps=740, began=BEGAN + 500)]
        assert self.warnings(*paths) == [
            f'Other lengths in environment steps (old: old_s0 1,000; new: new_s0 740): {OF_OTHER_LENGTHS}']

    def test_runs_of_one_budget_that_ends_some_steps_later(self, tmp_path):
        """As a first look with three seeds: what one step takes is comparable, what all of them take is not."""
        lengths = dict(old_s0=389, old_s1=414, old_s2=342, new_s0=346, new_s1=350, new_s2=300)
        paths = [write_run(tmp_path / name, new='new' in name, seed=int(name[-1]), began=BEGAN + 1000 * number,
                           env_steps=steps, summary=dict(max_env_step=300))
                 for number, (name, steps) in enumerate(lengths.items())]
        comparison = compared(*paths)
        assert [warning.text for warning in comparison.warnings] == [
            'Other lengths (old: old_s2 342, old_s1 414; new: new_s2 300, new_s1 350) under one budget of 300 '
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
            'Training times are of other numbers of environment steps (medians, old: 1,000; new: 880), which makes '
            'some of their difference; environment steps per second are without it']
        assert row(compared(*paths), 'seconds').ratios['new'] == 1

    def test_hosts(self, tmp_path):
        paths = pair(tmp_path)
        path = event_file(paths[1])
        path.rename(path.with_name('events.out.tfevents.1700000000.far.away.12.0'))
        [warning] = self.warnings(*paths)
        assert warning.startswith('Other hosts (old: ')
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

    def test_two_runs_of_one_seed(self, tmp_path):
        paths = [write_run(tmp_path / name, new=True, summary={}, began=BEGAN + 500 * number)
                 for number, name in enumerate(('new_a', 'new_b'))]
        said = [warning.text for warning in compared(*paths).warnings]
        assert "More than one run of 'new' has seed 0: their spread is not one of seeds" in said

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


# ---- many runs, mixed runs, and where runs come from -----------------------------------------------------------------

class TestManyRuns:

    @pytest.fixture(scope='class')
    def paths(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp('many')
        return [write_run(folder / f'{side}_s{seed}', new=side == 'new', seed=seed, config=False,
                          began=BEGAN + 1000 * (2 * seed + (side == 'new')), rewards=(0., float(reward)))
                for side, factor in (('old', 1), ('new', 2))
                for seed, reward in enumerate(factor * np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 1000]))]

    def test_nine_seeds_have_a_median(self, paths):
        nine = [path for path in paths if not path.endswith('_s9')]
        spread = row(compared(*nine), 'last_reward').spreads['old']
        assert (spread.statistic, spread.centre, spread.low, spread.high) == ('median', 4, 1, 9)

    def test_ten_seeds_have_an_interquartile_mean(self, paths):
        """Without the two least and the two greatest of ten, as rliable's ``trim_mean(proportiontocut=0.25)``."""
        comparison = compared(*paths)
        spread = row(comparison, 'last_reward').spreads['old']
        assert (spread.statistic, spread.centre) == ('interquartile mean', pytest.approx((2 + 3 + 4 + 5 + 5 + 6) / 6))
        assert spread.low < spread.centre < spread.high
        assert measures_table(comparison).headings[0] == 'interquartile mean [95% interval]'
        assert spread == row(compared(*paths), 'last_reward').spreads['old']

    def test_ten_of_one_side_are_not_enough(self, paths):
        spreads = row(compared(*paths[:11]), 'last_reward').spreads
        assert [spread.statistic for spread in spreads.values()] == ['median', 'median']

    def test_the_interval_holds_what_it_should(self):
        """In 95 of 100 draws it has the true value in it; a percentile interval of 20 runs in a few less."""
        draws = np.random.default_rng(7).normal(size=(300, 20))
        held = sum(low < 0 < high for _, low, high in (summed_up(draw, 'interquartile mean', 500) for draw in draws))
        assert 0.88 < held / 300 < 0.98


def test_a_run_that_went_on_without_its_replay_buffer_is_marked(tmp_path):
    paths = [write_run(tmp_path / 'old_s0', summary=dict(resumed_at=[1200])), write_run(tmp_path / 'new_s0', new=True)]
    said = [warning.text for warning in compared(*paths).warnings]
    assert 'old_s0 went on with an empty replay buffer at 1,200 environment steps, which bends its curves' in said


def test_more_runs_of_one_seed_are_no_other_seeds(tmp_path):
    paths = [*pair(tmp_path), write_run(tmp_path / 'new_again_seed0', new=True, summary={}, began=BEGAN + 2000)]
    said = [warning.text for warning in compared(*paths).warnings]
    assert "More than one run of 'new' has seed 0: their spread is not one of seeds" in said
    assert not [text for text in said if text.startswith('Other seeds')]


def test_the_plugins_own_hooks_are_no_difference_of_configs(tmp_path):
    paths = pair(tmp_path)
    for path, hooks in zip(paths, ({}, {'kv_cache_stats': {'name': 'a', 'priority': 15}})):
        learn = {'learner': {'hook': {'log_show_after_iter': len(hooks), **hooks}}}
        (Path(path) / 'total_config.py').write_text(f'exp_config = {{"policy": {{"learn": {learn}}}}}')
    assert list(compared(*paths).differences) == ['policy.learn.learner.hook.log_show_after_iter']


class TestOrigin:

    def test_what_the_summaries_say(self, tmp_path):
        said = dict(command=['train.py', '--set', 'a=b c'], versions=dict(lzero_kvcache='0.2.0', lightzero='0.2.0'))
        paths = [write_run(tmp_path / 'old_s0', summary=said, seconds=7200.),
                 write_run(tmp_path / 'new_s0', new=True, summary=dict(machine={**MACHINE, 'gpu': 'NVIDIA H100'}))]
        assert origin(compared(*paths)) == [
            'Trained 2023-11-14 22:13 to 2023-11-15 00:13 UTC',
            'Machine: system Linux, processor x86_64, cpus 2, threads 1, python 3.11.7, torch 2.12.1, ding v0.5.3',
            'Machine: system Linux, processor x86_64, cpus 2, threads 1, gpu NVIDIA H100, python 3.11.7, '
            'torch 2.12.1, ding v0.5.3',
            'Versions: lzero_kvcache 0.2.0, lightzero 0.2.0',
            "old_s0: train.py --set 'a=b c'",
        ]

    def test_a_run_that_went_on_in_place_has_a_command_for_each_part(self, tmp_path):
        path = write_run(tmp_path / 'old_s0', summary=dict(
            command=['train.py', '--in-place'], earlier=[dict(command=['train.py', '--seed', '0'], overrides=[])]))
        assert origin(compared(path))[-2:] == [
            'old_s0, part 1: train.py --seed 0', 'old_s0, part 2: train.py --in-place']

    @pytest.mark.parametrize(('before', 'now', 'said'), [
        ([], [], None), (['a=1'], ['a=1'], None), (['a=1'], [], '(part 1: a=1; part 2: none)'),
        ([], ['a=1', 'b=2'], '(part 1: none; part 2: a=1 b=2)'),
        (['a=1', 'b=2'], ['b=3', 'a=1'], '(part 1: b=2; part 2: b=3)'),
    ])
    def test_a_run_that_went_on_with_other_overrides_is_told_of(self, before, now, said, tmp_path):
        path = write_run(tmp_path / 'old_s0', summary=dict(overrides=now, earlier=[dict(command=[], overrides=before)]))
        told = [warning.text for warning in compared(path).warnings if 'overrides' in warning.text]
        assert told == ([] if said is None else [
            f'old_s0 went on with other overrides {said}, and its config is that of its last part'])


# ---- the command -----------------------------------------------------------------------------------------------------

class TestCommand:

    def test_a_folder_that_cannot_be_written_to(self, capsys, tmp_path):
        paths = pair(tmp_path)
        (tmp_path / 'file').touch()
        assert main(['compare', *paths, '--out', str(tmp_path / 'file')]) == 2
        assert capsys.readouterr().err.endswith('it cannot be written to (File exists)\n')

    @pytest.mark.parametrize(('name', 'content', 'said'), [
        ('notes.txt', 'text', '{path}: an event file has tfevents in its name; give one, or the folder of a run'),
        ('events.out.tfevents.1.here', 'text', 'no run can be read: {folder} ({name} breaks off or is damaged)'),
    ])
    def test_a_file_that_is_no_event_file_is_answered_by_one_line(self, name, content, said, capfd, tmp_path):
        path = tmp_path / name
        path.write_text(content)
        assert main(['compare', str(path), '--out', str(tmp_path / 'out')]) == 2
        out, err = capfd.readouterr()
        said = said.format(path=path, folder=tmp_path.name, name=name)
        assert (out, err) == ('', f'lzero-kvcache: error: {said}\n')
        assert not (tmp_path / 'out').exists()

    @pytest.mark.parametrize(('columns', 'width'), [(None, 100), ('60', 60), ('180', 180)])
    def test_a_pipe_is_as_wide_as_columns_says(self, columns, width, monkeypatch):
        monkeypatch.delenv('COLUMNS', raising=False)
        if columns:
            monkeypatch.setenv('COLUMNS', columns)
        assert default_console().width == width

    def test_from_a_shell(self, tmp_path):
        """Nothing is printed but what was asked for, neither by LightZero nor by anything it imports."""
        pair(tmp_path)
        command = ['compare', 'old_seed0', 'new_seed0', '--group', 'B=old*', 'A=new*']
        done = subprocess.run([sys.executable, '-m', 'lzero_kvcache_options', *command], cwd=str(tmp_path), text=True,
                              capture_output=True, env=environment(ROOT))
        assert (done.returncode, done.stderr) == (0, '')
        lines = done.stdout.rstrip('\n').split('\n')
        assert lines[0].strip() == 'Comparison: B / A'
        names = ['compare.png', 'compare.svg', 'compare.pdf', 'report.html', 'compare.json']
        assert lines[-1] == f"Wrote {', '.join(f'comparison/{name}' for name in names)}"
        contents = {path.name: path.read_bytes() for path in (tmp_path / 'comparison').iterdir()}
        assert sorted(contents) == sorted(names)
        assert contents['compare.pdf'].startswith(b'%PDF-')
        assert xml.etree.ElementTree.fromstring(contents['compare.svg']).tag.endswith('svg')
