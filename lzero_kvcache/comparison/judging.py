"""
Which runs are compared, and in what: the sides, of which the first is the baseline, what their configs differ in, and
the warnings that say in which measures runs cannot be compared, and why.
"""
import fnmatch
import itertools
import os
import statistics
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

from ..config import FLAG, OPTIONS, PREFIX, ConfigError
from ..run_files import DONE, LOADED, STOPPED, Expression
from ..text import time_text
from .reading import TrainedRun, finite

OLD = 'old'
# Keys that runs of one side may differ in.
OF_ONE_RUN = ('exp_name', 'seed')
# Keys of a config: those that the plugin adds in every system, those that the systems differ in, and those that other
# warnings mention. A warning above the table names at most SAID_KEYS of the others.
OWN_HOOKS = 'policy.learn.learner.hook.kv_cache_'
CACHE_OPTIONS = (f'{PREFIX}.{FLAG}', f'{PREFIX}.{OPTIONS}')
ENVIRONMENT_KEYS = ('env.env_id', 'env.env_name', 'env.type')
TOLD_OF = (*ENVIRONMENT_KEYS, 'policy.cuda', 'policy.device', PREFIX + '.device', LOADED)
SAID_KEYS = 3
ABSENT = Expression('(absent)')
# What a measure is about: a difference between runs may make times incomparable, for example, and not rewards. The
# time of one search or step is about the same in a short run and in a long one; the host's memory grows with the replay
# buffer.
TIME, CALL_TIME, SPEED, HOST_MEMORY, MEMORY, HITS, COUNT, REWARDS = ALL = (
    'training times', 'times of a search or step', 'speeds', 'host memory', 'memory', 'hit rates', 'counts', 'rewards')
OF_A_WHOLE_RUN = (TIME, HOST_MEMORY, COUNT, REWARDS)
OF_ONE_LENGTH = (TIME, SPEED, HOST_MEMORY, COUNT, REWARDS)
OF_ONE_MACHINE = (TIME, CALL_TIME, SPEED, HOST_MEMORY, MEMORY)
CONFIGS = 'configs'  # no measure is about these
# Collection ends with a whole phase, so that runs of one budget end some steps apart.
BUDGET_TOLERANCE, SAID_TOLERANCE = 0.75, 0.95
# Functions that read one value of a run, None if it is not known; and several of them by the names of these values.
Value = Callable[[TrainedRun], Any]
Values = Mapping[str, Value]


class Side(NamedTuple):
    """Runs that are repeats of each other."""
    name: str
    runs: List[TrainedRun]


class Caution(NamedTuple):
    """A warning; measures about what ``blocks`` names are not comparable because of it."""
    text: str
    blocks: Tuple[str, ...] = ()


# ---- sides -----------------------------------------------------------------------------------------------------------

def check_groups(runs: Sequence[TrainedRun], groups: Sequence[Tuple[str, str]]) -> None:
    """Refuse a pattern that matches no run, and a group whose runs are all in earlier ones."""
    filled = {_group_of(run, groups) for run in runs}
    for name, pattern in groups:
        if not any(_group_of(run, [(name, pattern)]) for run in runs):
            there = ', '.join(run.name for run in runs)
            raise ConfigError(f'--group {name}={pattern}: it matches none of the runs ({there})')
        if name not in filled:
            raise ConfigError(f'--group {name}={pattern}: the runs that it matches are all in earlier groups')


def sort_into_sides(runs: Sequence[TrainedRun], groups: Sequence[Tuple[str, str]]) -> List[Side]:
    """The sides of ``groups`` in their order (the first match counts), then those of the old system, then others."""
    named: Dict[str, List[TrainedRun]] = {name: [] for name, _ in groups}
    others: Dict[Any, List[TrainedRun]] = {}
    for run in runs:
        group = _group_of(run, groups)
        (others.setdefault(_likeness(run), []) if group is None else named[group]).append(run)
    automatic = sorted(others.values(), key=lambda members: members[0].cache != OLD)
    systems = [members[0].cache for members in automatic]
    for members, system in zip(automatic, systems):
        name = system if system and systems.count(system) == 1 else members[0].name_without_seed
        numbered = (f'{name} ({number})' for number in itertools.count(2))
        named[next(unique for unique in itertools.chain([name], numbered) if unique not in named)] = members
    return [Side(name, members) for name, members in named.items() if members]


def runs_of(sides: Sequence[Side]) -> List[TrainedRun]:
    return [run for side in sides for run in side.runs]


def _group_of(run: TrainedRun, groups: Sequence[Tuple[str, str]]) -> Optional[str]:
    """The first whose pattern matches the run."""
    names = (run.name, os.path.basename(run.folder), run.folder)
    return next((group for group, pattern in groups if any(fnmatch.fnmatchcase(name, pattern) for name in names)), None)


