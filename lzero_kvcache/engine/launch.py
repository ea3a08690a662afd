"""How a recurrent step is launched: eagerly, or as a replayed CUDA graph. ``N`` packed numbers of ``B`` rows."""
import copy
import logging
from typing import Any, Dict, NamedTuple, Optional, Tuple

import numpy as np
import torch

from .packing import filler, unpack
from .slab import MIB, Slab
from .step import Engine, StepOutput
from .weights import Source, Weights

logger = logging.getLogger(__name__)

MAX_MOVES = 16
"""How often weights may move to new storage, and graphs be captured anew, before steps run eagerly for good."""


class Result(NamedTuple):
    """A step's predictions, and the part of them that a search takes to the CPU."""
    output: StepOutput
    search: Optional[torch.Tensor]  # [B, 2 + P]: reward and value as numbers, policy logits; None out of a search


class EagerBackend:
    """Launches every operation of a step from Python."""
    name = 'eager'
    reuses_output = False  # whether the next step overwrites what this one returned
    memory_mb = 0.0  # held beside the slab

    def __init__(self, engine: Engine, source: Source, scratch_page: int) -> None:
        self.engine, self.source, self._scratch_page = engine, source, scratch_page

    def step(self, weights: Weights, slab: Slab, numbers: np.ndarray, action: Optional[torch.Tensor]) -> Result:
        """One recurrent step from packed numbers ``[N, B]``. A search packs its actions too, and takes scalars; any
        other caller has ``action`` on the device already."""
        sent = torch.from_numpy(numbers).to(self.source.device(), non_blocking=True)
        return self._run(weights, slab, sent, action)

    def _run(self, weights: Weights, slab: Slab, numbers: torch.Tensor, action: Optional[torch.Tensor]) -> Result:
        engine = self.engine
        tables, counts, positions, packed_action = unpack(engine.geometry, numbers)
        output = engine.step(weights, slab, tables, counts, packed_action if action is None else action, positions)
        return Result(output, engine.for_search(weights, output) if action is None else None)

    def __deepcopy__(self, memo: Dict[int, Any]) -> 'EagerBackend':
        parts = copy.deepcopy((self.engine, self.source), memo)
        return type(self)(*parts, self._scratch_page)


class _Graph(NamedTuple):
    graph: Any
    pinned: torch.Tensor  # [N, rows], on the CPU
    copied: Any  # event: the last copy from it is done
    device: torch.Tensor  # [N, rows]
    action: Optional[torch.Tensor]
    result: Result


class CudaGraphBackend(EagerBackend):
    """Replays a captured step. Weights that change in place are seen by the next replay; storage that moved is noticed
    by its address and captured anew."""
    name = 'cudagraph'

    def __init__(self, engine: Engine, source: Source, scratch_page: int) -> None:
        super().__init__(engine, source, scratch_page)
        self._graphs: Dict[Tuple[int, int, bool], _Graph] = {}
        self._addresses: Tuple[int, ...] = ()
        self._checked: Optional[Weights] = None
        self._moves = 0
        self._usable = True

    @property
    def reuses_output(self) -> bool:  # type: ignore[override]
        return bool(self._graphs)

    def step(self, weights: Weights, slab: Slab, numbers: np.ndarray, action: Optional[torch.Tensor]) -> Result:
        graph = self._graph(weights, slab, numbers, action)
        if graph is None:
            return super().step(weights, slab, numbers, action)
        rows = numbers.shape[1]
        graph.copied.synchronize()  # else this would change what the last step has yet to copy
        pinned = graph.pinned.numpy()
        pinned[:, :rows] = numbers
        if rows < pinned.shape[1]:
            pinned[:, rows:] = filler(self.engine.geometry, self._scratch_page, len(numbers))
        graph.device.copy_(graph.pinned, non_blocking=True)
        graph.copied.record()
        if action is not None:
            assert graph.action is not None
            graph.action[:rows] = action.reshape(graph.action[:rows].shape)
        graph.graph.replay()
        search = graph.result.search
        return Result(graph.result.output.map(lambda part: part[:rows]), None if search is None else search[:rows])

    def _graph(self, weights: Weights, slab: Slab, numbers: np.ndarray,
               action: Optional[torch.Tensor]) -> Optional[_Graph]:
        if not self._usable or weights.training or self.source.device().type != 'cuda':
            return None
        if weights is not self._checked or slab.address not in self._addresses:  # once per search
            addresses = self.source.addresses() + (slab.address,)
            if addresses != self._addresses:
                self._moves += bool(self._graphs)
                self._graphs.clear()
                self._addresses, self.memory_mb = addresses, 0.0
            self._checked = weights
        rows = numbers.shape[1]
        kind = len(numbers), action is not None
        fitting = [key for key in self._graphs if key[0] >= rows and key[1:] == kind]
        if fitting:
            return self._graphs[min(fitting)]
        if self._moves >= MAX_MOVES:
            self._give_up('its storage keeps moving')
            return None
        try:
            graph = self._capture(slab, rows, len(numbers), action)
        except RuntimeError as error:
            self._give_up(error)
            return None
        self._graphs[(rows,) + kind] = graph
        return graph

    def _give_up(self, reason: Any) -> None:
        self._usable = False
        self._graphs.clear()
        self.memory_mb = 0.0
        first_line = str(reason).split('\n', maxsplit=1)[0]
        logger.warning(
            f"kv_cache_cfg.backend='{self.name}' does not work here ({first_line}): running eagerly from now on"
        )

    def _capture(self, slab: Slab, rows: int, count: int, action: Optional[torch.Tensor]) -> _Graph:
        device = self.source.device()
        before = torch.cuda.memory_allocated(device)
        pinned = torch.empty(count, rows, dtype=torch.int64, pin_memory=True)
        pinned.numpy()[:] = filler(self.engine.geometry, self._scratch_page, count)
        sent = pinned.to(device)
        held = None if action is None else torch.zeros_like(action)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # libraries allocate their workspaces before the capture
            for _ in range(3):
                self._run_fresh(slab, sent, held)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self._run_fresh(slab, sent, held)
        held_mb = (torch.cuda.memory_allocated(device) - before) / MIB
        self.memory_mb += held_mb
        logger.info(f'Captured a CUDA graph of a recurrent step for {rows} rows ({held_mb:.1f} MiB)')
        return _Graph(graph, pinned, torch.cuda.Event(), sent, held, result)

    def _run_fresh(self, slab: Slab, numbers: torch.Tensor, action: Optional[torch.Tensor]) -> Result:
        """With the weights read inside, so that a capture reads them anew in each replay."""
        return self._run(self.source.read(True), slab, numbers, action)


def picked(name: str, device: torch.device) -> str:
    """What ``kv_cache_cfg.backend`` comes to on a device: 'eager' or 'cudagraph'."""
    return CudaGraphBackend.name if name != EagerBackend.name and device.type == 'cuda' else EagerBackend.name


def make_backend(name: str, engine: Engine, source: Source, scratch_page: int) -> EagerBackend:
    """The backend of ``kv_cache_cfg.backend``; graphs run eagerly for as long as the model is on a CPU."""
    backend = EagerBackend if name == EagerBackend.name else CudaGraphBackend
    return backend(engine, source, scratch_page)
