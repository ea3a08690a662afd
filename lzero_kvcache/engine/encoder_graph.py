"""An encoder's inference on a GPU as a replayed graph, for many observations at once."""
import copy
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import torch
from torch import nn

from .graphs import Captured, Graphs, capture


class _Graph(NamedTuple):
    observations: torch.Tensor  # [rows, ...]
    captured: Captured

    @property
    def memory_mb(self) -> float:
        return self.captured.memory_mb


class EncoderGraph:
    """Encodes ``rows`` observations at once with weights of its own, into which the encoder's are copied: those of a
    target model are moved by each update. The encoder is what ``owner`` has as such at each call."""

    def __init__(self, owner: Any, rows: int) -> None:
        self.rows, self._owner = rows, owner
        self._own: Optional[nn.Module] = None
        self._copied: Optional[nn.Module] = None  # what it is a copy of
        self._graphs = Graphs('An encoder cannot be captured here')

    def __deepcopy__(self, memo: Dict[int, Any]) -> 'EncoderGraph':
        return type(self)(copy.deepcopy(self._owner, memo), self.rows)

    @property
    def memory_mb(self) -> float:
        return self._graphs.memory_mb

    def chunk(self, count: int) -> int:
        """How many of so many observations to encode at once: a GPU has some while the next ones are packed."""
        return self.rows if _numbers(self._owner.encoder)[0].is_cuda else count

    def latest(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function of ``rows`` observations at the most, wherever they are, with the encoder's weights of now."""
        encoder: nn.Module = self._owner.encoder
        theirs = _numbers(encoder)
        device = theirs[0].device
        if device.type != 'cuda' or encoder.training or not self._graphs.usable:
            return lambda observations: encoder(observations.to(device, non_blocking=True).float()).flatten(1)
        if self._own is None or self._copied is not encoder:
            self._own, self._copied = copy.deepcopy(encoder), encoder
        torch._foreach_copy_(_numbers(self._own), theirs)
        return self._replay

    def _replay(self, observations: torch.Tensor) -> torch.Tensor:
        assert self._own is not None
        own, count = self._own, len(observations)
        kind = tuple(observations.shape[1:]), observations.dtype
        graph = self._graphs.get(self.rows, kind, tuple(map(torch.Tensor.data_ptr, _numbers(own))),
                                 lambda: self._capture(observations))
        if graph is None:
            return own(observations.to(_numbers(own)[0].device, non_blocking=True).float()).flatten(1)
        graph.observations[:count].copy_(observations, non_blocking=True)
        graph.captured.replays[0]()
        return graph.captured.results[0][:count].clone()

    def _capture(self, observations: torch.Tensor) -> _Graph:
        own = self._own
        assert own is not None
        device = _numbers(own)[0].device
        seen = torch.zeros((self.rows,) + observations.shape[1:], dtype=observations.dtype, device=device)
        return _Graph(seen, capture(device, lambda: own(seen.float()).flatten(1)))


def _numbers(module: nn.Module) -> List[torch.Tensor]:
    """All that a module's inference reads."""
    return [tensor.detach() for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
