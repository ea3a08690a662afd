"""
Checkpoints of DI-engine's learner: read without running what they may contain, replaced in one step, loaded into a
policy.
"""
import contextlib
import glob
import os
import re
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping

import torch

from ..config import ConfigError
from ..summary import read_result

CHECKPOINTS = 'ckpt'
STATE = ('model', 'target_model', 'optimizer_world_model')


@dataclass
class Checkpoint:
    """Where a training stood: the policy's state, and the counts that DI-engine's learner saves beside it."""
    state: Dict[str, Any]
    train_iter: int
    env_step: int


def read_checkpoint(path: str) -> Checkpoint:
    """Read a checkpoint of a UniZero training, on the CPU, without running anything that it may contain."""
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f'{path}: no such checkpoint; an experiment has them in its folder ckpt/') from None
    except Exception as error:
        raise ConfigError(
            f'{path} is torn, or holds more than weights and counts ({type(error).__name__}); take another checkpoint'
        ) from error
    missing = [key for key in STATE if not isinstance(content, dict) or key not in content]
    if missing:
        raise ConfigError('{} is no checkpoint of a UniZero training; it lacks {}'.format(path, ', '.join(missing)))
    return Checkpoint(content, int(content.pop('last_iter', 0)), int(content.pop('last_step', 0)))


def save_atomically(data: Mapping[str, Any], path: str) -> None:
    """Replace a checkpoint by a new one in a single step."""
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        with open(temporary, 'wb') as file:
            torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def beside(path: str) -> str:
    """The file beside a checkpoint that has the run's result as it was when the checkpoint was saved."""
    return re.sub(r'(\.pth\.tar)?$', '.json', path, count=1)


def later_checkpoints(path: str, train_iter: int) -> List[str]:
    """The names of the checkpoints beside one that were saved after its iteration, by what was noted beside them."""
    paths = sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(path)), '*.pth.tar')), key=os.path.getmtime)
    others = [other for other in paths if not os.path.samefile(other, path)]
    noted = {os.path.basename(other): read_result(beside(other)) for other in others}
    return [name for name, result in noted.items() if result is not None and result.train_iter > train_iter]


def prune(folder: str, keep: int) -> None:
    """Remove all but the newest checkpoints of iterations; the best one has another name, and stays."""
    paths = glob.glob(os.path.join(glob.escape(folder), 'iteration_*.pth.tar'))
    for path in sorted(paths, key=os.path.getmtime)[:-keep]:
        for file in (path, beside(path)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file)
