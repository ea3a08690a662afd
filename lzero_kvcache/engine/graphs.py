"""CUDA graphs of one model: captured once for each size, and again when storage moves."""
import functools
import gc
import logging
import threading
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from ..config import MIB
from .packing import filler
from .slab import Slab, megabytes
from .transfer import Pinned
from .weights import Geometry

logger = logging.getLogger(__name__)

MAX_MOVES = 16
"""How often storage may move, and graphs be captured again, before functions are launched from Python for good."""

MOST_KEPT = 8
"""Captures of one model that are kept at a time."""

_capturing = threading.Lock()  # one for the process, since torch captures one graph at a time


class Captured(NamedTuple):
    """CUDA graphs of some functions, which share a memory pool."""
    replays: List[Callable[[], None]]
    results: List[Any]
    memory_mb: float  # of their pool, and of what they read


def capture(device: torch.device, *functions: Callable[[], Any], inputs: Sequence[torch.Tensor] = ()) -> Captured:
    """Capture functions that run one after another; what they return is overwritten by each replay. ``inputs`` were
    made for them, and count as their memory."""
    graphs: List[Any] = []
    results, reserved = [], 0
    with _capturing, torch.cuda.device(device):  # Triton launches on the current device
        stream = _stream_of(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries allocate their workspaces before the capture
            for _ in range(3):
                for function in functions:
                    function()
        torch.cuda.current_stream().wait_stream(stream)
        gc.collect()  # another model's graphs, if they were collected during a capture, would break it
        for function in functions:
            graph = torch.cuda.CUDAGraph()
            pool = graphs[0].pool() if graphs else None
            # Other threads may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode='thread_local'):
                before = torch.cuda.memory_reserved()  # with nothing in it that is free: PyTorch empties its cache here
                results.append(function())
                reserved += max(0, torch.cuda.memory_reserved() - before)  # with what a replay needs only in between
            graphs.append(graph)
    return Captured([graph.replay for graph in graphs], results, reserved / MIB + megabytes(*inputs))


@functools.lru_cache(maxsize=None)
def _stream_of(device: int) -> Any:
    """One stream for all captures of the process on a device: libraries keep memory for each stream that they ran on,
    cuBLAS 32 MiB."""
    return torch.cuda.Stream(device)


class Graphs:
    """Captures of one model by their number of rows and their ``kind``, the rest of the key; the most recently used is
    last. Each has a field ``captured``."""

    def __init__(self, failure: str, fallback: str = 'running eagerly') -> None:
        self.kept: Dict[Tuple[Any, ...], Any] = {}
        self.moves = 0
        self.captures = 0  # so far, dropped ones included
        self.usable = True
        self.lock = threading.RLock()
        self._failure, self._fallback = failure, fallback  # the two halves of the warning
        self._addresses: Tuple[int, ...] = ()

    def __reduce__(self) -> Any:
        return type(self), (self._failure, self._fallback)  # a copy begins without captures

    @property
    def memory_mb(self) -> float:
        return sum(graph.captured.memory_mb for graph in list(self.kept.values()))

    def get(self, rows: int, kind: Tuple[Any, ...], addresses: Tuple[int, ...],
            make: Callable[[], Any]) -> Optional[Any]:
        """The smallest capture that fits, or else a new one; None where nothing can be captured. Each thread has its
        own, since a replay overwrites inputs and results."""
        kind += (threading.get_ident(),)
        with self.lock:
            if not self.usable:
                return None
            found = self.find(rows, addresses, lambda others: others == kind)
            if found is None:
                self.make_room()
                found = self.attempt(make)
                if found is None:
                    self.kept.clear()
                else:
                    self.kept[(rows,) + kind] = found
            return found

    def find(self, rows: int, addresses: Tuple[int, ...], suits: Callable[[Tuple[Any, ...]], bool]) -> Any:
        """The smallest capture of a kind that suits, for ``rows`` to ``2 rows + 8`` rows; None if there is none.
        ``addresses`` are those of all memory that a graph reads: if one has changed, all captures are dropped."""
        if addresses != self._addresses:
            self.moves += bool(self.kept)
            self.kept.clear()
            self._addresses = addresses
        fitting = [key for key in self.kept if rows <= key[0] <= 2 * rows + 8 and suits(key[1:])]
        if not fitting:
            return None
        key = min(fitting)
        self.kept[key] = found = self.kept.pop(key)  # to the end
        return found

    def make_room(self) -> None:
        """Drop the least recently used capture, if there are :data:`MOST_KEPT`."""
        if len(self.kept) >= MOST_KEPT:
            del self.kept[next(iter(self.kept))]

    def attempt(self, make: Callable[[], Any]) -> Any:
        """The capture that ``make`` returns. If it fails, or storage has moved too often: None, a warning, and no more
        captures."""
        try:
            if self.moves >= MAX_MOVES:
                raise RuntimeError('its storage keeps moving')
            made = make()
        except Exception as error:  # Triton's, and its compiler's, have types of their own
            self.usable = False
            first_line = str(error).split('\n', maxsplit=1)[0]
            logger.warning(f'{self._failure} ({first_line}): {self._fallback} from now on')
            return None
        self.captures += 1
        return made


class _Step(NamedTuple):
    captured: Captured
    numbers: Pinned  # [N, rows], packed
    given: Optional[torch.Tensor]


class ReplayedStep:
    """Captures and replays a function of a slab, packed numbers ``[N, B]``, and a tensor ``[B, ...]`` or None. Weights
    that change in place are seen by the next replay if the function reads them; if an address has changed, the next
    run captures again."""

    def __init__(self, geometry: Geometry, function: Callable[[Slab, torch.Tensor, Any], Any], name: str,
                 failure: str) -> None:
        self._geometry, self._function, self._name = geometry, function, name
        self.graphs = Graphs(failure)

    def run(self, slab: Slab, numbers: np.ndarray, given: Optional[torch.Tensor], device: torch.device,
            addresses: Tuple[int, ...]) -> Any:
        """The function's result for these rows, and after them for rows that only fill up; the next run overwrites it.
        None where nothing can be captured. ``addresses`` are those of all memory that it reads beside the slab."""
        count, rows = numbers.shape
        kind = (count, None if given is None else (given.shape[1:], given.dtype))
        step = self.graphs.get(
            rows, kind, (*addresses, slab.address), lambda: self._capture(slab, rows, count, given, device)
        )
        if step is None:
            return None
        pinned = step.numbers.writable()
        pinned[:, :rows], pinned[:, rows:] = numbers, filler(self._geometry, count)
        step.numbers.send()
        if given is not None:
            step.given[:rows].copy_(given)
        step.captured.replays[0]()
        return step.captured.results[0]

    def _capture(self, slab: Slab, rows: int, count: int, given: Optional[torch.Tensor],
                 device: torch.device) -> _Step:
        numbers = Pinned(torch.from_numpy(np.repeat(filler(self._geometry, count), rows, axis=1)), device)
        held = None if given is None else torch.zeros_like(given)
        inputs = [numbers.memory, numbers.sent, *([] if held is None else [held])]
        captured = capture(device, lambda: self._function(slab, numbers.sent, held), inputs=inputs)
        logger.info(f'Captured {self._name} for {rows} rows ({captured.memory_mb:.1f} MiB)')
        return _Step(captured, numbers, held)
