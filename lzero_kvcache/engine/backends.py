"""Backends of the recurrent step: launched eagerly, or replayed as a CUDA graph. ``N`` packed numbers, ``B`` rows."""
import logging
from typing import NamedTuple, Optional, Tuple

import numpy as np
import torch

from .graphs import Captured, Graphs, capture
from .packing import filler, unpack
from .slab import Slab
from .step import Engine, StepOutput
from .transfer import Pinned
from .weights import Source, Weights

logger = logging.getLogger(__name__)


class StepResult(NamedTuple):
    """A step's predictions, and what a search copies of them to the CPU."""
    output: StepOutput
    search: Optional[torch.Tensor]  # [B, 2 + P]: reward and value as numbers, policy logits; None out of a search


class EagerBackend:
    """Launches every operation of a step from Python."""
    name = 'eager'

    def __init__(self, engine: Engine, source: Source) -> None:
        self.engine, self.source = engine, source
        self.graphs = Graphs(f"kv_cache_cfg.backend='{self.name}' does not work here")

    @property
    def reuses_output(self) -> bool:
        """Whether the next step overwrites what this one returned."""
        return bool(self.graphs.kept)

    def step(self, weights: Weights, slab: Slab, numbers: np.ndarray, action: Optional[torch.Tensor],
             addresses: Tuple[int, ...] = ()) -> StepResult:
        """One recurrent step from packed numbers ``[N, B]``. A search packs its actions with them, and gets scalars;
        any other caller passes ``action``, which is on the device already. ``addresses`` are those of the weights, as
        far as the caller knows them."""
        sent = torch.from_numpy(numbers).to(self.source.device(), non_blocking=True)
        return self._run(weights, slab, sent, action)

    def _run(self, weights: Weights, slab: Slab, numbers: torch.Tensor, action: Optional[torch.Tensor]) -> StepResult:
        engine = self.engine
        tables, counts, positions, packed_action = unpack(engine.geometry, numbers)
        output = engine.step(weights, slab, tables, counts, packed_action if action is None else action, positions)
        return StepResult(output, engine.for_search(weights, output) if action is None else None)


class _Graph(NamedTuple):
    captured: Captured
    numbers: Pinned  # [N, rows], packed
    action: Optional[torch.Tensor]


class CudaGraphBackend(EagerBackend):
    """Replays a captured step. Weights that change in place are seen by the next replay; storage that moved is noticed
    by its address and captured anew."""
    name = 'cudagraph'

    def step(self, weights: Weights, slab: Slab, numbers: np.ndarray, action: Optional[torch.Tensor],
             addresses: Tuple[int, ...] = ()) -> StepResult:
        graph = self._graph(weights, slab, numbers, action, addresses)
        if graph is None:
            return super().step(weights, slab, numbers, action)
        rows = numbers.shape[1]
        pinned = graph.numbers.writable()
        pinned[:, :rows] = numbers
        if rows < pinned.shape[1]:
            pinned[:, rows:] = filler(self.engine.geometry, len(numbers))
        graph.numbers.send()
        if action is not None:
            assert graph.action is not None
            graph.action[:rows] = action.reshape(graph.action[:rows].shape)
        graph.captured.replays[0]()
        output, search = graph.captured.results[0]
        return StepResult(output.map(lambda part: part[:rows]), None if search is None else search[:rows])

    def _graph(self, weights: Weights, slab: Slab, numbers: np.ndarray, action: Optional[torch.Tensor],
               addresses: Tuple[int, ...]) -> Optional[_Graph]:
        if weights.training or self.source.device().type != 'cuda':
            return None
        count, rows = numbers.shape
        return self.graphs.get(
            rows, (count, action is not None), (*(addresses or self.source.addresses()), slab.address),
            lambda: self._capture(slab, rows, count, action)
        )

    def _capture(self, slab: Slab, rows: int, count: int, action: Optional[torch.Tensor]) -> _Graph:
        device = self.source.device()
        numbers = Pinned(torch.from_numpy(np.repeat(filler(self.engine.geometry, count), rows, axis=1)), device)
        given = None if action is None else torch.zeros_like(action)
        inputs = [numbers.memory, numbers.sent, *([] if given is None else [given])]
        captured = capture(device, lambda: self._run_fresh(slab, numbers.sent, given), inputs=inputs)
        logger.info(f'Captured a CUDA graph of a recurrent step for {rows} rows ({captured.memory_mb:.1f} MiB)')
        return _Graph(captured, numbers, given)

    def _run_fresh(self, slab: Slab, numbers: torch.Tensor, action: Optional[torch.Tensor]) -> StepResult:
        """Reads the weights inside, so that each replay of a capture reads them again."""
        return self._run(self.source.read(True), slab, numbers, action)


def picked(name: str, device: torch.device) -> str:
    """What ``kv_cache_cfg.backend`` comes to on a device: 'eager' or 'cudagraph'."""
    return CudaGraphBackend.name if name != EagerBackend.name and device.type == 'cuda' else EagerBackend.name


def make_backend(name: str, engine: Engine, source: Source) -> EagerBackend:
    """The backend of ``kv_cache_cfg.backend``; graphs run eagerly for as long as the model is on a CPU."""
    backend = EagerBackend if name == EagerBackend.name else CudaGraphBackend
    return backend(engine, source)