def _likeness(run: TrainedRun) -> Any:
    """The values that runs of one side share: how they began, and the config, or else the system and the name."""
    whole = run.before is None
    if not run.config:
        return whole, run.cache, run.name_without_seed
    return (whole, *sorted((key, repr(value)) for key, value in run.config.items() if key not in OF_ONE_RUN))


def config_differences(sides: Sequence[Side]) -> Dict[str, Dict[str, str]]:
    """
    For each config key that two sides do not have the same values for, but for the plugin's own hooks: a text for each
    side, its value, or all of them joined by '; '. Sides without a saved config are left out.
    """
    known = {side.name: [run.config for run in side.runs if run.config] for side in sides}
    keys = {key for configs in known.values() for config in configs for key in config
            if key not in OF_ONE_RUN and not key.startswith(OWN_HOOKS)}
    differences = {}
    for key in sorted(keys):
        values = {name: '; '.join(dict.fromkeys(repr(config.get(key, ABSENT)) for config in configs))
                  for name, configs in known.items() if configs}
        if len(set(values.values())) > 1:
            differences[key] = values
    return differences


# ---- warnings --------------------------------------------------------------------------------------------------------

def warnings_of(sides: Sequence[Side], differences: Mapping[str, Any]) -> List[Caution]:
    """All warnings about runs, sides and differences of configs; first those that make measures incomparable."""
    runs = runs_of(sides)
    noted = [Caution(f'{run.name}: {note}') for run in runs for note in run.notes]
    said = [*_resumed(runs), *_other_overrides(runs), *noted, *cautions(sides), *_other_trainings(differences)]
    return sorted(said, key=lambda caution: not caution.blocks)


def blocked(sides: Sequence[Side]) -> Set[str]:
    """The measures in which the runs of these sides are not comparable."""
    return {about for caution in cautions(sides) for about in caution.blocks}


def cautions(sides: Sequence[Side]) -> Iterator[Caution]:
    """The warnings about these sides."""
    runs = runs_of(sides)
    if len(sides) == 1:
        yield Caution(f"All runs are of one side, '{sides[0].name}': there is nothing to compare it to (--group makes "
                      'sides)')
    yield from _disagreements(sides, ENVIRONMENT, 'nothing here is comparable', ALL)
    yield from _branches(runs)
    yield from _no_repeats(sides)
    yield from _seeds(sides)
    yield from _incomplete(runs)
    yield from _disagreements(sides, ENDS, _effect(OF_A_WHOLE_RUN), OF_A_WHOLE_RUN)
    yield from list(_disagreements(sides, BUDGETS, _effect(OF_ONE_LENGTH), OF_ONE_LENGTH)) or _other_lengths(sides)
    machines = list(_disagreements(sides, MACHINE, 'times and memory are not comparable', OF_ONE_MACHINE))
    yield from machines or _disagreements(sides, HOST, 'times are comparable if these are of one kind')
    yield from _disagreements(sides, VERSIONS, 'what differs may come from these')
    yield from _at_once(runs)


def _resumed(runs: Sequence[TrainedRun]) -> Iterator[Caution]:
    """A line for each checkpoint that a run went on from; of LightZero's own entry, its first iteration tells."""
    for run in runs:
        places = [f'{step:,} environment steps' for step in run.summary.get('resumed_at') or []]
        for place in places or ([] if run.before is None else [f'iteration {run.first_iteration:,}']):
            yield Caution(f'{run.name} went on with an empty replay buffer at {place}, which bends its curves')


def _other_overrides(runs: Sequence[TrainedRun]) -> Iterator[Caution]:
    """A line for each run that went on in place with other overrides, with those that not all parts have."""
    for run in runs:
        held = [part.get('overrides') or [] for part in run.parts]
        common = set.intersection(*map(set, held))
        parts = [' '.join(override for override in each if override not in common) or 'none' for each in held]
        if len(set(parts)) > 1:
            said = '; '.join(f'part {number}: {overrides}' for number, overrides in enumerate(parts, 1))
            yield Caution(f'{run.name} went on with other overrides ({said}), and its config is that of its last part')


def _other_trainings(differences: Mapping[str, Any]) -> Iterator[Caution]:
    """A line where configs differ in more than the cache's options, so that more than the cache is compared."""
    keys = [key for key in differences if not key.startswith((*CACHE_OPTIONS, *TOLD_OF))]
    if keys:
        more = f' and {len(keys) - SAID_KEYS} more' if len(keys) > SAID_KEYS else ''
        yield Caution(f'The configs differ in more than the cache, in {", ".join(keys[:SAID_KEYS])}{more}: what '
                      'differs may come from these', blocks=(CONFIGS, ))


