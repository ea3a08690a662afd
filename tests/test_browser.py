"""The page of a comparison in a real browser, headless and without a network. Skipped where there is no Chromium."""
import io
import os
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pytest
from event_runs import BEGAN, write_run
from matplotlib.colors import to_rgb
from rich.console import Console
from test_comparison_numbers import Page

from lzero_kvcache.comparison import compare_runs
from lzero_kvcache.comparison.page import COLOURS
from lzero_kvcache.comparison.table import MEASURES

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
FLAGS = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
         '--disable-background-networking', '--disable-component-update', '--disable-dev-shm-usage',
         '--hide-scrollbars', '--host-resolver-rules=MAP * ~NOTFOUND')
PREFER_DARK = '--blink-settings=preferredColorScheme=0'
# Of the page itself.
LIGHT, DARK = '#ffffff', '#15181c'


def find_browser():
    """The first that is there and starts; some systems only have a stub."""
    for path in filter(None, map(shutil.which, BROWSERS)):
        if subprocess.run([path, '--version'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
            return path
    return None


BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed")


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    for seed in range(2):
        write_run(folder / f'old_s{seed}', seed=seed, began=BEGAN + 1000 * seed)
        write_run(folder / f'new_s{seed}', new=True, seed=seed, began=BEGAN + 1000 * seed + 500, search_ms=(20., 15.))
    compare_runs([str(folder)], str(folder / 'out'), console=Console(file=io.StringIO()))
    return folder / 'out' / 'report.html'


def browse(page, profile, *options):
    """What the browser prints."""
    command = [BROWSER, *FLAGS, f'--user-data-dir={profile}', *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, env={**os.environ, 'HOME': str(profile)})
    assert done.returncode == 0, done.stderr.decode(errors='replace')
    return done.stdout.decode('utf-8')


def screenshot(page, folder, width, *options):
    """The page as it is drawn, in colours from 0 to 1: ``[height, width, 3]``."""
    picture = folder / 'page.png'
    browse(page, folder / 'profile', f'--window-size={width},2600', f'--screenshot={picture}', *options)
    return matplotlib.image.imread(str(picture))[:, :, :3]


def pixels(picture, colour):
    """How many of a picture have a colour."""
    return (np.abs(picture - np.array(to_rgb(colour))).max(axis=2) < 0.02).sum()


def test_what_the_browser_reads(page, tmp_path):
    read = Page(browse(page, tmp_path / 'profile', '--dump-dom'))
    measures, configs, runs = read.tables
    assert [row[0] for row in measures[1:]] == [measure.title for measure in MEASURES]
    assert ['search, ms', '60.0', '17.5', '3.43 x faster'] in measures
    assert configs[1:] == [['policy.model.world_model_cfg.use_new_cache_manager', 'False', 'True']]
    assert runs[0] == ['run', 'old_s0', 'old_s1', 'new_s0', 'new_s1']


@pytest.mark.parametrize(('options', 'paper', 'other'), [((), LIGHT, DARK), ((PREFER_DARK,), DARK, LIGHT)],
                         ids=['light', 'dark'])
@pytest.mark.parametrize('width', [1280, 500])
def test_how_it_is_drawn(page, tmp_path, width, options, paper, other):
    """On its own ground, with the curves of both sides: the picture was decoded."""
    picture = screenshot(page, tmp_path, width, *options)
    assert picture.shape[1] == width
    size = picture.shape[0] * width
    assert pixels(picture, paper) > size / 3
    assert pixels(picture, other) < size / 100
    assert options or all(pixels(picture, colour) > 50 for colour in COLOURS[:2])
