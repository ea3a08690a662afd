"""Root inferences on a GPU as replayed CUDA graphs: the encoder, the step, and sums that show whether results are
finite."""
from typing import Callable, Optional, Tuple

import numpy as np
import torch

from .graphs import ReplayedStep
from .packing import unpack
from .slab import Slab
from .step import Engine, StepOutput, checksum
from .transfer import to_cpu
from .weights import Source

Encoder = Callable[[torch.Tensor], torch.Tensor]
Root = Tuple[StepOutput, np.ndarray]
"""Predictions, and sums ``[B, 2]`` that are finite where the latent state, and value and policy, are."""


class RootGraphs:
    """Captures and replays the root inferences of one model."""

    def __init__(self, engine: Engine, source: Source, encode: Encoder) -> None:
        self._engine, self._source, self._encode = engine, source, encode
        self.replayed = ReplayedStep(
            engine.geometry, self._run, 'a root inference', 'A root inference cannot be captured here')

    def serves(self) -> bool:
        """Whether to try a replay."""
        source = self._source
        is_plain = not source.is_training() and not source.has_own_encoding()
        return self.replayed.graphs.usable and is_plain and self._engine.has_kernels(source.device())

    def run(self, slab: Slab, numbers: np.ndarray, observations: torch.Tensor,
            addresses: Tuple[int, ...]) -> Optional[Root]:
        """Encode observations ``[B, ...]`` and step into them from packed contexts and actions ``[N, B]`` of whole
        windows; None where that cannot be captured."""
        rows = len(observations)
        result = self.replayed.run(slab, numbers, observations, self._source.device(), addresses)
        if result is None:
            return None
        output, checks = result
        return output.map(lambda part: part[:rows].clone()), to_cpu(checks[:rows])

    def _run(self, slab: Slab, numbers: torch.Tensor, observations: torch.Tensor) -> Tuple[StepOutput, torch.Tensor]:
        tables, counts, positions, action = unpack(self._engine.geometry, numbers)
        latent = self._encode(observations).reshape(len(observations), -1)
        output = self._engine.step(self._source.read(True), slab, tables, counts, action, positions, latent)
        return output, torch.cat([latent.sum(1, keepdim=True), checksum(output)], dim=1)
