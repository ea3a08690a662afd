"""A key-value cache for LightZero's UniZero, picked by one flag in ``world_model_cfg``."""
from .base_manager import BaseCacheManager, PagedCacheManager
from .config import CacheConfig, ConfigError
from .eviction import EvictionStrategy
from .manager import KVCacheManager
from .old_manager import OldCacheManager
from .pool import KVCachePool
from .registry import KV_CACHE_REGISTRY
from .stats import CacheStats
from . import models  # noqa: F401  (registers with DI-engine)

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
]
