"""LightZero's multi-GPU path. Of that path, what needs GPUs or lets processes part is replaced during a run."""
import logging
from functools import partial
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Protocol, Tuple

import torch
from ding.utils import dist_init
from easydict import EasyDict
from lzero.config.utils import lz_to_ddp_config

from .patches import Make


class Ranks(Protocol):
    """The processes of one training. They exchange numbers and objects, and leave together: each of these may raise
    where an end was asked for on any of them."""
    rank: int
    size: int
    main: bool
    several: bool
    device: torch.device

    def in_collection(self) -> None: ...

    def in_evaluation(self) -> None: ...

    def collected(self, before: int, after: int) -> int: ...

    def sum(self, number: float) -> float: ...

    def least(self, number: int) -> int: ...

    def broadcast(self, objects: List[Any], src: int) -> None: ...


def join_gpus() -> None:
    """Meet the other processes of a multi-GPU training, one on each GPU."""
    dist_init()


def divide(main_config: EasyDict) -> None:
    """Divide batch, episodes and segments by the number of processes, in place."""
    lz_to_ddp_config(main_config)


def replacements(ranks: Ranks) -> Dict[str, Make]:
    """What ``applied`` replaces so that several processes train together, on CPUs too."""
    if not ranks.several:
        return {}
    replaced: Dict[str, Make] = dict(
        allreduce=lambda original: partial(_reduced, ranks), broadcast=lambda original: ranks.broadcast,
        buffers=lambda original: lambda *args, **kwargs: _CommonBuffer(original(*args, **kwargs), ranks.least),
        gradients=_synchronize_given, hook_rank=lambda original: lambda: ranks.device,
    )
    if ranks.device.type == 'cpu':
        replaced['updates'] = lambda original: partial(_updates, ranks, original)
    if not ranks.main:
        replaced['loggers'] = lambda original: partial(_build_logger, ranks)
    return replaced


def _reduced(ranks: Ranks, number: Any, op: str) -> Any:
    total = ranks.sum(float(number)) / (ranks.size if op == 'avg' else 1)
    return round(total) if isinstance(number, int) and op == 'sum' else total


def _updates(ranks: Ranks, original: Callable[..., int], cfg: EasyDict, new_data: Any, world_size: int = 1) -> int:
    if cfg.policy.update_per_collect is not None:
        return original(cfg, new_data)
    policy = dict(update_per_collect=None, game_segment_length=cfg.policy.game_segment_length, replay_ratio=1)
    return int(ranks.sum(original(EasyDict(policy=policy), new_data)) * cfg.policy.replay_ratio)


def _build_logger(ranks: Ranks, path: str, name: Optional[str] = None, *args: Any, **kwargs: Any) -> Tuple[Any, None]:
    return logging.getLogger(f'rank{ranks.rank}.{name}'), None


def _synchronize_given(original: Callable[..., None]) -> Callable[..., None]:

    def synchronize(policy: Any, model: torch.nn.Module) -> None:
        given = [(name, parameter) for name, parameter in model.named_parameters() if parameter.grad is not None]
        original(policy, SimpleNamespace(named_parameters=lambda: given))

    return synchronize


class _CommonBuffer:
    """A replay buffer that reports the smallest count of all ranks."""

    def __init__(self, buffer: Any, least: Callable[[int], int]) -> None:
        self._buffer = buffer
        self._least = least

    def __getattr__(self, name: str) -> Any:
        return getattr(self._buffer, name)

    def __repr__(self) -> str:
        return repr(self._buffer)

    def get_num_of_transitions(self) -> int:
        return self._least(self._buffer.get_num_of_transitions())

    def get_num_of_game_segments(self) -> int:
        return self._least(self._buffer.get_num_of_game_segments())
