"""LightZero's contexts, ``KeysValues``: how large they are, and how pools by hand copy them."""
import copy
from typing import Any, List

from lzero.model.unizero_world_models.kv_caching import KeysValues

from ..cache.pool import private_copy


def _caches(value: Any) -> List[Any]:
    return [cache for layer in value for cache in (layer._k_cache, layer._v_cache)]


@private_copy.register(KeysValues)
def _copied(value: KeysValues) -> KeysValues:
    # Tensors that were made with gradients cannot be deep-copied.
    return copy.deepcopy(value, {id(cache._cache): cache._cache.detach().clone() for cache in _caches(value)})


def bytes_of(value: Any) -> int:
    """The memory of a context's keys and values."""
    return sum(cache._cache.numel() * cache._cache.element_size() for cache in _caches(value))
