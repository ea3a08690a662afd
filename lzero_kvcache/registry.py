"""The registry of cache managers."""
from ding.utils.registry import Registry

KV_CACHE_REGISTRY = Registry()
"""Cache managers by the name that ``world_model_cfg.kv_cache_cfg.type`` picks."""
