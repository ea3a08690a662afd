"""A key-value cache for LightZero's UniZero, picked by one flag in ``world_model_cfg``."""
import contextlib
import io
import logging
import sys

# Under ``python -m``, what LightZero, DI-engine and gym say while they are imported is of no use.
with contextlib.ExitStack() as _quiet:
    if sys.argv[:1] == ['-m']:
        _quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
        _quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
    from . import telemetry  # noqa: F401
    from .host import models, policies, targets  # noqa: F401  (what LightZero and DI-engine find in place of their own)

from .cache.base import BaseCacheManager, PagedCacheManager
from .cache.eviction import EvictionStrategy
from .cache.manager import KVCacheManager
from .cache.pool import KVCachePool
from .cache.stats import CacheStats
from .config import CacheConfig, ConfigError
from .host.old_world_model import OldCacheManager
from .loading import check_config, disable, enable
from .registry import KV_CACHE_REGISTRY
from .validation import ValidationError

__version__ = '0.1.0'

__all__ = [
    'BaseCacheManager',
    'CacheConfig',
    'CacheStats',
    'ConfigError',
    'EvictionStrategy',
    'KVCacheManager',
    'KVCachePool',
    'KV_CACHE_REGISTRY',
    'OldCacheManager',
    'PagedCacheManager',
    'ValidationError',
    'check_config',
    'disable',
    'enable',
]

# LightZero sets the root logger to DEBUG; a line for every miss is for those who ask for it.
if logging.getLogger(__name__).level == logging.NOTSET:
    logging.getLogger(__name__).setLevel(logging.INFO)
