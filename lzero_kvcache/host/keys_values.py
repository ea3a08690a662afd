"""LightZero's ``KeysValues`` to pages and back, for contexts that somebody stores or reads by hand."""
from typing import Any, Callable

import numpy as np
import torch


class KeysValuesCodec:
    """Turns a ``KeysValues`` that holds a context of one environment, ``2 x pages - 1`` tokens, into pages and back."""

    def __init__(self, world_model: Any, source: Any, ready: Callable[[], Any]) -> None:
        self._wm, self._source, self._ready = world_model, source, ready
        self._width = world_model.context_length // 2 - 1

    def pages_for(self, value: Any) -> int:
        """How many pages a value takes; 0 if it is no context that could be continued."""
        return (value.size + 1) // 2 if self._is_context(value) else 0

    @torch.no_grad()
    def write(self, value: Any, pages: np.ndarray) -> None:
        """Write a value to its pages."""
        layers = [torch.stack([layer.get()[0][0], layer.get()[1][0]]) for layer in value]
        tokens = torch.stack(layers)  # [L, 2, H, T, D]
        slots = tokens.permute(3, 0, 1, 2, 4)
        window = torch.cat([torch.zeros_like(slots[:1]), slots])
        shift = self._source.read(False).shift
        if shift is not None:
            window[1:] -= shift[:value.size].view_as(window[1:])
        self._ready().write(torch.from_numpy(pages).to(window.device), window)

    @torch.no_grad()
    def read(self, pages: np.ndarray) -> Any:
        """A new ``KeysValues`` with what the pages hold."""
        slab = self._ready()
        _, layers, _, heads, head_dim = slab.page_shape
        window = slab.read(torch.from_numpy(pages).to(slab.data.device).unsqueeze(0))[0, 1:]  # [T, L, 2, E]
        size = window.shape[0]
        shift = self._source.read(False).shift
        if shift is not None:
            window = window + shift[:size]
        value = self._wm.transformer.generate_empty_keys_values(n=1, max_tokens=self._wm.context_length)
        tokens = window.view(size, layers, 2, heads, head_dim).permute(1, 2, 3, 0, 4)  # [L, 2, H, T, D]
        for layer, (keys, values) in zip(value, tokens):
            for cache, held in ((layer._k_cache, keys), (layer._v_cache, values)):
                cache._cache.zero_()
                cache._cache[0, :, :size] = held
                cache._size = size
        return value

    def _is_context(self, value: Any) -> bool:
        if not hasattr(value, '_keys_values') or value.size % 2 == 0 or value.size > 2 * self._width - 1:
            return False
        rows, heads, _, head_dim = value[0].shape
        return (
            rows == 1 and (2, len(value), 2, heads, head_dim) == self._ready().page_shape
            and value[0]._k_cache._cache.shape[2] == self._wm.context_length
        )
