"""Runs sorted into sides, the first of which is the baseline; their numbers; and what makes them not comparable."""
import fnmatch
import itertools
import os
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np
from scipy.stats import trim_mean

from ..config import ConfigError
from .reading import CACHE, DEVICE_MEMORY, HOST_MEMORY, OLD, POOLS, REWARD, WORLD_MODEL, TrainedRun, finite

# What seeds of one side may differ in.
OF_ONE_RUN = ('exp_name', 'seed')
ABSENT = '(absent)'
# Collection ends with a whole phase, so that runs of one budget end some steps apart.
BUDGET_TOLERANCE = 0.75
# What a measure is about: a difference between runs may make times incomparable, for example, and not rewards.
TIME, SPEED, MEMORY, HITS, COUNT, REWARDS = 'time', 'speed', 'memory', 'hits', 'count', 'reward'
# The words for a side whose number is greater than the baseline's, and for one whose number is less.
WORDS = {TIME: ('slower', 'faster'), SPEED: ('faster', 'slower'), MEMORY: ('more', 'less'), COUNT: ('more', 'less'),
         HITS: ('higher', 'lower'), REWARDS: ('higher', 'lower')}
TIMES_AND_REWARDS, TIMES_AND_MEMORY = (TIME, SPEED, COUNT, REWARDS), (TIME, SPEED, MEMORY)
# If each side has so many runs, it is shown by interquartile mean and bootstrap interval, not by median and range.
MANY_RUNS = 10
MEDIAN, INTERQUARTILE_MEAN = 'median', 'interquartile mean'
RESAMPLES, CONFIDENCE = 50_000, 95.
Number = Optional[float]


class Measure(NamedTuple):
    """
    A row of the comparison; ``kind`` is how values are written ('time', 'count', 'number' or 'share'). Values come from
    event files, or from summaries under the keys ``summary``: all from the source that more runs have, since the two
    may define a measure a little differently.
    """
    name: str
    title: str
    kind: str
    about: str
    events: Callable[[TrainedRun], Number]
    summary: Tuple[str, ...] = ()


class Side(NamedTuple):
    """Runs that are repeats of each other."""
    name: str
    runs: List[TrainedRun]


class Spread(NamedTuple):
    """
    A measure over those runs of a side that have it. The centre is the median, between the least and the greatest, or
    the interquartile mean with its interval.
    """
    runs: int
    statistic: str
    centre: float
    low: float
    high: float


class Row(NamedTuple):
    """
    A measure: values by run, spreads and ratios (the baseline's centre / the side's) by side. Sides whose runs are not
    comparable with each other have no spread, and those that are not comparable with the baseline have no ratio.
    """
    measure: Measure
    source: str
    values: Dict[str, Number]
    spreads: Dict[str, Optional[Spread]]
    ratios: Dict[str, Number]
    not_comparable: Set[str]


class Caution(NamedTuple):
    """A warning; measures about what ``blocks`` names are not comparable because of it."""
    text: str
    blocks: Tuple[str, ...] = ()


class Comparison(NamedTuple):
    """
    Everything that is shown. ``left_out`` has the reason for each run that could not be read. ``differences`` has, for
    each config key in which sides differ, a text for each side: its value, or all of them joined by '; '. ``mixed``
    has, for each side, what its runs are not comparable in.
    """
    sides: List[Side]
    rows: List[Row]
    differences: Dict[str, Dict[str, str]]
    warnings: List[Caution]
    left_out: Dict[str, str]
    statistic: str
    mixed: Dict[str, Set[str]]

    @property
    def title(self) -> str:
        return ' / '.join(side.name for side in self.sides)

    @property
    def runs(self) -> List[TrainedRun]:
        return [run for side in self.sides for run in side.runs]


def judge(runs: Sequence[TrainedRun], groups: Sequence[Tuple[str, str]], left_out: Dict[str, str]) -> Comparison:
    """Compare runs; ``groups`` are (name, pattern) of sides, as of ``compare_runs``."""
    sides = sort_into_sides(runs, groups)
    statistic = INTERQUARTILE_MEAN if all(len(side.runs) >= MANY_RUNS for side in sides) else MEDIAN
    mixed = {side.name: _blocked([side]) for side in sides}
    blocked = {side.name: _blocked([sides[0], side]) for side in sides[1:]}
    rows = [_row(measure, sides, mixed, blocked, statistic) for measure in MEASURES]
    remarks = [*_notes(runs), *_warnings(sides)]
    return Comparison(sides, rows, _config_differences(sides), remarks, left_out, statistic, mixed)


