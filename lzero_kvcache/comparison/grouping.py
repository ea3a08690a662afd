"""Runs sorted into sides, the first of which is the baseline."""
import fnmatch
import itertools
import os
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from ..config import ConfigError
from .reading import OLD, TrainedRun

# What seeds of one side may differ in.
OF_ONE_RUN = ('exp_name', 'seed')


class Side(NamedTuple):
    """Runs that are repeats of each other."""
    name: str
    runs: List[TrainedRun]


def check_groups(runs: Sequence[TrainedRun], groups: Sequence[Tuple[str, str]]) -> None:
    """Refuse a pattern that matches no run, and a group whose runs are all in earlier ones."""
    filled = {name for run in runs for name in _groups_of(run, groups)[:1]}
    for name, pattern in groups:
        if not any(_matches(run, pattern) for run in runs):
            there = ', '.join(run.name for run in runs)
            raise ConfigError(f'--group {name}={pattern}: it matches none of the runs ({there})')
        if name not in filled:
            raise ConfigError(f'--group {name}={pattern}: the runs that it matches are all in earlier groups')


def sort_into_sides(runs: Sequence[TrainedRun], groups: Sequence[Tuple[str, str]]) -> List[Side]:
    """The sides of ``groups`` in their order (the first match counts), then those of the old system, then others."""
    named: Dict[str, List[TrainedRun]] = {name: [] for name, _ in groups}
    others: Dict[Any, List[TrainedRun]] = {}
    for run in runs:
        matching = _groups_of(run, groups)
        if matching:
            named[matching[0]].append(run)
        else:
            others.setdefault(_likeness(run), []).append(run)
    automatic = sorted(others.values(), key=lambda members: members[0].cache != OLD)
    names = _side_names(automatic, taken=list(named))
    return [Side(name, members) for name, members in [*named.items(), *zip(names, automatic)] if members]


def _groups_of(run: TrainedRun, groups: Sequence[Tuple[str, str]]) -> List[str]:
    return [name for name, pattern in groups if _matches(run, pattern)]


def _matches(run: TrainedRun, pattern: str) -> bool:
    names = (run.name, os.path.basename(run.folder), run.folder)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _likeness(run: TrainedRun) -> Any:
    """What runs of one side have in common: their beginning, and the config, or else the system and the name."""
    whole = run.before is None
    if not run.config:
        return whole, run.cache, run.name_without_seed
    return (whole, *sorted((key, repr(value)) for key, value in run.config.items() if key not in OF_ONE_RUN))


def _side_names(sides: Sequence[List[TrainedRun]], taken: List[str]) -> List[str]:
    """The cache system where one side has it, or else the name without the seed, or else that with a number."""
    systems = [side[0].cache for side in sides]
    names: List[str] = []
    for side, system in zip(sides, systems):
        name = system if system and systems.count(system) == 1 else side[0].name_without_seed
        numbered = (f'{name} ({number})' for number in itertools.count(2))
        names.append(next(unique for unique in itertools.chain([name], numbered) if unique not in names + taken))
    return names