def _effect(blocks: Sequence[str]) -> str:
    return f'{", ".join(blocks[:-1])} and {blocks[-1]} are not comparable'


# ---- what runs must have one value of to be comparable ---------------------------------------------------------------

def _said(*keys: str) -> Value:
    return lambda run: run.from_summary(*keys)


def _of_machine(key: str) -> Value:
    """A function that reads one value of a run's machine; 'none' where the machine has no such part."""
    def value_of(run: TrainedRun) -> Any:
        machine = run.from_summary('machine')
        return (machine[key] or 'none') if isinstance(machine, dict) and key in machine else None

    return value_of


ENVIRONMENT: Values = {'environments': lambda run: next(
    (run.config[key] for key in ENVIRONMENT_KEYS if run.config.get(key) is not None), None)}
ENDS: Values = {'ends': lambda run: run.outcome if run.outcome in (DONE, STOPPED) else None}
BUDGETS = {'budgets of environment steps': _said('max_env_step'),
           'budgets of training iterations': _said('max_train_iter')}
MACHINE: Values = {
    'devices': lambda run: run.from_summary('device') or run.config.get(PREFIX + '.device'),
    'numbers of processes': _said('processes'), 'systems': _of_machine('system'),
    'processors': _of_machine('processor'), 'CPUs': _of_machine('cpu'), 'numbers of CPUs': _of_machine('cpus'),
    'numbers of threads': _of_machine('threads'), 'GPUs': _of_machine('gpu'),
    'versions of Python': _of_machine('python'), 'versions of torch': _of_machine('torch'),
    'versions of DI-engine': _of_machine('ding'),
}
HOST: Values = {'hosts': lambda run: run.host}
VERSIONS = {'versions of LightZero': _said('versions', 'LightZero'),
            'versions of lzero_kvcache': _said('versions', 'lzero_kvcache'), 'commits': _said('versions', 'commit')}


def _disagreements(sides: Sequence[Side], values_of: Values, effect: str,
                   blocks: Tuple[str, ...] = ()) -> Iterator[Caution]:
    """A line for each thing that runs are known to have more than one value of."""
    for what, value_of in values_of.items():
        values = {side.name: dict.fromkeys(f'{value:,}' if isinstance(value, int) else str(value)
                                           for value in map(value_of, side.runs) if value is not None)
                  for side in sides}
        if len(set(itertools.chain(*values.values()))) > 1:
            yield Caution(f'Different {what} ({_by_side(values)}): {effect}', blocks)


def _by_side(values: Mapping[str, Iterable[Any]]) -> str:
    return '; '.join(f"{name}: {', '.join(map(str, found)) or 'unknown'}" for name, found in values.items())


# ---- seeds and repeats -----------------------------------------------------------------------------------------------

def _seeds(sides: Sequence[Side]) -> Iterator[Caution]:
    seeds = {side.name: sorted(run.seed for run in side.runs if run.seed is not None) for side in sides}
    if any(set(found) != set(seeds[sides[0].name]) for found in seeds.values()):
        yield Caution(f'Different seeds: {_by_side(seeds)}')
    single = [f"'{side.name}'" for side in sides if len(side.runs) == 1]
    if single:
        yield Caution(f"One run of {' and of '.join(single)}: without a spread, chance cannot be told from effect")
    for name, found in seeds.items():
        repeated = dict.fromkeys(str(seed) for seed in found if found.count(seed) > 1)
        if repeated:
            yield Caution(f"More than one run of '{name}' has seed {', '.join(repeated)}: their spread is not one of "
                          'seeds')


def _branches(runs: Sequence[TrainedRun]) -> Iterator[Caution]:
    """A line for runs that are one training up to some checkpoint, as a folder that was copied and went on."""
    for one, other in itertools.combinations(runs, 2):
        if _is_branch(one, other):
            yield Caution(f'{one.name} and {other.name} are copies or branches of one training, and not two: nothing '
                          'is comparable between them', ALL)


def _is_branch(one: TrainedRun, other: TrainedRun) -> bool:
    """Whether both are of one training. Runs of earlier versions do not say so."""
    return bool(one.summary.get('run_id')) and one.summary['run_id'] == other.summary.get('run_id')


