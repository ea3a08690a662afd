"""What a comparison reads, from whole and damaged event files, saved configs and summaries; and how it is drawn."""
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from event_runs import BEGAN, break_off, compare_json, compared, event_file, pair, read, row, write_events, write_run
from matplotlib.figure import Figure
from rich.console import Console

from lzero_kvcache import ConfigError
from lzero_kvcache import comparison as package
from lzero_kvcache.comparison import compare_runs
from lzero_kvcache.comparison.page import COLOURS, PANELS, _draw_panel, band_of, line_of, picture_of, report_of
from lzero_kvcache.comparison.reading import REWARD, Curve, Unreadable, find_runs
from lzero_kvcache.comparison.table import measures_table, origin
from lzero_kvcache.run_files import read_config


class TestReading:

    def test_every_point_and_not_a_sample(self, tmp_path):
        values = np.arange(12_000) % 1000
        folder = write_run(tmp_path / 'old_s0', search_ms=values)
        [run] = read(folder)
        assert run.curves['kv_cache_iter/search_ms'].values.tolist() == values.tolist()
        assert run.reduced('kv_cache_iter/search_ms', np.mean) == 499.5
        assert run.points == 2 + 3 + 2 * (12_000 + 5 * 2)

    def test_an_evaluation_is_no_training(self, tmp_path):
        write_run(tmp_path / 'new_s0_eval', summary=dict(task='evaluate'))
        with pytest.raises(Unreadable, match='evaluated a checkpoint and trained nothing'):
            read(str(tmp_path))

    def test_what_an_experiment_began_anew_is_left_out(self, tmp_path):
        write_run(tmp_path / 'old_seed0_cut_off1')
        assert read(str(tmp_path))  # a name that a user gave
        (tmp_path / 'experiment.json').write_text('{}')
        with pytest.raises(Unreadable, match='its experiment began it anew'):
            read(str(tmp_path))

    def test_what_a_killed_run_said_last_may_be_older_than_its_events(self, tmp_path):
        for said, steps in ((33, 1000), (1200, 1200)):
            folder = Path(write_run(tmp_path / f'new_{said}', new=True))
            (folder / 'progress.json').write_text(json.dumps(dict(env_step=said, outcome='')))
            [run] = read(str(folder))
            assert run.steps == steps

    @pytest.mark.parametrize('odd', [
        dict(resumed_at=['a']), dict(resumed_at=5), dict(earlier=[None]), dict(earlier={'a': 1}), dict(outcome=None),
        dict(run_id=7), dict(overrides=3), dict(earlier=[dict(overrides=[1])]), dict(evaluations=7),
        dict(max_env_step='a')])
    def test_an_odd_summary_is_told_of(self, odd, tmp_path):
        folder = Path(write_run(tmp_path / 'new_s0', new=True))
        (folder / 'summary.json').write_text(json.dumps(odd))
        assert re.match(r'summary.json cannot be parsed \(\w+ is .*\)', read(str(folder))[0].notes[0])
        assert compared(*pair(tmp_path / 'pair'), str(folder))

    @pytest.mark.parametrize('text', ['[' * 100_000, '{"seconds": 1' + '0' * 400 + '}'])
    def test_no_summary_keeps_a_run_from_being_compared(self, text, tmp_path):
        folder = Path(write_run(tmp_path / 'new_s0', new=True))
        (folder / 'summary.json').write_text(text)
        assert compared(*pair(tmp_path / 'pair'), str(folder))

    def test_several_files_of_one_run(self, tmp_path):
        folder = tmp_path / 'old_s0'
        for began, rewards in ((500, (3., 4.)), (0, (1., 2.)), (520, (5., 6.))):
            write_events(folder, [(30 * index, int(reward * 100), REWARD, reward)
                                  for index, reward in enumerate(rewards)], BEGAN + began)
        [run] = read(str(folder))
        steps, seconds, values = run.curves[REWARD]
        assert steps.tolist() == [100, 200, 300, 400, 500, 600]
        assert seconds.tolist() == [0, 30, 30, 60, 50, 80]  # without the time between the first file and the others
        assert values.tolist() == [1, 2, 3, 4, 5, 6]
        assert len(run.event_files) == 3
        assert run.seconds == 80
        assert run.notes == ['its event files overlap in time, which is counted once']

    def test_a_clock_that_is_set_back(self, tmp_path):
        """Steps order points, and time is measured between neighbours: an hour less in the middle of a minute."""
        points = [(second - 3600 * (second > 30), 10 * second, REWARD, float(second)) for second in range(60)]
        write_events(tmp_path / 'old_s0', points)
        [run] = read(str(tmp_path))
        assert run.curves[REWARD].values[-1] == 59
        assert run.curves[REWARD].values.tolist() == list(range(60))
        assert run.seconds == 58  # the second in which it was set back is not known
        assert (np.diff(run.curves[REWARD].seconds) >= 0).all()
        assert run.notes == ['its clock was set back by 3,599 s in all; no time is counted there']

    def test_events_a_little_out_of_order(self, tmp_path):
        write_events(tmp_path / 'old_s0', [(0, 0, REWARD, 1.), (9.5, 2, REWARD, 3.), (9, 1, REWARD, 2.),
                                           (20, 3, REWARD, 4.)])
        [run] = read(str(tmp_path))
        assert (run.seconds, run.notes, run.curves[REWARD].values.tolist()) == (20, [], [1, 2, 3, 4])

    def test_a_run_that_was_killed_and_went_on(self, tmp_path):
        """What it wrote after its last checkpoint is not counted; what it wrote before is, from the torn file."""
        folder = write_run(tmp_path / 'old_s0', search_ms=range(100))
        break_off(folder, 0.999)
        write_events(tmp_path / 'old_s0' / 'log' / 'serial', [(0, 600, REWARD, 50.), (60, 900, REWARD, 90.)],
                     BEGAN + 5000)
        [run] = read(folder)
        steps, _, values = run.curves[REWARD]
        assert (steps.tolist(), values.tolist()) == ([0, 600, 900], [10, 50, 90])
        # 60 of 100 seconds until the step at which it went on, and as many after that.
        assert (run.curves[REWARD].values[-1], run.env_step, run.seconds) == (90, 900, pytest.approx(120, abs=1))
        fault, abandoned = run.notes
        assert re.fullmatch(r'events\.\S+ breaks off or is damaged: its events end at step 1,000', fault)
        assert re.fullmatch(r'\d+ points and their time do not count: it went on from a checkpoint before them',
                            abandoned)

    def test_an_evaluation_that_was_made_again_counts_once(self, tmp_path):
        """As after several resumes from one checkpoint by an earlier version."""
        for began, evaluations in enumerate(([(0, 0, 1.), (5, 50, 2.)], [(5, 50, 3.)], [(5, 50, 4.), (9, 90, 5.)])):
            write_events(tmp_path, [(number, at, f'evaluator_{axis}/reward_mean', reward)
                                    for number, (iteration, step, reward) in enumerate(evaluations)
                                    for axis, at in (('iter', iteration), ('step', step))], BEGAN + 100 * began)
        [run] = read(str(tmp_path))
        steps, _, values = run.curves[REWARD]
        assert (steps.tolist(), values.tolist()) == ([0, 50, 90], [1, 4, 5])
        assert run.notes == ['2 points and their time do not count: it went on from a checkpoint before them',
                             'its event files have some evaluations more than once (1): the last of each counts']

    def test_environment_steps_that_are_counted_anew_cut_nothing_off(self, tmp_path):
        """As by LightZero's own entry; iterations go on."""
        for began, evaluations in enumerate(([(0, 0, 1.), (5, 50, 2.)], [(6, 0, 3.), (9, 90, 5.)])):
            write_events(tmp_path, [(number, at, f'evaluator_{axis}/reward_mean', reward)
                                    for number, (iteration, step, reward) in enumerate(evaluations)
                                    for axis, at in (('iter', iteration), ('step', step))], BEGAN + 100 * began)
        [run] = read(str(tmp_path))
        assert sorted(run.curves[REWARD].values) == [1, 2, 3, 5] and run.notes == []

    @pytest.mark.parametrize(('collected', 'abandoned'), [(300, 0), (700, 3)])
    def test_a_collection_counts_if_the_checkpoint_counts_its_steps(self, collected, abandoned, tmp_path):
        """At the iteration where the run went on: before a checkpoint of an update, but after one of an evaluation."""
        write_events(tmp_path / 'old_s0', [
            (0, 0, 'learner_iter/loss', 1.), (1, 10, REWARD, 1.), (20, 50, 'collector_iter/reward_mean', 2.),
            (20, collected, 'collector_step/reward_mean', 2.), (30, collected, 'collector_step/reward_std', 2.),
            (40, collected, 'collector_step/total_duration', 2.)])
        write_events(tmp_path / 'old_s0', [(0, 50, 'learner_iter/loss', 1.), (0, 400, 'kv_cache_step/x', 1.)],
                     BEGAN + 99)
        [run] = read(str(tmp_path))
        assert run.seconds == (20 if abandoned else 40)
        assert len(run.notes) == (abandoned > 0) and (not abandoned or run.notes[0].startswith('3 points and'))

    def test_a_second_file_that_seems_to_be_older(self, tmp_path):
        """The clock was set back between the two: steps say which came first."""
        write_events(tmp_path / 'old_s0', [(0, 0, REWARD, 1.), (60, 100, REWARD, 2.)])
        write_events(tmp_path / 'old_s0', [(0, 110, REWARD, 3.), (60, 200, REWARD, 4.)], BEGAN - 3600)
        [run] = read(str(tmp_path))
        assert run.curves[REWARD].values.tolist() == [1, 2, 3, 4]
        assert (run.curves[REWARD].values[-1], run.seconds, run.notes) == (4, 120, [])

    def test_event_files_of_two_runs_in_one_folder(self, tmp_path):
        """As of somebody who collects event files. What is left of an abandoned part, one iteration, is no run."""
        for number in range(2):
            path = event_file(write_run(tmp_path / f'run{number}', began=BEGAN + 500 * number, search_ms=range(20)))
            (tmp_path / 'all').mkdir(exist_ok=True)
            path.rename(tmp_path / 'all' / path.name)
        with pytest.raises(Unreadable, match='are of more than one run, and each run needs a folder of its own'):
            read(str(tmp_path / 'all'))
        for began, iterations in ((0, (0, 10)), (100, (10, )), (200, (10, 20))):
            write_events(tmp_path / 'one', [(number, iteration, 'kv_cache_iter/search_ms', 1.)
                                            for number, iteration in enumerate(iterations)], BEGAN + began)
        [run] = read(str(tmp_path / 'one'))
        assert len(run.event_files) == 3

    def test_what_is_no_scalar(self, tmp_path):
        from torch.utils.tensorboard import SummaryWriter as TorchWriter
        with TorchWriter(str(tmp_path / 'old_s0')) as writer:
            writer.add_scalar(REWARD, 12.5, 30)
            writer.add_text('config', 'evaluator_step/reward_mean')
            writer.add_histogram('weights', np.arange(9.))
        [run] = read(str(tmp_path))
        assert run.curves[REWARD].values[-1] == 12.5
        assert run.points == 1

    def test_a_file_damaged_in_the_middle(self, tmp_path):
        folder = write_run(tmp_path / 'old_s0', search_ms=range(100))
        path = event_file(folder)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xff
        path.write_bytes(data)
        [run] = read(folder)
        assert run.curves['kv_cache_iter/search_ms'].values.tolist() == list(range(50))
        assert re.search(r'is damaged: its events end at step (49|50)\d$', run.notes[0])

    @pytest.mark.parametrize('share', [0.3, 0.9, 0.999])
    def test_a_file_that_breaks_off(self, tmp_path, share):
        """As after a kill: what is whole is kept, and where it ends is said."""
        folder = write_run(tmp_path / 'old_s0', search_ms=range(100), summary={})
        break_off(folder, share)
        [run] = read(folder)
        values = run.curves['kv_cache_iter/search_ms'].values.tolist()
        assert values == list(range(len(values)))
        assert len(values) == pytest.approx(100 * share, abs=6)
        [note] = run.notes
        assert note.endswith(f'breaks off or is damaged: its events end at step {run.env_step:,} of 1,000')
        assert (run.env_step, run.steps) == (pytest.approx(1000 * share, abs=60), 1000)

    @pytest.mark.parametrize('share', [0.6, 0.999])
    def test_a_file_that_breaks_off_after_its_last_step(self, tmp_path, share):
        """All updates after a collection are of the same environment steps."""
        updates = [(iteration, step, f'kv_cache_{axis}/search_ms', 5.) for iteration in range(10)
                   for axis, step in (('iter', iteration), ('step', 100))]
        write_events(tmp_path, [(0, 0, REWARD, 10.), *updates, (10, 100, REWARD, 30.)])
        evaluations = [dict(env_step=env_step, train_iter=env_step // 10) for env_step in (0, 100)]
        (tmp_path / 'summary.json').write_text(json.dumps(dict(env_step=100, train_iter=10, evaluations=evaluations)))
        break_off(tmp_path, share)
        [run] = read(str(tmp_path))
        fault, missing = run.notes
        assert fault.endswith('its events end at step 100 of 100')
        held = len(run.curves['kv_cache_iter/search_ms'].values)
        assert held == pytest.approx(10 * share, abs=1)
        iterations = f'{held} of 10 iterations and ' if held < 10 else ''
        assert missing == (f'its event files have {iterations}1 of 2 evaluations, '
                           'and its means and curves are of these')

    def test_a_file_that_is_something_else(self, tmp_path):
        (tmp_path / 'events.out.tfevents.1.host').write_text('no event file')
        with pytest.raises(Unreadable, match='breaks off or is damaged'):
            read(str(tmp_path))

    def test_numbers_that_are_none(self, tmp_path):
        paths = pair(tmp_path, new=dict(rewards=(5., float('nan')), search_ms=(float('nan'), 7.),
                                        step_ms=(float('inf'), 1.)))
        comparison = compared(*paths)
        for name, expected in (('search_ms', 7), ('step_ms', None), ('last_reward', None)):
            spread = row(comparison, name).spreads['new']
            assert (spread and spread.centre) == expected
        compare_runs(paths, str(tmp_path / 'out'), console=Console(file=io.StringIO()))
        assert compare_json(tmp_path / 'out')['left_out'] == {}


class TestFinding:

    def test_what_stands_for_a_run(self, tmp_path):
        folder = Path(write_run(tmp_path / 'data' / 'old_s0'))
        other = write_run(tmp_path / 'data' / 'new_s0', config=False)
        for path in (folder, folder / 'log', folder / 'log' / 'serial', event_file(folder)):
            [found] = find_runs([str(path)])
            assert (found.name, Path(found.folder)) == ('old_s0', folder)
        names = [found.name for found in find_runs([str(tmp_path / 'data')])]
        assert names == ['new_s0', 'old_s0']
        found = find_runs([other, str(folder), str(event_file(folder)), str(tmp_path)])
        assert [(one.name, len(one.event_files)) for one in found] == [('new_s0', 1), ('old_s0', 1)]

    def test_equal_names_are_told_apart(self, tmp_path):
        paths = [write_run(tmp_path / side / 'seed0') for side in ('a', 'b')]
        assert [found.name for found in find_runs(paths)] == ['a/seed0', 'b/seed0']

    def test_a_run_that_never_wrote_anything(self, tmp_path, monkeypatch):
        write_run(tmp_path / 'old_s0')
        (tmp_path / 'new_s0').mkdir()
        (tmp_path / 'new_s0' / 'total_config.py').write_text('exp_config = {}')
        printed = io.StringIO()
        monkeypatch.setattr(package, '_write', lambda *_: [])
        compare_runs([str(tmp_path)], str(tmp_path / 'out'), console=Console(file=printed, width=200))
        assert 'WARNING: new_s0 is left out: no event file in it' in printed.getvalue().split('\n')


class TestOut:

    @pytest.mark.parametrize('out', ['/proc/comparison', '/proc'])
    def test_a_folder_that_cannot_be_written_to_is_told_of_before_a_run_is_looked_for(self, out):
        with pytest.raises(ConfigError, match=f'--out {out} cannot be written to .*; give another folder'):
            compare_runs(['nosuch'], out)

    @pytest.mark.parametrize('there', ['.', 'a'])
    def test_a_comparison_that_fails_leaves_no_folder_behind(self, there, tmp_path):
        (tmp_path / 'run').mkdir()
        (tmp_path / there).mkdir(exist_ok=True)
        before = set(tmp_path.rglob('*'))
        with pytest.raises(ConfigError, match='no run can be read'):
            compare_runs([str(tmp_path / 'run')], str(tmp_path / 'a' / 'b'))
        assert set(tmp_path.rglob('*')) == before


class TestConfig:

    def test_it_is_parsed_and_never_run(self, tmp_path):
        path = tmp_path / 'total_config.py'
        trace = tmp_path / 'trace'
        path.write_text(f"import os\nopen({str(trace)!r}, 'w')\nexp_config = {{'a': {{'b': [1, 'x'], 'c': {{}}}}, "
                        f"'d': float(\"inf\"), 'e': open({str(trace)!r}, 'w'), 7: -1.5}}\nraise SystemExit")
        config = read_config(str(path))
        assert config.pop('e').startswith('open(')
        assert {key: repr(value) for key, value in config.items()} == {
            'a.b': "[1, 'x']", 'a.c': '{}', 'd': 'float("inf")', '7': '-1.5'
        }
        assert not trace.exists()

    @pytest.mark.parametrize('text', ['exp_config = {', "exp_config = {'a': <function f at 0x7f>}", 'x = 1', '\0'])
    def test_what_cannot_be_parsed_is_said_and_the_run_compared(self, tmp_path, text):
        paths = pair(tmp_path)
        (tmp_path / 'new_seed0' / 'total_config.py').write_text(text)
        comparison = compared(*paths)
        assert [side.name for side in comparison.sides] == ['old', 'new']
        assert comparison.differences == {}
        assert comparison.warnings[0].text.startswith('new_seed0: total_config.py ')

    def test_what_the_runs_of_a_side_differ_in(self, tmp_path):
        paths = pair(tmp_path)
        other = Path(write_run(tmp_path / 'new_seed1', new=True, seed=1))
        source = (other / 'total_config.py').read_text()
        (other / 'total_config.py').write_text(source.replace("'context_length': 8", "'context_length': 4"))
        apart = compared(*paths, str(other))
        assert [[run.seed for run in side.runs] for side in apart.sides] == [[0], [0], [1]]
        assert [side.name for side in apart.sides] == ['old', 'new', 'new (2)']
        grouped = compared(*paths, str(other), groups=[('all new', 'new_*')])
        assert grouped.differences['policy.model.world_model_cfg.context_length'] == {'all new': '8; 4', 'old': '8'}


class TestSources:
    """train.py's summary where all runs have one; else what LightZero itself leaves behind."""

    def test_the_summary(self, tmp_path):
        comparison = compared(*pair(tmp_path, old=dict(seconds=100.)))
        seconds = row(comparison, 'seconds')
        assert (seconds.source, seconds.spreads['old'].centre) == ('summary', 100)
        assert row(comparison, 'host_memory_mb').spreads['old'].centre == 700

    def test_one_source_for_all_runs(self, tmp_path):
        paths = [write_run(tmp_path / 'old_s0', summary=dict(seconds=130., host_memory_mb=900.)),
                 write_run(tmp_path / 'new_s0', new=True)]
        comparison = compared(*paths)
        for name, expected in (('seconds', 100), ('host_memory_mb', 640)):
            assert row(comparison, name).source == 'events'
            assert row(comparison, name).values == {'old_s0': expected, 'new_s0': expected}

    def test_a_run_of_lightzero_alone(self, tmp_path):
        paths = [write_run(tmp_path / 'lightzero', cache_tags=False, config=False),
                 write_run(tmp_path / 'new_s0', new=True, summary={}, began=BEGAN + 1000)]
        comparison = compared(*paths)
        assert [side.name for side in comparison.sides] == ['lightzero', 'new']
        cells = {cells[0]: cells[1:] for cells in measures_table(comparison).rows}
        assert cells['training time'] == ['1:40', '1:40', 'the same']
        assert cells['search, ms'] == ['-', '60.0', '-']
        assert cells['hit rate, roots'] == ['-', '60.0%', '-']
        assert cells['last reward'] == ['150.0', '150.0', 'the same']
        assert picture_of(comparison).startswith(b'\x89PNG')
        drawn = picture_of(comparison, 'svg').decode()
        for text in origin(comparison)[:3]:  # the small print is wrapped
            assert text[:40] in drawn

    def test_memory_of_the_device(self, tmp_path):
        for name, gigabytes in (('old_s0', (1., 1.5)), ('new_s0', (0., 0.))):
            write_events(tmp_path / name, [(step, step, 'learner_iter/Max_GPU_avg', value)
                                           for step, value in enumerate(gigabytes)])
        values = row(compared(str(tmp_path)), 'device_memory_mb').values
        assert values == {'old_s0': 1536, 'new_s0': None}

    @pytest.mark.parametrize('text', ['{', '[]', '{"seconds": "long", "hit_rates": 7, "machine": null, "seed": "x"}'])
    def test_a_summary_that_says_nothing(self, tmp_path, text):
        paths = pair(tmp_path)
        (tmp_path / 'new_seed0' / 'summary.json').write_text(text)
        comparison = compared(*paths)
        assert row(comparison, 'seconds').values == {'old_seed0': 100, 'new_seed0': 100}


class TestPicture:

    def test_points_at_one_place_are_averaged(self):
        curve = Curve(np.array([0, 100, 100, 300]), np.array([0., 60, 60, 120]), np.array([1., 2, 4, np.nan]))
        x, y = line_of(curve, PANELS[0])
        assert (x.tolist(), y.tolist()) == ([0, 100], [1, 3])
        x, y = line_of(curve, PANELS[1])
        assert (x.tolist(), y.tolist()) == ([0, 1], [1, 3])

    def test_many_points_are_averaged_and_not_picked(self):
        steps = np.arange(10_000)
        x, y = line_of(Curve(steps, steps / 1., steps % 2 * 10.), PANELS[0])
        assert len(x) == 200
        assert y == pytest.approx(np.full(200, 5.), abs=0.2)

    def test_the_band(self):
        lines = [(np.array([0., 10.]), np.array([0., 10.])), (np.array([5., 25.]), np.array([9., 49.]))]
        places, centre, low, high = band_of(lines, 'median')
        assert (places[0], places[-1]) == (5, 10)
        assert [values[[0, -1]].tolist() for values in (centre, low, high)] == [
            pytest.approx(expected) for expected in ([7, 14.5], [5, 10], [9, 19])]
        assert band_of(lines[:1], 'median') is None
        assert band_of([lines[0], (np.array([11., 12.]), np.array([1., 1.]))], 'median') is None

    def test_sides_have_the_colours_of_tensorboards_runs(self, tmp_path):
        """Which go by the runs' names; the sides' own order is that of the baseline first."""
        comparison = compared(*pair(tmp_path))
        axes = Figure().add_subplot()
        _draw_panel(axes, PANELS[0], comparison)
        assert [side.name for side in comparison.sides] == ['old', 'new']
        assert [line.get_color() for line in axes.lines] == [COLOURS[1], COLOURS[0]]

    def test_runs_that_are_no_repeats_of_each_other_have_no_band(self, tmp_path):
        budgets = dict(a_s0=1000, a_s1=5000, b_s2=1000, b_s3=1000)
        paths = [write_run(tmp_path / name, new=True, seed=seed, env_steps=budget, summary=dict(max_env_step=budget))
                 for seed, (name, budget) in enumerate(budgets.items())]
        comparison = compared(*paths, groups=[('mixed', 'a_*'), ('repeats', 'b_*')])
        bands = {}
        for panel in PANELS:
            axes = Figure().add_subplot()
            _draw_panel(axes, panel, comparison)
            bands[panel.title, panel.against] = [len(axes.lines), len(axes.collections)]
        both, one = [6, 2], [5, 1]  # lines of four runs and of those that have a band, and the bands
        assert list(bands.values()) == [one, one, both, both, both, one]
        assert 'Runs of mixed that are not comparable have no band.' in report_of(comparison)
        assert 'have no band' not in report_of(compared(*paths[2:]))
