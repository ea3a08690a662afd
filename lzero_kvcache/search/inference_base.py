"""What root inference and searches share: the engine and its backend, the slab, keys, lost contexts."""
from typing import Any, Callable, List, Optional, Sequence, Tuple

import numpy as np
import torch
import xxhash

from ..cache.base import PagedCacheManager
from ..cache.pages import Lease, Rows
from ..config import CacheConfig
from ..engine.backends import Backend, StepResult
from ..engine.packing import pack
from ..engine.root_graph import RootGraphs
from ..engine.step import Engine
from ..engine.store import PageStore
from ..engine.weights import Source, Weights
from .compiled_model import CompiledModel
from .device_search import DeviceSearch
from .guard import NanGuard
from .open_steps import OpenStep, OpenSteps
from .timing import Timing
from .whole import CompiledSearch, Shared


class InferenceBase:
    """What all inference of one model shares."""

    def __init__(self, source: Source, encode: Callable[[torch.Tensor], torch.Tensor], manager: PagedCacheManager,
                 store: PageStore, options: CacheConfig, validator: Any, read_network: Callable[[], Any]) -> None:
        self.engine = Engine(source.geometry)
        self.backend = Backend(options.backend, self.engine, source)
        self.timings = {'search': Timing(), 'step': Timing()}
        self.open = OpenSteps(manager, validator)
        self._source, self._encode, self._manager, self._store = source, encode, manager, store
        self._root_graphs = RootGraphs(self.engine, source, encode)
        self._guard = NanGuard(options.on_nan, manager.count_skipped, options.dtype)
        self._model = CompiledModel(read_network, source)
        store.counted += [
            self.backend.replayed.graphs, self._root_graphs.replayed.graphs, self.engine.windows, self._model.memory
        ]
        self.shared = Shared(source, manager, store, self._guard, self.timings)
        self._whole = CompiledSearch(self._model, self.shared)
        self._device = DeviceSearch(self.engine, self.shared, options.matmul)

    def _take_pages(self, lease: Lease, rows: Rows, lost: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Give each of the ``lost [K]`` rows a context of one page. Returns what it takes to rebuild these contexts in
        one forward: their pages, their observations' angles and the rows, ``[3, K]``."""
        tables, counts = rows
        if not len(lost):
            return np.zeros((3, 0), dtype=np.int64)
        pages = lease.allocate(len(lost))
        tables[lost, 0], counts[lost] = pages, 1
        return np.stack([pages, self._angle(positions), lost])

    def _step(self, step: OpenStep, rows: Rows, pages: np.ndarray, timesteps: np.ndarray,
              actions: Optional[np.ndarray], on_device: Optional[torch.Tensor], longest: int,
              reanalysis: bool = False) -> StepResult:
        """A recurrent step from nodes at ``timesteps``; one copy sends all inputs that come from the CPU. In
        LightZero's reanalysis both tokens have the angle of the action, one step later."""
        angles = (2 * timesteps + 3, 2 * timesteps + 3) if reanalysis else (2 * timesteps + 1, 2 * timesteps + 2)
        numbers = pack(self.engine.geometry, rows, pages, angles, actions, longest)
        return self.backend.step(self._weights_of(step), self._slab(), numbers, on_device, step.addresses)

    def _latents(self, obs: torch.Tensor) -> torch.Tensor:
        return self._encode(obs).reshape(len(obs), -1)

    def _slab(self) -> Any:
        return self._store.ready(self._manager.page_capacity, self._source.device())

    def _angle(self, position: np.ndarray) -> np.ndarray:
        geometry = self.engine.geometry
        return position % geometry.rotary_positions if geometry.rotary else position

    def _weights_of(self, step: OpenStep) -> Weights:
        """The current weights, read once for a step."""
        if step.weights is None:
            step.weights = self._source.read(False)
        return step.weights

    def actions_of(self, actions: Sequence[Any], rows: int) -> Tuple[np.ndarray, np.ndarray]:
        """Actions ``[B]`` or ``[B, A]``, and which rows have one; zeros where an episode starts."""
        geometry, going = self.engine.geometry, np.zeros(rows, dtype=bool)
        if geometry.continuous:
            vectors = np.zeros((rows, geometry.action_size), np.float32)
            for row, action in enumerate(actions[:rows]):
                if isinstance(action, np.ndarray):
                    vectors[row], going[row] = action.reshape(-1), True
            return vectors, going
        numbers = np.full(rows, -1, dtype=np.int64)
        numbers[:len(actions)] = [int(action) for action in actions[:rows]]
        going = numbers != -1
        return numbers * going, going


def hash_rows(latent: np.ndarray) -> List[int]:
    """The key of each row ``[B, E]``: XXH3's 64 bits of its bytes."""
    return list(map(xxhash.xxh3_64_intdigest, latent))


def zero_for_nan(part: torch.Tensor) -> torch.Tensor:
    """LightZero's trees cannot handle nan or inf."""
    return part.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
