"""A key-value cache for LightZero's UniZero, picked by one flag in ``world_model_cfg``."""
import logging

from .host import root_level

# The policies come first: LightZero sets the level of logs in its world model, and that must not act on their imports.
with root_level.kept():
    from . import telemetry  # noqa: F401
    from .host import policies  # noqa: F401
    # isort: split
    from .host import buffers, models  # noqa: F401  (what LightZero and DI-engine find in place of their own)
    from .host.lightzero import lightzero
    if 'unizero_ppo' in lightzero.POLICIES:
        from .host import ppo  # noqa: F401

from .cache.base import BaseCacheManager, PagedCacheManager
from .cache.eviction import EvictionStrategy
from .cache.manager import KVCacheManager
from .cache.pool import KVCachePool
from .cache.stats import CacheStats
from .config import KV_CACHE_REGISTRY, CacheConfig, ConfigError
from .host.old_world_model import OldCacheManager
from .loading import check_config, disable, enable
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

# LightZero has the root logger show everything; DEBUG, with a line for every miss, is shown on request.
if logging.getLogger(__name__).level == logging.NOTSET:
    logging.getLogger(__name__).setLevel(logging.INFO)
