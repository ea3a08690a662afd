"""Root inferences on a GPU as replayed CUDA graphs: the encoder, the step, and sums that tell what is finite."""
import logging
from typing import Callable, NamedTuple, Optional, Tuple

import numpy as np
import torch

from .graphs import Captured, Graphs, capture
from .packing import filler, unpack
from .slab import Slab
from .step import Engine, StepOutput, checksum
from .transfer import Pinned, to_cpu
from .weights import Source

logger = logging.getLogger(__name__)

Encoder = Callable[[torch.Tensor], torch.Tensor]
Root = Tuple[StepOutput, np.ndarray]
"""Predictions, and sums ``[B, 2]`` that are finite where the latent state, and value and policy, are."""


class _Graph(NamedTuple):
    numbers: Pinned  # [N, rows], packed
    observations: torch.Tensor  # [rows, ...]
    captured: Captured


class RootGraphs:
    """Captures and replays the root inferences of one model."""

    def __init__(self, engine: Engine, source: Source, encode: Encoder) -> None:
        self._engine, self._source, self._encode = engine, source, encode
        self.graphs = Graphs('A root inference cannot be captured here')

    def serves(self) -> bool:
        """Whether to try a replay."""
        source = self._source
        is_plain = not source.is_training() and not source.has_own_encoding()
        return self.graphs.usable and is_plain and self._engine.has_kernels(source.device())

    def run(self, slab: Slab, numbers: np.ndarray, observations: torch.Tensor,
            addresses: Tuple[int, ...]) -> Optional[Root]:
        """Encode observations ``[B, ...]`` and step into them from packed contexts and actions ``[N, B]`` of whole
        windows; None where that cannot be captured."""
        count, rows = numbers.shape
        shape = tuple(observations.shape[1:])
        graph = self.graphs.get(
            rows, (count, shape, observations.dtype), (*addresses, slab.address),
            lambda: self._capture(slab, count, observations)
        )
        if graph is None:
            return None
        pinned = graph.numbers.writable()
        pinned[:, :rows], pinned[:, rows:] = numbers, filler(self._engine.geometry, count)
        graph.numbers.send()
        graph.observations[:rows].copy_(observations)
        graph.captured.replays[0]()
        output, checks = graph.captured.results[0]
        return output.map(lambda part: part[:rows].clone()), to_cpu(checks[:rows])

    def _capture(self, slab: Slab, count: int, observations: torch.Tensor) -> _Graph:
        device, rows = self._source.device(), len(observations)
        column = filler(self._engine.geometry, count)
        numbers = Pinned(torch.from_numpy(np.repeat(column, rows, axis=1)), device)
        seen = torch.zeros_like(observations)
        captured = capture(
            device, lambda: self._run(slab, numbers.sent, seen), inputs=[numbers.memory, numbers.sent, seen])
        logger.info(f'Captured a root inference for {rows} rows ({captured.memory_mb:.1f} MiB)')
        return _Graph(numbers, seen, captured)

    def _run(self, slab: Slab, numbers: torch.Tensor, observations: torch.Tensor) -> Tuple[StepOutput, torch.Tensor]:
        tables, counts, positions, action = unpack(self._engine.geometry, numbers)
        latent = self._encode(observations).reshape(len(observations), -1)
        output = self._engine.step(self._source.read(True), slab, tables, counts, action, positions, latent)
        return output, torch.cat([latent.sum(1, keepdim=True), checksum(output)], dim=1)