def as_json(comparison: Comparison) -> Dict[str, Any]:
    """The comparison for other programs; there is neither nan nor infinity in it."""
    return dict(
        baseline=comparison.sides[0].name,
        sides=[dict(name=side.name, runs=list(map(_run, side.runs))) for side in comparison.sides],
        measures=[
            dict(
                name=row.measure.name, title=row.measure.title, source=row.source, runs=row.values,
                sides={name: None if spread is None else spread._asdict() for name, spread in row.spreads.items()},
                ratios=row.ratios,
            ) for row in comparison.rows
        ],
        config_differences=[dict(key=key, values=values) for key, values in comparison.differences.items()],
        warnings=[warning.text for warning in comparison.warnings],
        left_out=comparison.left_out,
    )


def _run(run: TrainedRun) -> Dict[str, Any]:
    return dict(name=run.name, folder=run.folder, cache=run.cache, seed=run.seed, points=run.points,
                event_files=run.event_files)


# ---- sides -----------------------------------------------------------------------------------------------------------

def check_groups(runs: Sequence[TrainedRun], groups: Sequence[Tuple[str, str]]) -> None:
    """Refuse a pattern that matches no run."""
    for name, pattern in groups:
        if not any(_matches(run, pattern) for run in runs):
            there = ', '.join(run.name for run in runs)
            raise ConfigError(f'--group {name}={pattern}: it matches none of the runs ({there})')


def sort_into_sides(runs: Sequence[TrainedRun], groups: Sequence[Tuple[str, str]]) -> List[Side]:
    """The sides of ``groups`` in their order (the first match counts), then those of the old system, then others."""
    named: Dict[str, List[TrainedRun]] = {name: [] for name, _ in groups}
    others: Dict[Any, List[TrainedRun]] = {}
    for run in runs:
        matching = [name for name, pattern in groups if _matches(run, pattern)]
        if matching:
            named[matching[0]].append(run)
        else:
            others.setdefault(_likeness(run), []).append(run)
    automatic = sorted(others.values(), key=lambda members: members[0].cache != OLD)
    names = _side_names(automatic, taken=list(named))
    return [Side(name, members) for name, members in [*named.items(), *zip(names, automatic)] if members]


def _matches(run: TrainedRun, pattern: str) -> bool:
    names = (run.name, os.path.basename(run.folder), run.folder)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _likeness(run: TrainedRun) -> Any:
    """What runs of one side have in common: the config, or the system and name where none was saved."""
    if not run.config:
        return run.cache, run.name_without_seed
    return tuple(sorted((key, repr(value)) for key, value in run.config.items() if key not in OF_ONE_RUN))


def _side_names(sides: Sequence[List[TrainedRun]], taken: List[str]) -> List[str]:
    """The cache system where one side has it, or else the name without the seed, or else that with a number."""
    systems = [side[0].cache for side in sides]
    names: List[str] = []
    for side, system in zip(sides, systems):
        name = system if system and systems.count(system) == 1 else side[0].name_without_seed
        numbered = (f'{name} ({number})' for number in itertools.count(2))
        names.append(next(unique for unique in itertools.chain([name], numbered) if unique not in names + taken))
    return names


# ---- measures --------------------------------------------------------------------------------------------------------

def _device_memory(run: TrainedRun) -> Number:
    gigabytes = run.highest(DEVICE_MEMORY)
    return gigabytes * 1024 if gigabytes else None


def _hit_rate(pool: str) -> Measure:
    def counted(run: TrainedRun) -> Number:
        return _ratio(run.last(f'{CACHE}{pool}_hits'), run.last(f'{CACHE}{pool}_queries'))

    return Measure(f'{pool}_hit_rate', f'hit rate, {POOLS[pool]}', 'share', HITS, counted, ('hit_rates', pool))


MEASURES = (
    Measure('seconds', 'training time', 'time', TIME, lambda run: run.seconds, ('seconds',)),
    Measure('env_step', 'environment steps', 'count', COUNT, lambda run: run.env_step, ('env_step',)),
    Measure('env_steps_per_second', 'environment steps per second', 'number', SPEED,
            lambda run: _ratio(run.env_step, run.seconds), ('env_steps_per_second',)),
    Measure('search_ms', 'search, ms', 'number', TIME, lambda run: run.mean(CACHE + 'search_ms')),
    Measure('step_ms', 'recurrent step, ms', 'number', TIME, lambda run: run.mean(CACHE + 'step_ms')),
    Measure('host_memory_mb', 'peak host memory, MiB', 'number', MEMORY, lambda run: run.highest(HOST_MEMORY),
            ('host_memory_mb',)),
    Measure('device_memory_mb', 'peak device memory, MiB', 'number', MEMORY, _device_memory, ('device_memory_mb',)),
    Measure('cache_memory_mb', 'peak cache memory, MiB', 'number', MEMORY,
            lambda run: run.highest(CACHE + 'memory_mb')),
    *map(_hit_rate, POOLS),
    Measure('evictions', 'evictions', 'count', COUNT, lambda run: run.last(CACHE + 'total_evictions'),
            ('counters', 'total', 'evictions')),
    Measure('last_reward', 'last reward', 'number', REWARDS, lambda run: run.last(REWARD), ('last_reward',)),
    Measure('best_reward', 'best reward', 'number', REWARDS, lambda run: run.highest(REWARD), ('best_reward',)),
)


