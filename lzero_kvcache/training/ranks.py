"""
Data-parallel training under ``torchrun``, through LightZero's own multi-GPU path: NCCL on GPUs, gloo on CPUs.
"""
import contextlib
import signal
from typing import Any, Callable, List, Optional

import torch
import torch.distributed as dist
from easydict import EasyDict

from ..config import ConfigError
from ..host import data_parallel

SHARED_OUT = ('batch_size', 'n_episode', 'num_segments')
# If both were sent, the first counts.
ENDING = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end. LightZero's ``except Exception`` does not catch it."""

    def __init__(self, signum: int, agreed: bool = False) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.agreed = agreed  # by all ranks


class DataParallel:
    """
    The processes of one training; a single process exchanges nothing.

    An interrupt ends a collection or an evaluation before its next step, but an update only when it is complete: half
    an update would leave weights of two iterations in one checkpoint. Ranks agree on the end where all of them meet
    anyway (at the end of a collection, after an evaluation, after an update), so that none waits for one that has left.
    """

    def __init__(self, rank: int = 0, size: int = 1, on_this_machine: int = 1) -> None:
        self.rank, self.size, self._on_this_machine = rank, size, on_this_machine
        self.main, self.several = rank == 0, size > 1  # the main rank speaks and writes
        self.asked: Optional[int] = None
        self.device = torch.device('cpu')

    def join(self, device: str) -> None:
        """Meet the other ranks."""
        if not self.several:
            return
        if not device.startswith('cuda'):
            dist.init_process_group('gloo')
            return
        gpus = torch.cuda.device_count()
        if self._on_this_machine > gpus:
            raise ConfigError(
                f'{self._on_this_machine} processes need as many GPUs, and there are {gpus}: '
                f'torchrun --nproc_per_node={gpus}, or --device cpu'
            )
        data_parallel.join_gpus()
        self.device = torch.device('cuda', torch.cuda.current_device())

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

    def seed(self, seed: int, environments: int) -> int:
        """The seed of this rank's environments. LightZero gives all ranks the same one: they would collect the same."""
        return seed + self.rank * environments

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

    def share_out(self, main_config: EasyDict, defaults: EasyDict, entry: str) -> None:
        """
        Give this rank its share, in place, of a config whose batch, episodes, segments and environments are those of
        all ranks together. A collector must not have more environments than episodes or segments.
        """
        policy = main_config.policy
        if not self.several:
            if policy.get('multi_gpu', False):
                raise ConfigError('policy.multi_gpu=True needs several processes: torchrun --nproc_per_node=N train.py')
            _check_segments(entry, defaults.policy.get('num_segments'), defaults.env.collector_env_num)
            return
        policy.multi_gpu = True
        for key in SHARED_OUT:
            if defaults.policy.get(key) is not None:
                policy[key] = defaults.policy[key]
        data_parallel.divide(main_config)
        collected = policy['num_segments' if 'segment' in entry else 'n_episode']
        environments = min(defaults.env.collector_env_num, collected)
        _check_segments(entry, collected, environments, ' in each process')
        main_config.env.collector_env_num = policy.collector_env_num = environments
        if 'collector_env_num' in policy.model.world_model_cfg:
            policy.model.world_model_cfg.collector_env_num = environments
        if not self.main:
            policy.use_wandb = False


def _check_segments(entry: str, segments: int, environments: int, of_each: str = '') -> None:
    """The collector of segments has one for each environment of its process, or stops by an assertion."""
    if entry == 'train_unizero_segment' and segments != environments:
        raise ConfigError(
            f'policy.num_segments={segments} contradicts env.collector_env_num={environments}{of_each}: it must be the '
            'same')
