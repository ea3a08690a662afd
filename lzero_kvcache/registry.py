"""The registry of cache managers, and what the plugin does to DI-engine's."""
from ding.utils.registry import Registry

from .config import ConfigError

KV_CACHE_REGISTRY = Registry()
"""Cache managers by the name that ``world_model_cfg.kv_cache_cfg.type`` picks."""


def register_in_place_of(original: type, registry: Registry, name: str, replacement: type) -> None:
    """Register a class of the plugin under the name of LightZero's; refuse to replace anybody else's."""
    present = registry.get(name)
    if present is not original:
        raise ConfigError(
            f"{present.__module__}.{present.__qualname__} is registered as '{name}', which lzero_kvcache must not "
            f'replace: derive it from {replacement.__module__}.{replacement.__qualname__}, or give it another name'
        )
    registry.register(name, replacement, force_overwrite=True)