def _no_repeats(sides: Sequence[Side]) -> Iterator[Caution]:
    """A line for runs of one side that are not repeats of each other."""
    for side in sides:
        parts = [run.name for run in side.runs if run.before is not None]
        if 0 < len(parts) < len(side.runs):
            yield Caution(f"Of '{side.name}', {', '.join(parts)} went on from a checkpoint, and other runs did not: "
                          'they are no repeats of each other', ALL)
            continue
        for one, other in itertools.combinations(side.runs, 2):
            alike = one.seed == other.seed and (parts or one.spans[0][0] == other.spans[0][0])
            if alike and not _is_branch(one, other):
                began = 'went on from checkpoints with one seed' if parts else 'began at the same moment'
                yield Caution(f'{one.name} and {other.name} {began}: they are taken to be parts or copies of one '
                              'training, and no repeats of each other', ALL)


def _at_once(runs: Sequence[TrainedRun]) -> Iterator[Caution]:
    """A line if runs overlap in time, but for what branches of one training have in common. Runs of unknown hosts are
    taken to share one."""
    for one, other in itertools.combinations(runs, 2):
        branch = _is_branch(one, other)
        overlap = any(max(span[0], others[0]) < min(span[1], others[1]) and not (branch and span[0] == others[0])
                      for span in one.spans for others in other.spans)
        if overlap and one.host == other.host:
            yield Caution(f'Runs went on at the same time on one machine, as {one.name} and {other.name}: '
                          'they took time from each other')
            return


# ---- how much of a training there is ---------------------------------------------------------------------------------

def _incomplete(runs: Sequence[TrainedRun]) -> Iterator[Caution]:
    """A line for each run that is a part of a training, or was stopped."""
    by_events = any(finite(run.from_summary('seconds')) is None for run in runs)
    for run in runs:
        reasons = []
        if run.before is not None:
            place = f'at {run.before:,}' if run.before else f'of iteration {run.first_iteration:,}'
            reasons.append(f'it went on from a checkpoint {place}')
        if run.outcome not in (DONE, STOPPED):
            reasons.append(run.outcome)
        elif by_events and run.damaged:
            reasons.append('its event files are damaged')
        if reasons:
            blocks = OF_ONE_LENGTH if _uneven(run.own_steps for run in runs) else OF_A_WHOLE_RUN
            seconds = run.seconds if by_events else run.from_summary('seconds')
            yield Caution(f"{run.name} has {time_text(seconds)} for {_length(run)} ({'; '.join(reasons)}): "
                          f'{_effect(blocks)}', blocks)
        elif run.outcome == STOPPED:
            yield Caution(f'{run.name} ended when its reward reached env.stop_value, after {_length(run)}')


def _length(run: TrainedRun) -> str:
    """As '432 of its 1,046 environment steps'."""
    own, budget = run.own_steps, run.from_summary('max_env_step')
    if own is None:
        return 'no environment steps'
    if run.before:
        return f'{own:,} of its {run.before + own:,} environment steps'
    return f'{own:,}' + (f' of {budget:,}' if isinstance(budget, int) and budget > own else '') + ' environment steps'


def _uneven(lengths: Iterable[Optional[int]]) -> bool:
    known = [length for length in lengths if length is not None]
    return bool(known) and min(known) < BUDGET_TOLERANCE * max(known)


def _other_lengths(sides: Sequence[Side]) -> Iterator[Caution]:
    """Of runs that are not known to have other budgets. The times of nearly equal lengths are compared."""
    runs = runs_of(sides)
    budget = runs[0].from_summary('max_env_step')
    lengths = {side.name: sorted((run.steps, run.name) for run in side.runs if run.steps is not None) for side in sides}
    said = _by_side({name: dict.fromkeys(f'{run} {steps:,}' for steps, run in (found[:1] + found[-1:]))
                     for name, found in lengths.items()})
    whole = {side.name: [run.steps for run in side.runs if run.steps is not None and _is_whole(run)] for side in sides}
    medians = {name: statistics.median(found) for name, found in whole.items() if found}
    uneven = _uneven(run.steps for run in runs)
    if uneven and budget is not None and all(map(_is_whole, runs)):
        yield Caution(f'Different lengths ({said}) under one budget of {budget:,} environment steps, which the last '
                      f'collection goes beyond: {_effect(OF_A_WHOLE_RUN)}; a longer budget makes them alike',
                      OF_A_WHOLE_RUN)
    elif uneven:
        yield Caution(f'Different lengths in environment steps ({said}): {_effect(OF_ONE_LENGTH)}', OF_ONE_LENGTH)
    elif medians and min(medians.values()) < SAID_TOLERANCE * max(medians.values()):
        said = '; '.join(f'{name}: {steps:,.0f}' for name, steps in medians.items())
        yield Caution(f'Training times are of different numbers of environment steps (medians, {said}), which makes '
                      'some of their difference; environment steps per second are without it')


def _is_whole(run: TrainedRun) -> bool:
    return run.before is None and run.outcome == DONE
