"""The processes that torchrun starts for a training: how they meet, and what each of them collects and trains on."""
import torch
import torch.distributed as dist
from easydict import EasyDict

from ..config import ConfigError
from ..host import data_parallel

SHARED_OUT = ('batch_size', 'n_episode', 'num_segments')


class DataParallel(data_parallel.Ranks):
    """The processes of a training."""

    def __init__(self, rank: int = 0, size: int = 1, on_this_machine: int = 1) -> None:
        super().__init__(rank, size)
        self._on_this_machine = on_this_machine

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

    def seed(self, seed: int, environments: int) -> int:
        """The seed of this rank's environments. LightZero gives all ranks the same one: they would collect the same."""
        return seed + self.rank * environments

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