def _row(measure: Measure, sides: Sequence[Side], mixed: Dict[str, Set[str]], blocked: Dict[str, Set[str]],
         statistic: str) -> Row:
    runs = [run for side in sides for run in side.runs]
    sources: Dict[str, Dict[str, Number]] = {}
    if measure.summary:
        sources['summary'] = {run.name: finite(run.from_summary(*measure.summary)) for run in runs}
    sources['events'] = {run.name: measure.events(run) for run in runs}
    source = max(sources, key=lambda name: sum(value is not None for value in sources[name].values()))
    values = sources[source]
    spreads = {side.name: None if measure.about in mixed[side.name]  # no repeats of each other are no spread
               else _spread([values[run.name] for run in side.runs], statistic) for side in sides}
    (_, baseline), *others = ((name, spread and spread.centre) for name, spread in spreads.items())
    not_comparable = {name for name, about in blocked.items() if measure.about in about}
    ratios = {name: None if name in not_comparable else _ratio(baseline, centre) for name, centre in others}
    return Row(measure, source, values, spreads, ratios, not_comparable)


def _spread(values: Sequence[Number], statistic: str) -> Optional[Spread]:
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    centre, low, high = (float(number) for number in summed_up(np.array(known), statistic, RESAMPLES))
    return Spread(len(known), statistic, centre, low, high)


