"""Long runs keep memory flat; ``benchmarks/soak.py`` prints the curve."""
import logging
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / 'benchmarks'
DEVICES = ['cpu', pytest.param('cuda', marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
])]


@pytest.fixture()
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import soak
    logger = logging.getLogger('lzero_kvcache')
    level = logger.level
    yield soak
    logger.setLevel(level)  # a soak is quiet, and so would be whatever comes after it
    for name in ('soak', 'common'):
        sys.modules.pop(name, None)


def assert_flat(soak, rows, mib):
    for work in ('look-ups', 'searches'):
        part = [row for row in rows if row['work'] == work]
        assert len(part) == 20
        assert soak.growth(part, 'host RSS, MiB') < mib
        assert soak.growth(part, 'python, 1,000 blocks') < 1
        assert soak.growth(part, 'device, MiB') < mib / 8
        assert len({row['cache, MiB'] for row in part[10:]}) == 1


@pytest.mark.slow
@pytest.mark.parametrize('device', DEVICES)
def test_memory_is_flat(device, soak):
    options = soak.options().parse_args(['--device', device, '--look-ups', '30000', '--searches', '300'])
    assert_flat(soak, soak.soak(options), mib=8)


def test_a_leak_shows(soak):
    rows = [{'a': 10. + 0.1 * index} for index in range(20)]
    assert 0.5 < soak.growth(rows, 'a') < 0.7
    assert soak.growth([{'a': 5.}] * 20, 'a') == 0
