"""What a comparison of runs prints and writes: exact numbers, the page, where runs come from."""
import io
import re
import subprocess
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from event_runs import BEGAN, MACHINE, break_off, compare_json, compared, event_file, pair, row, write_run
from forks import environment
from rich.console import Console

from lzero_kvcache.__main__ import main
from lzero_kvcache.comparison import compare_runs
from lzero_kvcache.comparison.table import MEASURES, measures_table, origin, summed_up

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
        assert re.fullmatch(r'WARNING: cartpole_new_seed3 is left out: no scalar in events\.\S+', lines[0])
        assert re.fullmatch(r'WARNING: cartpole_old_seed3 is left out: events\.\S+ breaks off or is damaged', lines[1])
        assert list(data['left_out']) == ['cartpole_new_seed3', 'cartpole_old_seed3']

    def test_warnings(self, whole, data):
        assert data['warnings'] == [
            'Different environments (old: CartPole-v0; cartpole_new: CartPole-v0; pong_new: PongNoFrameskip-v4): '
            'nothing here is comparable',
            'Different seeds: old: 0, 1, 2; cartpole_new: 0, 1, 2; pong_new: 0',
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


class TestCommand:

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
