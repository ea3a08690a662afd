"""Registering the plugin's classes in DI-engine's registries."""
from ding.utils.registry import Registry

from .config import ConfigError


def register_in_place_of(original: type, registry: Registry, name: str, replacement: type) -> None:
    """Register a class of the plugin under the name of LightZero's, or of what an earlier import of the plugin has put
    there; refuse to replace anybody else's."""
    present = registry.get(name)
    if present is not original and _place(present) != _place(replacement):
        raise ConfigError(
            f"{_place(present)} is registered as '{name}', which lzero_kvcache must not "
            f'replace: derive it from {_place(replacement)}, or give it another name'
        )
    registry.register(name, replacement, force_overwrite=True)


def _place(kind: type) -> str:
    return f'{kind.__module__}.{kind.__qualname__}'
