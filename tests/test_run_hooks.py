"""LightZero's own entry, called from a script with the plugin loaded: lines of progress, a summary when it ends."""
import json
import logging
import os
import re
from functools import partial

import pytest
from forks import in_forks
from trainings import ITERATIONS, SMALL, import_what_trainings_import, scalars, short_episodes, summary_of

from lzero_kvcache import run_hooks
from lzero_kvcache.training import make_plan


def script(folder, new):
    """What such a script does. Its log is kept, and each iteration has a line."""
    from lzero.entry import train_unizero
    os.chdir(folder)
    short_episodes()
    run_hooks.EVERY_SECONDS = 0.
    logging.getLogger('lzero_kvcache').addHandler(logging.FileHandler('said', encoding='utf-8'))
    overrides = SMALL[SMALL.index('--set') + 1:]
    plan = make_plan('config_new', cache='new' if new else 'old', exp_name='run', overrides=overrides)
    train_unizero([plan.main_config, plan.create_config], seed=4, max_train_iter=ITERATIONS)


@pytest.mark.slow
@pytest.mark.parametrize('new', [False, True], ids=['old', 'new'])
def test_it_says_how_far_it_is_and_leaves_a_summary(new, tmp_path):
    import_what_trainings_import()
    assert in_forks({'script': partial(script, str(tmp_path), new)}) == {'script': None}
    summary, lines = summary_of(tmp_path / 'run'), (tmp_path / 'said').read_text(encoding='utf-8').splitlines()
    progress = [line for line in lines if line.startswith('train ')]
    steps = summary['env_step']
    assert len(progress) == ITERATIONS
    ends = [None, *(round(steps * ITERATIONS / iteration) for iteration in range(1, ITERATIONS))]
    for line, end in zip(progress, ends):
        how_far = rf'{steps}\+0' + (rf'/{end} \({steps / end:.0%}\), [\d:]+ left' if end else '')
        assert re.fullmatch(
            rf'train    {how_far}  reward -, best -  loss \S+  hit rate \d+\.\d%  [\d.]+ steps/s on cpu', line), line
    assert (summary['max_env_step'], summary['max_train_iter']) == (None, ITERATIONS)
    assert [(summary[name]) for name in ('cache', 'seed', 'task', 'exit_code', 'device', 'train_iter')] == [
        'new' if new else 'old', 4, 'train', 0, 'cpu', ITERATIONS]
    assert summary['counters']['total']['queries'] == scalars(tmp_path / 'run', 'kv_cache_iter/total_queries')[-1].value
    [reward] = scalars(tmp_path / 'run', 'evaluator_iter/reward_mean')
    assert [list(evaluation.values())[:3] for evaluation in summary['evaluations']] == [[0, 0, reward.value]]
    assert summary['last_reward'] == summary['best_reward'] == reward.value
    assert summary['versions']['LightZero'] and summary['machine']['cpu'] and summary['started'] <= summary['ended']
    rates = ', '.join(f'{pool} {summary["hit_rates"][pool]:.1%}' for pool in ('total', 'init', 'recur'))
    assert lines[-1] == (
        f'Hit rates of the cache: {rates}; its memory: {summary["cache_memory_mb"]:.1f} MiB; best reward '
        f'{reward.value:.1f}. run/summary.json has all numbers')
    assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['event_files'] == 'run/log/serial'
