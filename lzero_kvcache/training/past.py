"""
Continuing a training in the folder of its checkpoint. The part after the checkpoint is abandoned: it does not count,
and its points, summary and progress are removed.
"""
import contextlib
import os
from typing import Callable

from ..host.watched import Past
from ..run_files import EVENT_FILES, PROGRESS, SUMMARY, Record, purge
from ..run_hooks import Seen
from ..summary import read_result, read_summary
from .checkpoints import abandon_later, beside


def take_up(folder: str, path: str, at: int, env_step: int, line: Callable[[str], None]) -> Past:
    """Go on in a folder from a checkpoint of these counts, with lines about abandoned parts and unknown numbers."""
    said, ended, noted = Record(folder).read().summary, read_summary(folder), read_result(beside(path))
    before = next((part for part in (ended, noted) if part and (part.train_iter, part.env_step) == (at, env_step)),
                  None)
    if before is None:
        line(f'No file has the time and the counts of this training up to its checkpoint: {SUMMARY} will have the '
             'time, the counts and the evaluations from here on')
    else:  # for a training that goes on from here if this run is killed, which leaves no summary
        before.write(beside(path))
    evaluated, seen = any(held.train_iter == at for held in before.evaluations) if before else False, Seen()
    cut = purge(os.path.join(folder, EVENT_FILES), at, env_step, evaluated, seen.add)
    if cut:
        line(f'Removed {cut:,} points of event files that came after the checkpoint')
    later = abandon_later(path, at, env_step)
    if later:
        line(f'{", ".join(later)}: of the part after the checkpoint, abandoned, not removed')
    for name in (SUMMARY, PROGRESS):  # of a training that went further; last, since what comes before may fail
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, name))
    # LightZero's own entry keeps no result beside a checkpoint, and leaves no summary if it is killed.
    evaluated = evaluated or any(held.train_iter == at and held.env_step < env_step for held in seen.evaluations)
    rewards = [part.best_reward for part in (ended, noted) if part and part.best_reward is not None]
    best = max([*rewards, *(held.reward for held in seen.evaluations)], default=None)
    run_id = before.run_id if before else said.get('run_id')
    return Past((os.path.realpath(path), at), before, run_id, best, at if evaluated else None)
