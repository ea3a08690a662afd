"""An encoder's inference on a GPU as a replayed graph, for many observations at once."""
from typing import Callable, NamedTuple, Tuple

import torch

from .graphs import Captured, Graphs, capture
from .weights import Source

ROWS = 128
"""Observations that a GPU encodes at once."""


class _Graph(NamedTuple):
    observations: torch.Tensor  # [ROWS, ...]
    captured: Captured


class EncoderGraph:
    """Encodes :data:`ROWS` observations at once, from any device, as float32 ``[B, E]``."""

    def __init__(self, source: Source, encode: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._source, self._encode = source, encode
        self.graphs = Graphs('An encoder cannot be captured here')

    def chunk(self, count: int) -> int:
        """How many of ``count`` observations to pass at once: a GPU encodes them while the CPU packs the next ones."""
        return ROWS if self._source.device().type == 'cuda' else count

    def latest(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function that encodes a chunk of observations with the current weights."""
        source = self._source
        if source.device().type != 'cuda' or source.is_training() or source.has_own_encoding():
            return self._launch
        addresses = source.addresses()
        return lambda observations: self._replay(observations, addresses)

    def _launch(self, observations: torch.Tensor) -> torch.Tensor:
        return self._encode(observations.to(self._source.device(), non_blocking=True).float()).flatten(1)

    def _replay(self, observations: torch.Tensor, addresses: Tuple[int, ...]) -> torch.Tensor:
        kind = tuple(observations.shape[1:]), observations.dtype
        graph = self.graphs.get(ROWS, kind, addresses, lambda: self._capture(observations))
        if graph is None:
            return self._launch(observations)
        graph.observations[:len(observations)].copy_(observations, non_blocking=True)
        graph.captured.replays[0]()
        return graph.captured.results[0][:len(observations)].clone()

    def _capture(self, observations: torch.Tensor) -> _Graph:
        seen = observations.new_zeros((ROWS,) + observations.shape[1:], device=self._source.device())
        return _Graph(seen, capture(seen.device, lambda: self._launch(seen), inputs=[seen]))
