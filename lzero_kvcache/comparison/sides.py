"""Which runs are seeds of one side, what the side is called, and which side the others are compared to."""
import fnmatch
import os
from typing import Dict, Hashable, List, NamedTuple, Sequence, Tuple, Union

from ..config import ConfigError
from .finding import Experiment
from .runs import Run
from .saved_config import OF_ONE_RUN

OLD = 'old'


class Side(NamedTuple):
    """
    Overview:
        Runs that differ in nothing but their seed, and their name together.
    """
    name: str
    runs: List[Run]


def check_groups(experiments: Sequence[Experiment], groups: Sequence[Tuple[str, str]]) -> None:
    """
    Overview:
        Refuse what cannot have been meant, before anything is read.
    Arguments:
        - experiments (:obj:`Sequence[Experiment]`): All runs.
        - groups (:obj:`Sequence[Tuple[str, str]]`): (name, pattern) of each side.
    Raises:
        - ConfigError: If a pattern matches no run.
    """
    for name, pattern in groups:
        if not any(_matches(experiment, pattern) for experiment in experiments):
            there = ', '.join(experiment.name for experiment in experiments)
            raise ConfigError(f'--group {name}={pattern}: it matches none of the runs ({there})')


def sort_into_sides(runs: Sequence[Run], groups: Sequence[Tuple[str, str]] = ()) -> List[Side]:
    """
    Overview:
        Group runs.
    Arguments:
        - runs (:obj:`Sequence[Run]`): The runs.
        - groups (:obj:`Sequence[Tuple[str, str]]`): (name, pattern) of each side; the first match counts.
    Returns:
        - sides (:obj:`List[Side]`): Those of ``groups`` first, in their order, then those of the old system.
    """
    named: Dict[str, List[Run]] = {name: [] for name, _ in groups}
    others: Dict[Hashable, List[Run]] = {}
    for run in runs:
        matching = [name for name, pattern in groups if _matches(run, pattern)]
        if matching:
            named[matching[0]].append(run)
        else:
            others.setdefault(_likeness(run), []).append(run)
    automatic = sorted(others.values(), key=lambda group: group[0].cache != OLD)
    sides = [Side(name, members) for name, members in named.items() if members]
    for name, members in zip(_names(automatic, taken=list(named)), automatic):
        sides.append(Side(name, members))
    return sides


def _matches(run: Union[Run, Experiment], pattern: str) -> bool:
    names = (run.name, os.path.basename(run.folder), run.folder)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _likeness(run: Run) -> Hashable:
    """Equal for seeds of one side: the config, or without one what the run is called."""
    if not run.config:
        return run.cache, run.name_without_seed
    return tuple(sorted((key, repr(value)) for key, value in run.config.items() if key not in OF_ONE_RUN))


def _names(sides: List[List[Run]], taken: List[str]) -> List[str]:
    """The cache system where one side has it, or else the name without the seed, or else that with a number."""
    systems = [side[0].cache for side in sides]
    names: List[str] = []
    for side, system in zip(sides, systems):
        name = system if system and systems.count(system) == 1 else side[0].name_without_seed
        unique, number = name, 1
        while unique in names + taken:
            number += 1
            unique = f'{name} ({number})'
        names.append(unique)
    return names
