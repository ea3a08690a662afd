"""Tensorboard's event files of a training that goes on where an earlier part of it was."""
import os

from ..run_files import events


def purge(folder: str, train_iter: int) -> int:
    """
    Cut what was written after a checkpoint of ``train_iter`` off event files, since training goes on from there and
    writes it again; returns how many points that were. Tensorboard's own purge knows one kind of step for all tags, and
    here some count iterations and some environment steps.
    """
    points = 0
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        path = os.path.join(folder, name)
        whole, cut = 0, False
        for end, event in events(path):
            cut = cut or any('_iter/' in value.tag and event.step >= train_iter for value in event.summary.value)
            if cut:
                points += len(event.summary.value)
            else:
                whole = end
        if cut:
            os.truncate(path, whole)
    return points