def summed_up(values: np.ndarray, statistic: str, resamples: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Over the first dimension, the runs: median, least and greatest; or, as rliable defines them, the interquartile mean
    and its percentile interval over resamples of the runs, drawn with replacement and the same ones each time.
    """
    if statistic == MEDIAN:
        return np.median(values, axis=0), values.min(axis=0), values.max(axis=0)
    drawn = np.random.default_rng(0).integers(len(values), size=(len(values), resamples))
    tail = (100. - CONFIDENCE) / 2
    low, high = np.percentile(trim_mean(values[drawn], 0.25, axis=0), [tail, 100. - tail], axis=0)
    return trim_mean(values, 0.25, axis=0), low, high


def _ratio(one: Number, other: Number) -> Number:
    """None where it would say nothing: a number is missing or negative, or the other is zero."""
    return one / other if one is not None and one >= 0 and other is not None and other > 0 else None


# ---- what is comparable ----------------------------------------------------------------------------------------------

def _config_differences(sides: Sequence[Side]) -> Dict[str, Dict[str, str]]:
    """The keys that two sides do not have the same value for; sides without a saved config are left out."""
    known = {side.name: [run.config for run in side.runs if run.config] for side in sides}
    known = {name: configs for name, configs in known.items() if configs}
    keys = {key for configs in known.values() for config in configs for key in config} - set(OF_ONE_RUN)
    differences = {}
    for key in sorted(keys):
        values = {name: '; '.join(_distinct(repr(config[key]) if key in config else ABSENT for config in configs))
                  for name, configs in known.items()}
        if len(set(values.values())) > 1:
            differences[key] = values
    return differences


def _notes(runs: Sequence[TrainedRun]) -> List[Caution]:
    resumed = [f'{run.name} went on with an empty replay buffer at {step:,} environment steps, which bends its curves'
               for run in runs for step in run.summary.get('resumed_at') or []]
    noted = [f'{run.name}: {note}' for run in runs for note in run.notes]
    return list(map(Caution, [*resumed, *_other_overrides(runs), *noted]))


def _other_overrides(runs: Sequence[TrainedRun]) -> Iterator[str]:
    """A line for each run that went on in place with other overrides, with those that not all parts have."""
    for run in runs:
        held = [part.get('overrides') or [] for part in run.parts]
        common = set.intersection(*map(set, held))
        parts = [' '.join(override for override in each if override not in common) or 'none' for each in held]
        if len(set(parts)) > 1:
            said = '; '.join(f'part {number}: {overrides}' for number, overrides in enumerate(parts, 1))
            yield f'{run.name} went on with other overrides ({said}), and its config is that of its last part'


def _environment(run: TrainedRun) -> Any:
    keys = ('env.env_id', 'env.env_name', 'env.type')
    return next((run.config[key] for key in keys if run.config.get(key) is not None), None)


def _device(run: TrainedRun) -> Any:
    return run.from_summary('device') or run.config.get(WORLD_MODEL + 'device')


def _of_machine(key: str) -> Callable[[TrainedRun], Any]:
    """What a run says of its machine; one without a GPU says so."""
    def value_of(run: TrainedRun) -> Any:
        machine = run.from_summary('machine')
        return (machine[key] or 'none') if isinstance(machine, dict) and key in machine else None

    return value_of


# What runs must have one value of to be comparable.
ENVIRONMENT = {'environments': _environment}
BUDGETS = {
    'budgets of environment steps': lambda run: run.from_summary('max_env_step'),
    'budgets of training iterations': lambda run: run.from_summary('max_train_iter'),
}
MACHINE = {
    'devices': _device, 'numbers of processes': lambda run: run.from_summary('processes'),
    'systems': _of_machine('system'), 'processors': _of_machine('processor'), 'CPUs': _of_machine('cpu'),
    'numbers of CPUs': _of_machine('cpus'), 'numbers of threads': _of_machine('threads'), 'GPUs': _of_machine('gpu'),
    'versions of Python': _of_machine('python'), 'versions of torch': _of_machine('torch'),
    'versions of DI-engine': _of_machine('ding'),
}
HOST = {'hosts': lambda run: run.host}


def _warnings(sides: Sequence[Side]) -> Iterator[Caution]:
    runs = [run for side in sides for run in side.runs]
    if len(sides) == 1:
        yield Caution(f"All runs are of one side, '{sides[0].name}': there is nothing to compare it to (--group makes "
                      'sides)')
    yield from _disagreements(sides, ENVIRONMENT, 'nothing here is comparable', tuple(WORDS))
    yield from _seeds(sides)
    for run in runs:
        if run.summary.get('outcome', 'done') != 'done':
            yield Caution(f"{run.name} ended early: {run.summary['outcome']}")
    budgets = list(_disagreements(sides, BUDGETS, 'times and rewards are not comparable', TIMES_AND_REWARDS))
    yield from budgets or _other_steps(runs)
    machines = list(_disagreements(sides, MACHINE, 'times and memory are not comparable', TIMES_AND_MEMORY))
    yield from machines or _disagreements(sides, HOST, 'times are comparable if these are of one kind')
    yield from itertools.islice(_at_once(runs), 1)


def _blocked(sides: Sequence[Side]) -> Set[str]:
    """What the runs of these sides are not comparable in."""
    return {about for warning in _warnings(sides) for about in warning.blocks}


def _seeds(sides: Sequence[Side]) -> Iterator[Caution]:
    seeds = {side.name: sorted(run.seed for run in side.runs if run.seed is not None) for side in sides}
    if any(found != seeds[sides[0].name] for found in seeds.values()):
        yield Caution(f'Other seeds: {_by_side(seeds)}')
    single = [f"'{side.name}'" for side in sides if len(side.runs) == 1]
    if single:
        yield Caution(f"One run of {' and of '.join(single)}: without a spread, chance cannot be told from effect")


def _other_steps(runs: Sequence[TrainedRun]) -> Iterator[Caution]:
    steps = {run.name: run.env_step for run in runs if run.env_step is not None}
    least, most = min(steps, key=steps.__getitem__, default=''), max(steps, key=steps.__getitem__, default='')
    if steps and steps[least] < BUDGET_TOLERANCE * steps[most]:
        yield Caution(f'Other lengths: {least} has {steps[least]:,} environment steps, {most} {steps[most]:,}: times '
                      'and rewards are not comparable', TIMES_AND_REWARDS)


def _at_once(runs: Sequence[TrainedRun]) -> Iterator[Caution]:
    """Warn of runs that overlap in time. Runs of unknown hosts are taken to share one."""
    for one, other in itertools.combinations(runs, 2):
        overlap = any(max(span[0], others[0]) < min(span[1], others[1])
                      for span in one.spans for others in other.spans)
        if overlap and one.host == other.host:
            yield Caution(f'Runs went on at the same time on one machine, as {one.name} and {other.name}: '
                          'they took time from each other')


def _disagreements(sides: Sequence[Side], values_of: Mapping[str, Callable[[TrainedRun], Any]], effect: str,
                   blocks: Tuple[str, ...] = ()) -> Iterator[Caution]:
    """A line for each thing that runs are known to have more than one value of."""
    for what, value_of in values_of.items():
        values = {side.name: _distinct(f'{value:,}' if isinstance(value, int) else str(value)
                                       for value in map(value_of, side.runs) if value is not None) for side in sides}
        if len(set(itertools.chain(*values.values()))) > 1:
            yield Caution(f'Other {what} ({_by_side(values)}): {effect}', blocks)


def _by_side(values: Dict[str, List[Any]]) -> str:
    return '; '.join(f"{name}: {', '.join(map(str, found)) or 'unknown'}" for name, found in values.items())


def _distinct(texts: Iterable[str]) -> List[str]:
    return list(dict.fromkeys(texts))
