"""The recurrent step as ``kv_cache_cfg.backend`` has it: launched eagerly, or replayed as a CUDA graph.

``N`` packed numbers, ``B`` rows.
"""
from typing import NamedTuple, Optional, Tuple

import numpy as np
import torch

from .graphs import ReplayedStep
from .packing import unpack
from .slab import Slab
from .step import Engine, StepOutput
from .weights import Source, Weights

EAGER, CUDA_GRAPH = 'eager', 'cudagraph'


class StepResult(NamedTuple):
    """A step's predictions, and the part of them that a search copies to the CPU."""
    output: StepOutput
    search: Optional[torch.Tensor]  # [B, 2 + P]: reward and value as numbers, policy logits; None out of a search


class Backend:
    """Launches every operation of a step from Python; or, unless it is eager, replays captured steps where the model is
    on a GPU."""

    def __init__(self, name: str, engine: Engine, source: Source) -> None:
        self.replays = name != EAGER
        self.engine, self.source = engine, source
        self.replayed = ReplayedStep(
            engine.geometry, self._run_fresh, 'a CUDA graph of a recurrent step',
            f"kv_cache_cfg.backend='{CUDA_GRAPH}' does not work here"
        )

    def step(self, weights: Weights, slab: Slab, numbers: np.ndarray, action: Optional[torch.Tensor],
             addresses: Tuple[int, ...] = ()) -> StepResult:
        """One recurrent step from packed numbers ``[N, B]``. A search packs its actions with them, and gets scalars,
        and an output that the next step may overwrite; any other caller passes ``action``, which is on the device
        already. ``addresses`` are those of the weights, as far as the caller knows them."""
        device, rows = self.source.device(), numbers.shape[1]
        if self.replays and device.type == 'cuda' and not weights.training:
            result = self.replayed.run(slab, numbers, action, device, addresses or self.source.addresses())
            if result is not None:
                output, search = result
                if search is None:
                    return StepResult(output.map(lambda part: part[:rows].clone()), None)
                return StepResult(output.map(lambda part: part[:rows]), search[:rows])
        sent = torch.from_numpy(numbers).to(device, non_blocking=True)
        return self._run(weights, slab, sent, action)

    def _run(self, weights: Weights, slab: Slab, numbers: torch.Tensor, action: Optional[torch.Tensor]) -> StepResult:
        engine = self.engine
        tables, counts, positions, packed_action = unpack(engine.geometry, numbers)
        output = engine.step(weights, slab, tables, counts, packed_action if action is None else action, positions)
        return StepResult(output, engine.for_search(weights, output) if action is None else None)

    def _run_fresh(self, slab: Slab, numbers: torch.Tensor, action: Optional[torch.Tensor]) -> StepResult:
        """Reads the weights inside, so that each replay of a capture reads them again."""
        return self._run(self.source.read(True), slab, numbers, action)


def picked(name: str, device: torch.device) -> str:
    """The backend that a ``kv_cache_cfg.backend`` means on a device: 'eager' or 'cudagraph'."""
    return CUDA_GRAPH if name != EAGER and device.type == 'cuda' else EAGER
