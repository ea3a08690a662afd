"""The numbers of runs, by run and by side, and what sides differ in."""
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np
from scipy.stats import trim_mean

from ..config import FLAG, OPTIONS, PREFIX
from ..run_files import LOADED
from .comparable import (
    CALL_TIME,
    COUNT,
    HITS,
    HOST_MEMORY,
    MEMORY,
    REWARDS,
    SPEED,
    TIME,
    Caution,
    blocked,
    cautions,
    distinct,
    notes,
)
from .event_files import CACHE, MEMORY_OF_DEVICE, MEMORY_OF_HOST, REWARD
from .grouping import OF_ONE_RUN, Side, sort_into_sides
from .reading import TrainedRun, finite

ABSENT = '(absent)'
# What the plugin adds to a policy's config, whichever system it has.
OWN_HOOKS = 'policy.learn.learner.hook.kv_cache_'
# What the cache systems differ in. Of other keys so many are named above the table.
CACHE_OPTIONS = (f'{PREFIX}.{FLAG}', f'{PREFIX}.{OPTIONS}')
SAID_KEYS = 3
# What other lines tell of.
TOLD_OF = ('env.env_id', 'env.env_name', 'env.type', 'policy.cuda', 'policy.device', PREFIX + '.device', LOADED)
# What hit rates are of, by pool.
LOOKED_UP = {'init': 'roots', 'recur': 'nodes', 'total': 'all'}
# What no measure is about.
CONFIGS = 'configs'
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


class Comparison(NamedTuple):
    """
    Everything that is shown. ``left_out`` has the reason for each run that could not be read. ``differences`` has, for
    each config key in which sides differ, a text for each side: its value, or all of them joined by '; '. Of the
    ``warnings``, those of what is not comparable come first. ``mixed`` has, for each side, what its runs are not
    comparable in.
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
    mixed = {side.name: blocked([side]) for side in sides}
    against = {side.name: blocked([sides[0], side]) for side in sides[1:]}
    rows = [_row(measure, sides, mixed, against, statistic) for measure in MEASURES]
    differences = _config_differences(sides)
    remarks = sorted([*notes(runs), *cautions(sides), *_other_trainings(differences)],
                     key=lambda caution: not caution.blocks)
    return Comparison(sides, rows, differences, remarks, left_out, statistic, mixed)


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


# ---- measures --------------------------------------------------------------------------------------------------------

def _device_memory(run: TrainedRun) -> Number:
    gigabytes = run.highest(MEMORY_OF_DEVICE)
    return gigabytes * 1024 if gigabytes else None


def _speed(run: TrainedRun) -> Number:
    """Over what its own event files hold; a run that went on from a checkpoint has steps of another before them."""
    return None if run.env_step is None else _ratio(run.env_step - (run.before or run.first_step or 0), run.seconds)


def _hit_rate(pool: str) -> Measure:
    def counted(run: TrainedRun) -> Number:
        return _ratio(run.last(f'{CACHE}{pool}_hits'), run.last(f'{CACHE}{pool}_queries'))

    return Measure(f'{pool}_hit_rate', f'hit rate, {LOOKED_UP[pool]}', 'share', HITS, counted, ('hit_rates', pool))


MEASURES = (
    Measure('seconds', 'training time', 'time', TIME, lambda run: run.seconds, ('seconds',)),
    Measure('env_step', 'environment steps', 'count', COUNT, lambda run: run.env_step, ('env_step',)),
    Measure('env_steps_per_second', 'environment steps per second', 'number', SPEED, _speed,
            ('env_steps_per_second',)),
    Measure('search_ms', 'search, ms', 'number', CALL_TIME, lambda run: run.mean(CACHE + 'search_ms')),
    Measure('step_ms', 'recurrent step, ms', 'number', CALL_TIME, lambda run: run.mean(CACHE + 'step_ms')),
    Measure('host_memory_mb', 'peak host memory, MiB', 'number', HOST_MEMORY, lambda run: run.highest(MEMORY_OF_HOST),
            ('host_memory_mb',)),
    Measure('device_memory_mb', 'peak device memory, MiB', 'number', MEMORY, _device_memory, ('device_memory_mb',)),
    Measure('cache_memory_mb', 'peak cache memory, MiB', 'number', MEMORY,
            lambda run: run.highest(CACHE + 'memory_mb')),
    *map(_hit_rate, LOOKED_UP),
    Measure('evictions', 'evictions', 'count', COUNT, lambda run: run.last(CACHE + 'total_evictions'),
            ('counters', 'total', 'evictions')),
    Measure('last_reward', 'last reward', 'number', REWARDS, lambda run: run.last(REWARD), ('last_reward',)),
    Measure('best_reward', 'best reward', 'number', REWARDS, lambda run: run.highest(REWARD), ('best_reward',)),
)


def _row(measure: Measure, sides: Sequence[Side], mixed: Dict[str, Set[str]], against: Dict[str, Set[str]],
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
    not_comparable = {name for name, about in against.items() if measure.about in about}
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


# ---- configs ---------------------------------------------------------------------------------------------------------

def _other_trainings(differences: Dict[str, Dict[str, str]]) -> List[Caution]:
    """A line where configs differ in more than the cache's options, so that more than the cache is compared."""
    keys = [key for key in differences if not key.startswith((*CACHE_OPTIONS, *TOLD_OF))]
    if not keys:
        return []
    more = f' and {len(keys) - SAID_KEYS} more' if len(keys) > SAID_KEYS else ''
    return [Caution(f'The configs differ in more than the cache, in {", ".join(keys[:SAID_KEYS])}{more}: what differs '
                    'may come from these', blocks=(CONFIGS, ))]


def _config_differences(sides: Sequence[Side]) -> Dict[str, Dict[str, str]]:
    """The keys that two sides do not have the same value for, but for the plugin's own hooks; sides without a saved
    config are left out."""
    known = {side.name: [run.config for run in side.runs if run.config] for side in sides}
    known = {name: configs for name, configs in known.items() if configs}
    keys = {key for configs in known.values() for config in configs for key in config
            if key not in OF_ONE_RUN and not key.startswith(OWN_HOOKS)}
    differences = {}
    for key in sorted(keys):
        values = {name: '; '.join(distinct(repr(config[key]) if key in config else ABSENT for config in configs))
                  for name, configs in known.items()}
        if len(set(values.values())) > 1:
            differences[key] = values
    return differences
