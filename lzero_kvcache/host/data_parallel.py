"""LightZero's multi-GPU path: NCCL on GPUs, gloo on CPUs. A run replaces the parts of it that need GPUs or that let
processes diverge."""
import contextlib
import logging
import signal
from functools import partial
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
from ding.utils import dist_init
from easydict import EasyDict
from lzero.config.utils import lz_to_ddp_config

from .patches import Make

# If both were sent, the first counts.
ENDING = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end. LightZero's ``except Exception`` does not catch it."""

    def __init__(self, signum: int, agreed: bool = False) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.agreed = agreed  # by all ranks


class Ranks:
    """
    The processes of one training; a single process exchanges nothing.

    An interrupt ends a collection or an evaluation before its next step, but an update only when it is complete: half
    an update would leave weights of two iterations in one checkpoint. Ranks agree on the end where all of them meet
    anyway (at the end of a collection, after an evaluation, after an update), so that none waits for one that has left.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.main, self.several = rank == 0, size > 1  # the main rank speaks and writes
        self.asked: Optional[int] = None
        self.device = torch.device('cpu')

    def part(self) -> None:
        """Wait for all ranks, since torchrun ends the others as soon as one exits with an error, and leave."""
        if self.several:
            with contextlib.suppress(RuntimeError):
                dist.barrier()
                dist.destroy_process_group()

    def from_main(self, make: Callable[[], Any]) -> Any:
        """Make something on the first rank, for all; its error is raised on every rank."""
        if not self.several:
            return make()
        made: List[Any] = [None]
        if self.main:
            try:
                made = [make()]
            except Exception as error:
                made = [error]
        dist.broadcast_object_list(made, src=0)
        if isinstance(made[0], Exception):
            raise made[0]
        return made[0]

    # ---- ending together -------------------------------------------------------------------------------------------

    def in_collection(self) -> None:
        """Leave a collection if an interrupt was asked for; the others learn of it at the end of theirs."""
        if self.asked is not None:
            self.sum(0.0)

    def collected(self, before: int, after: int) -> int:
        """The environment steps of all ranks, by those of this one before and after a collection."""
        return before + round(self.sum(after - before))

    def in_evaluation(self) -> None:
        """Leave an evaluation if an interrupt was asked for; the others wait for its outcome."""
        if self.asked is not None:
            self.broadcast([False, None], src=0)

    def after_update(self) -> None:
        """Learn whether an interrupt was asked for. All ranks have just exchanged the gradients of this update."""
        self.sum(0.0)

    def sum(self, number: float) -> float:
        """The sum of all ranks' numbers; raises on all of them if an interrupt was asked for on any."""
        asked = [float(self.asked == signum) for signum in ENDING]
        numbers = torch.tensor([number, *asked], dtype=torch.float64, device=self.device)
        if self.several:
            dist.all_reduce(numbers)
        total, *flags = numbers.tolist()
        for flag, signum in zip(flags, ENDING):
            if flag:
                raise Interrupted(signum, agreed=True)
        return total

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        least = torch.tensor([number], device=self.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least.item())

    def broadcast(self, objects: List[Any], src: int) -> None:
        """Take over one rank's objects, in place; raises on all of them if an interrupt was asked for there."""
        told = [*objects, self.asked]
        if self.several:
            dist.broadcast_object_list(told, src=src)
        *objects[:], asked = told
        if asked is not None:
            raise Interrupted(asked, agreed=True)


def join_gpus() -> None:
    """Meet the other processes of a multi-GPU training, one on each GPU."""
    dist_init()


def divide(main_config: EasyDict) -> None:
    """Divide batch, episodes and segments by the number of processes, in place."""
    lz_to_ddp_config(main_config)


def replacements(ranks: Ranks) -> Dict[str, Make]:
    """The replacements, for ``applied``, with which several processes train together, on CPUs too."""
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
