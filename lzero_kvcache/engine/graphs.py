"""CUDA graphs of one model: captured once for each size, and anew when storage moves."""
import functools
import gc
import logging
import threading
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch

from ..config import MIB

logger = logging.getLogger(__name__)

MAX_MOVES = 16
"""How often storage may move, and graphs be captured anew, before functions are launched from Python for good."""


_capturing = threading.Lock()  # one for the process, since torch captures one graph at a time


class Captured(NamedTuple):
    """Functions whose launches a GPU replays, in memory that they share."""
    replays: List[Callable[[], None]]
    results: List[Any]
    memory_mb: float  # of their pool, and of what they read


def megabytes(*tensors: torch.Tensor) -> float:
    """MiB that tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / MIB


def capture(device: torch.device, *functions: Callable[[], Any], inputs: Sequence[torch.Tensor] = ()) -> Captured:
    """Capture functions that run one after another; what they return is overwritten by each replay. ``inputs`` were
    made for them, and count as their memory."""
    with _capturing, torch.cuda.device(device):  # Triton launches on the current device
        captured = _capture(functions)
    return captured._replace(memory_mb=captured.memory_mb + megabytes(*inputs))


def _capture(functions: Sequence[Callable[[], Any]]) -> Captured:
    stream = _stream_of(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate their workspaces before the capture
        for _ in range(3):
            for function in functions:
                function()
    torch.cuda.current_stream().wait_stream(stream)
    gc.collect()  # another model's graphs, if they were collected during a capture, would break it
    graphs: List[Any] = []
    results, held = [], 0
    for function in functions:
        graph = torch.cuda.CUDAGraph()
        pool = graphs[0].pool() if graphs else None
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode='thread_local'):
            before = torch.cuda.memory_reserved()  # with nothing in it that is free: PyTorch empties its cache here
            results.append(function())
            held += max(0, torch.cuda.memory_reserved() - before)  # with what a replay needs only in between
        graphs.append(graph)
    return Captured([graph.replay for graph in graphs], results, held / MIB)


@functools.lru_cache(maxsize=None)
def _stream_of(device: int) -> Any:
    """One stream for all captures on a device, since libraries keep memory for each that they ran on: cuBLAS 32 MiB."""
    return torch.cuda.Stream(device)


def smallest_fitting(kept: Dict[Tuple[Any, ...], Any], rows: int, suits: Callable[[Tuple[Any, ...]], bool]) -> Any:
    """Of what is kept by its rows and more, the smallest that suits and has room for some rows without many to spare;
    it is the newest from now on. None if there is none."""
    fitting = [key for key in kept if rows <= key[0] <= 2 * rows + 8 and suits(key[1:])]
    if not fitting:
        return None
    key = min(fitting)
    kept[key] = found = kept.pop(key)
    return found


def make_room(kept: Dict[Tuple[Any, ...], Any], most: int) -> None:
    """Let the one go that was not used for longest, if there are as many as may be."""
    if len(kept) >= most:
        del kept[next(iter(kept))]


class Graphs:
    """What is captured for one model, by the number of rows and by ``kind``, which is whatever else tells captures
    apart. Each has a field ``captured``. Each thread has its own, since a replay overwrites inputs and results."""

    def __init__(self, told: str, most: int = 8) -> None:
        self.kept: Dict[Tuple[Any, ...], Any] = {}
        self.moves = 0
        self.captures = 0  # so far, those that went among them
        self.usable = True
        self._told, self._most = told, most  # what the log says of giving up, and how many are kept
        self._addresses: Tuple[int, ...] = ()
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:
        return type(self), (self._told, self._most)  # a copy begins without

    @property
    def memory_mb(self) -> float:
        return sum(graph.captured.memory_mb for graph in list(self.kept.values()))

    def get(self, rows: int, kind: Tuple[Any, ...], addresses: Tuple[int, ...],
            make: Callable[[], Any]) -> Optional[Any]:
        """The smallest that there is for so many rows or more, or else one that is made now; None where nothing can be
        captured. ``addresses`` are those of all that a graph reads."""
        kind += (threading.get_ident(), )
        with self._lock:
            if not self.usable:
                return None
            if addresses != self._addresses:
                self.moves += bool(self.kept)
                self.kept.clear()
                self._addresses = addresses
            found = smallest_fitting(self.kept, rows, lambda others: others == kind)
            if found is not None:
                return found
            if self.moves >= MAX_MOVES:
                self.give_up('its storage keeps moving')
                return None
            make_room(self.kept, self._most)
            try:
                made = make()
            except Exception as error:  # Triton's, and its compiler's, have types of their own
                self.give_up(error)
                return None
            self.kept[(rows,) + kind] = made
            self.captures += 1
            return made

    def give_up(self, reason: Any) -> None:
        """Capture nothing from now on."""
        self.usable = False
        self.kept.clear()
        first_line = str(reason).split('\n', maxsplit=1)[0]
        logger.warning(f'{self._told} ({first_line}): running eagerly from now on')
