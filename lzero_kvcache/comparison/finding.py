"""Where a run's files are: from the paths that somebody typed to experiments. No file is opened here."""
import os
from dataclasses import dataclass, field
from typing import Dict, List, Sequence, Tuple

from ..config import ConfigError

EVENT_FILE = 'tfevents'
CONFIG_FILE, SUMMARY_FILE = 'total_config.py', 'summary.json'
# Where LightZero puts event files, below an experiment's folder.
LOG_FOLDER = os.path.join('log', 'serial')


@dataclass
class Experiment:
    """
    Overview:
        A run's folder, its name and its event files, oldest first.
    """
    folder: str
    name: str = ''
    event_files: List[str] = field(default_factory=list)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)


def find_experiments(paths: Sequence[str]) -> List[Experiment]:
    """
    Overview:
        The runs that paths stand for, in their order, each once.
    Arguments:
        - paths (:obj:`Sequence[str]`): Folders of experiments, folders of several, or event files.
    Returns:
        - experiments (:obj:`List[Experiment]`): With names that tell them apart. One without event files has none.
    Raises:
        - ConfigError: If there is nothing under a path.
    """
    found: Dict[str, Experiment] = {}
    for path in paths:
        for folder, files in _look_into(path):
            experiment = found.setdefault(os.path.realpath(folder), Experiment(folder))
            experiment.event_files += [file for file in files if file not in experiment.event_files]
    experiments = list(found.values())
    for experiment in experiments:
        experiment.event_files.sort(key=lambda file: (os.path.basename(file), file))
    for experiment, name in zip(experiments, _names(list(found))):
        experiment.name = name
    return experiments


def _look_into(path: str) -> List[Tuple[str, List[str]]]:
    """Folders of experiments under a path, each with its event files."""
    path = os.path.expanduser(path)
    if os.path.isfile(path):
        return [(_experiment_of(os.path.dirname(os.path.abspath(path))), [os.path.realpath(path)])]
    if not os.path.isdir(path):
        raise ConfigError(f'{path}: no such folder or event file')
    found: Dict[str, List[str]] = {}
    for folder, subfolders, files in os.walk(path):
        subfolders.sort()
        events = [os.path.realpath(os.path.join(folder, file)) for file in files if EVENT_FILE in file]
        if events:
            found.setdefault(_experiment_of(os.path.abspath(folder)), []).extend(events)
        elif CONFIG_FILE in files:
            found.setdefault(os.path.abspath(folder), [])
    return list(found.items()) or [(path, [])]


def _experiment_of(folder: str) -> str:
    """The experiment that a folder of event files belongs to: it, or one above it."""
    above = folder
    for _ in range(4):
        if any(os.path.exists(os.path.join(above, file)) for file in (CONFIG_FILE, SUMMARY_FILE)):
            return above
        above = os.path.dirname(above)
    before, log, _ = (folder + os.sep).partition(os.sep + LOG_FOLDER + os.sep)
    return before if log else folder


def _names(folders: List[str]) -> List[str]:
    """Of each as many last parts of its path as tell it apart from the others."""
    names = []
    for folder in folders:
        parts = folder.split(os.sep)
        depth = 1
        while depth < len(parts) and sum(other.split(os.sep)[-depth:] == parts[-depth:] for other in folders) > 1:
            depth += 1
        names.append(os.sep.join(parts[-depth:]))
    return names
