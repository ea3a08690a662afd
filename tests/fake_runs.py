"""Parts of trainings that never ran: a watch of one, a result, a checkpoint without weights."""
import os
from types import SimpleNamespace

import torch

from lzero_kvcache.summary import Result
from lzero_kvcache.training.ranks import DataParallel
from lzero_kvcache.training.watch import Watch


def a_watch(**options):
    """One of a result of its own."""
    result = Result(0, 'train', 'new', 0)
    return Watch(result, SimpleNamespace(line=print), DataParallel(), lambda: None, lambda path: None, **options)


def result(**changes):
    return Result(**{**dict(
        outcome='done', exit_code=0, exp_name='', config='c', entry='train_unizero', task='train', cache='new', seed=0,
        device='cpu', max_env_step=60, max_train_iter=None, env_step=60, train_iter=6, seconds=12.,
        env_steps_per_second=5., host_memory_mb=10., device_memory_mb=None, cache_memory_mb=1.,
        hit_rates={}, counters={}, last_reward=15., best_reward=15.,
        evaluations=[], event_files='e', checkpoint=None, log_file=None, processes=1, machine={},
    ), **changes})


def checkpoint(path, env_step):
    os.makedirs(os.path.dirname(str(path)), exist_ok=True)
    torch.save(dict(model={}, target_model={}, optimizer_world_model={}, last_iter=env_step // 10, last_step=env_step),
               str(path))
    return str(path)
