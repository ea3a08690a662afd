"""
Checkpoints of DI-engine's learner: read without running what they may contain, replaced in one step, loaded into a
policy.
"""
import contextlib
import glob
import os
import re
from typing import Any, List, Mapping, Tuple

import torch

from lzero_kvcache_options import NO_CHECKPOINT

from ..config import ConfigError
from ..host.states import Checkpoint, check_parts, faults_under
from ..run_files import read_if_whole, write_json
from ..summary import read_result

CHECKPOINTS = 'ckpt'
ABANDONED = 'abandoned'  # a key in the JSON file beside a checkpoint
STATE = ('model', 'target_model', 'optimizer_world_model')


def read_checkpoint(path: str) -> Checkpoint:
    """Read a checkpoint of a UniZero training, on the CPU, without running anything that it may contain."""
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(NO_CHECKPOINT.format(path)) from None
    except Exception as error:
        raise ConfigError(
            f'{path} is torn, or holds more than weights and counts ({type(error).__name__}); take another checkpoint'
        ) from error
    with faults_under(path):
        check_parts(content, STATE)
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


def in_folder(folder: str) -> List[Tuple[Tuple[int, ...], str]]:
    """Counts and path of each checkpoint in a folder, the furthest last; a copy's times tell nothing of their order."""
    return sorted((_counts(path), path) for path in glob.glob(os.path.join(glob.escape(folder), '*.pth.tar')))


def abandon_later(path: str, *counts: int) -> List[str]:
    """Mark the checkpoints beside one that are further than its iterations and environment steps; gives their names."""
    later = [other for further, other in in_folder(os.path.dirname(path))
             if further > counts and not os.path.samefile(other, path)]
    for other in later:
        write_json(beside(other), {**read_if_whole(beside(other)), ABANDONED: True})
    return list(map(os.path.basename, later))


def is_abandoned(path: str) -> bool:
    """Whether the training in a checkpoint's folder has gone on from an earlier one since it was saved."""
    return bool(read_if_whole(beside(path)).get(ABANDONED))


def _counts(path: str) -> Tuple[int, ...]:
    """Iterations and environment steps of a checkpoint, from the JSON file beside it, or else from the checkpoint;
    empty if neither can be read."""
    found: Any = read_result(beside(path))
    with contextlib.suppress(ConfigError):
        found = found or read_checkpoint(path)
    return (found.train_iter, found.env_step) if found else ()


def prune(folder: str, keep: int) -> None:
    """Remove all but the furthest checkpoints of iterations, abandoned ones first; the best one has another name, and
    stays."""
    paths = [path for _, path in in_folder(folder) if os.path.basename(path).startswith('iteration_')]
    for path in sorted(paths, key=is_abandoned, reverse=True)[:-keep]:
        for file in (path, beside(path)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file)
