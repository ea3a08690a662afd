"""What every test has: fixed seeds, one thread, registries as they were, and quiet while LightZero is imported."""
import contextlib
import gc
import io
import logging
import os
import random

os.environ.setdefault('OMP_NUM_THREADS', '1')  # read as torch is imported; threads that a test starts have it too

import numpy as np
import pytest
import torch

os.environ.setdefault('WANDB_MODE', 'disabled')
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')  # read as Triton is imported

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    import lzero_kvcache  # noqa: F401  (before the test modules, which register nothing themselves)
    from lzero_kvcache import KV_CACHE_REGISTRY


def pytest_collection_finish():
    """What has been imported is no garbage: to look at it takes each collection some tenths of a second."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _reproducible():
    """Models as small as these are faster on one thread."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def registered():
    """Registers managers for one test."""
    before = dict(KV_CACHE_REGISTRY)
    yield KV_CACHE_REGISTRY.register
    KV_CACHE_REGISTRY.clear()
    KV_CACHE_REGISTRY.update(before)


@pytest.fixture
def at_the_root(monkeypatch):
    """DI-engine puts './' before experiment folders, absolute ones too."""
    monkeypatch.chdir('/')


@pytest.fixture
def lines(caplog):
    """A function that returns the plugin's log lines so far, as (level, message)."""

    def read(level=logging.DEBUG):
        return [
            (record.levelname, record.getMessage()) for record in caplog.records
            if record.name.split('.')[0] == 'lzero_kvcache' and record.levelno >= level
        ]

    return read


@pytest.fixture
def debug_lines(lines):
    """The same, with the plugin's level at DEBUG."""
    logger = logging.getLogger('lzero_kvcache')
    level = logger.level
    logger.setLevel(logging.DEBUG)
    yield lines
    logger.setLevel(level)
