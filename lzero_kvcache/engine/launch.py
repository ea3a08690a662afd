"""How a recurrent step is launched: eagerly, or as a replayed CUDA graph. Knows the engine and the slab."""
import copy
import logging
from typing import Any, Dict, NamedTuple, Optional, Tuple

import numpy as np
import torch

from ..cache.pages import SCRATCH_PAGE
from .slab import MIB, Slab
from .step import Engine, StepOutput
from .weights import Weights

logger = logging.getLogger(__name__)

MAX_MOVES = 16
"""Moves after which a model is taken for one whose storage always moves, and stays eager."""


class Result(NamedTuple):
    """
    Overview:
        A step's predictions, and the part of them that a search takes to the host.
    """
    output: StepOutput
    search: Optional[torch.Tensor]  # [B, 2 + P]: reward and value as scalars, policy logits; None out of a search


class EagerBackend:
    """
    Overview:
        Launches every operation of a step from Python.
    Arguments:
        - engine (:obj:`Engine`): What to run.
    """
    name = 'eager'
    reuses_output = False  # whether the next step overwrites what this one returned

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.memory_mb = 0.0  # held beside the slab

    def step(self, weights: Weights, slab: Slab, numbers: np.ndarray, action: Optional[torch.Tensor]) -> Result:
        """
        Overview:
            One recurrent step; actions that are packed come from a search, which takes scalars.
        Arguments:
            - weights (:obj:`Weights`): The engine's weights.
            - slab (:obj:`Slab`): Where the pages are.
            - numbers (:obj:`np.ndarray`): What :meth:`Engine.pack` made ``[N, B]``.
            - action (:obj:`Optional[torch.Tensor]`): Actions that are on the device already, else they are packed.
        Returns:
            - result (:obj:`Result`): The predictions.
        """
        sent = torch.from_numpy(numbers).to(self.engine.device, non_blocking=True)
        return _run(self.engine, weights, slab, sent, action)

    def __deepcopy__(self, memo: Dict[int, Any]) -> 'EagerBackend':
        return type(self)(copy.deepcopy(self.engine, memo))


class _Graph(NamedTuple):
    graph: Any
    host: torch.Tensor  # pinned [N, rows]
    device: torch.Tensor  # [N, rows]
    action: Optional[torch.Tensor]
    result: Result


class CudaGraphBackend(EagerBackend):
    """
    Overview:
        Replays a captured step. Weights that change in place are seen by the next replay; storage that moved is
        noticed by its address and captured anew.
    """
    name = 'cudagraph'

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
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
        host = graph.host.numpy()
        host[:, :rows] = numbers
        if rows < host.shape[1]:
            host[:, rows:] = self.engine.filler(SCRATCH_PAGE, len(numbers))
        graph.device.copy_(graph.host, non_blocking=True)
        if action is not None:
            assert graph.action is not None
            graph.action[:rows] = action.reshape(graph.action[:rows].shape)
        graph.graph.replay()
        search = graph.result.search
        return Result(graph.result.output.map(lambda part: part[:rows]), None if search is None else search[:rows])

    def _graph(self, weights: Weights, slab: Slab, numbers: np.ndarray,
               action: Optional[torch.Tensor]) -> Optional[_Graph]:
        if not self._usable or self.engine.training or self.engine.device.type != 'cuda':
            return None
        if weights is not self._checked or slab.address not in self._addresses:  # once per search
            addresses = self.engine.addresses() + (slab.address,)
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
        _warn_eager(self.name, reason)

    def _capture(self, slab: Slab, rows: int, count: int, action: Optional[torch.Tensor]) -> _Graph:
        device = self.engine.device
        before = torch.cuda.memory_allocated(device)
        host = torch.empty(count, rows, dtype=torch.int64, pin_memory=True)
        host.numpy()[:] = self.engine.filler(SCRATCH_PAGE, count)
        sent = host.to(device)
        held = None if action is None else torch.zeros_like(action)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # libraries allocate their workspaces before the capture
            for _ in range(3):
                _run_fresh(self.engine, slab, sent, held)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = _run_fresh(self.engine, slab, sent, held)
        held_mb = (torch.cuda.memory_allocated(device) - before) / MIB
        self.memory_mb += held_mb
        logger.info(f'Captured a CUDA graph of a recurrent step for {rows} rows ({held_mb:.1f} MiB)')
        return _Graph(graph, host, sent, held, result)


def picked(name: str, device: torch.device) -> str:
    """
    Overview:
        What a backend's name comes to on a device.
    Arguments:
        - name (:obj:`str`): As in ``kv_cache_cfg.backend``.
        - device (:obj:`torch.device`): Where the model runs.
    Returns:
        - name (:obj:`str`): 'eager' or 'cudagraph'.
    """
    if name not in ('auto', CudaGraphBackend.name):
        return name
    return CudaGraphBackend.name if device.type == 'cuda' else EagerBackend.name


_BACKENDS = {backend.name: backend for backend in (EagerBackend, CudaGraphBackend)}


def make_backend(name: str, engine: Engine) -> EagerBackend:
    """
    Overview:
        The backend of a model.
    Arguments:
        - name (:obj:`str`): 'eager', 'cudagraph', or 'auto': a CUDA graph on a GPU, eager on a CPU.
        - engine (:obj:`Engine`): What it runs.
    Returns:
        - backend (:obj:`EagerBackend`): A CUDA graph runs eagerly for as long as the model is on a CPU.
    """
    return _BACKENDS['cudagraph' if name == 'auto' else name](engine)


def _run(engine: Engine, weights: Weights, slab: Slab, numbers: torch.Tensor,
         action: Optional[torch.Tensor]) -> Result:
    tables, counts, positions, packed_action = engine.unpack(numbers)
    output = engine.step(weights, slab, tables, counts, packed_action if action is None else action, positions)
    return Result(output, engine.for_search(output) if action is None else None)


def _run_fresh(engine: Engine, slab: Slab, numbers: torch.Tensor, action: Optional[torch.Tensor]) -> Result:
    """With the weights read inside, so that a capture reads them anew in each replay."""
    return _run(engine, engine.weights(captured=True), slab, numbers, action)


def _warn_eager(name: str, reason: Any) -> None:
    first_line = str(reason).split('\n', maxsplit=1)[0]
    logger.warning(f"kv_cache_cfg.backend='{name}' does not work here ({first_line}): running eagerly from now on")
