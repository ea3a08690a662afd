"""The slab behind a manager, and the adapter between ``KeysValues`` objects and its pages.

A ``KeysValues`` is told by what it offers (layers of key and value caches), so that LightZero is not imported here.
"""
from typing import Any, Callable, Optional

import numpy as np
import torch

from ..cache.pages import OutOfPages
from ..cache.pool import Codec, private_copy
from ..config import CacheConfig, lookup
from .slab import MIB, Slab


class PageStorage(Codec):
    """
    Overview:
        Owns the slab of one manager. A ``KeysValues`` that holds a context of the transformer, ``2 x pages - 1``
        tokens for one environment, goes to pages; anything else is left to the pool.
    Arguments:
        - config (:obj:`Any`): A ``world_model_cfg``.
        - manager (:obj:`Any`): Whose pages these are.
    """

    def __init__(self, config: Any, manager: Any) -> None:
        options = CacheConfig.read(config)
        self._manager = manager
        self._init_pool_size = options.init_pool_size
        self._max_tokens = 2 * manager.width + 2
        heads = lookup(config, 'num_heads', 1)
        self.slab = Slab(
            lookup(config, 'num_layers', 1), heads, lookup(config, 'embed_dim', heads) // heads,
            getattr(torch, options.dtype)
        )
        # Set by the world model: what learned positions add to keys and values, as the weights are now.
        self.shift: Callable[[], Optional[torch.Tensor]] = _no_shift
        # Makes an empty KeysValues; set by the world model, else a copy of the first one that was stored by hand.
        self.blank: Optional[Callable[[], Any]] = None

    def ready(self, device: torch.device) -> Slab:
        """
        Overview:
            The slab, with room for every page, on the given device.
        Raises:
            - OutOfPages: The device has no memory for it.
        """
        pages = self._manager.page_capacity
        try:
            self.slab.ensure(pages, device)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise OutOfPages(
                f'no memory on {device} for {pages} pages, {pages * self.slab.page_bytes / MIB:.1f} MiB: lower '
                f'kv_cache_cfg.init_pool_size={self._init_pool_size} or set kv_cache_cfg.max_memory_mb'
            ) from error
        return self.slab

    def grow(self, pages: int) -> bool:
        """
        Overview:
            Make room for more pages; False where memory ran out and everything stays as it was.
        """
        if self.slab.data is None:
            return True
        try:
            self.slab.ensure(pages, self.slab.data.device)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            return False
        return True

    @torch.no_grad()
    def write(self, value: Any) -> Optional[np.ndarray]:
        if not self._is_context(value):
            return None
        first = value[0]._k_cache._cache
        layers = [torch.stack([layer.get()[0][0], layer.get()[1][0]]) for layer in value]
        tokens = torch.stack(layers)  # [L, 2, H, T, D]
        window = torch.zeros((value.size + 1,) + self.slab.page_shape[1:], device=first.device)
        window[1:] = tokens.permute(3, 0, 1, 2, 4)
        shift = self.shift()
        if shift is not None:
            window[1:] -= shift[:value.size].view_as(window[1:])
        count = (value.size + 1) // 2
        if self.blank is None:
            self.blank = _Template(value)
        ids = self._manager.take(count)
        self.ready(first.device).write(torch.from_numpy(ids).to(first.device), window)
        return ids

    def read(self, pages: np.ndarray) -> Any:
        slab = self.slab
        assert slab.data is not None and self.blank is not None
        _, layers, _, heads, head_dim = slab.page_shape
        device = slab.data.device
        window = slab.read(torch.from_numpy(pages).to(device).unsqueeze(0))[0, 1:]  # [T, L, 2, E]
        size = window.shape[0]
        shift = self.shift()
        if shift is not None:
            window = window + shift[:size]
        value = self.blank()
        tokens = window.view(size, layers, 2, heads, head_dim).permute(1, 2, 3, 0, 4)  # [L, 2, H, T, D]
        for layer, (keys, values) in zip(value, tokens):
            for cache, held in ((layer._k_cache, keys), (layer._v_cache, values)):
                cache._cache.zero_()
                cache._cache[0, :, :size] = held
                cache._size = size
        return value

    def _is_context(self, value: Any) -> bool:
        if not hasattr(value, '_keys_values') or value.size % 2 == 0 or value.size > 2 * self._manager.width - 1:
            return False
        rows, heads, _, head_dim = value[0].shape
        return (
            rows == 1 and (2, len(value), 2, heads, head_dim) == self.slab.page_shape
            and value[0]._k_cache._cache.shape[2] == self._max_tokens
        )


class _Template:
    """Copies of one ``KeysValues``; a class and not a closure, so that a manager can be deep-copied and pickled."""

    def __init__(self, value: Any) -> None:
        self._value = private_copy(value)

    def __call__(self) -> Any:
        return private_copy(self._value)


def _no_shift() -> Optional[torch.Tensor]:
    return None


def _is_out_of_memory(error: RuntimeError) -> bool:
    return any(words in str(error).lower() for words in ('out of memory', "can't allocate"))
