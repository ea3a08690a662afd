"""
The numbers of a comparison, by run and by side; their tables, the same on the terminal and in the page; and how the
terminal shows them.
"""
import datetime
import operator
import shlex
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from rich.console import Console
from rich.text import Text
from scipy.stats import trim_mean

from ..text import drawn, time_text
from . import judging
from .judging import CALL_TIME, COUNT, HITS, HOST_MEMORY, MEMORY, REWARDS, SPEED, TIME, Side
from .reading import CACHE, MEMORY_OF_DEVICE, MEMORY_OF_HOST, REWARD, TrainedRun, finite

NONE, SAME = '-', 'the same'
LAST = operator.itemgetter(-1)
# The words for a side whose number is greater than the baseline's, and for one whose number is less. What is only
# counted, as environment steps, is neither better nor worse for it.
WORDS = {
    TIME: ('slower', 'faster'), CALL_TIME: ('slower', 'faster'), SPEED: ('faster', 'slower'),
    HOST_MEMORY: ('more', 'less'), MEMORY: ('more', 'less'), HITS: ('higher', 'lower'), REWARDS: ('higher', 'lower'),
}
# If each side has so many runs, it is shown by interquartile mean and bootstrap interval, not by median and range.
MANY_RUNS = 10
MEDIAN, INTERQUARTILE_MEAN = 'median', 'interquartile mean'
SPREADS = {MEDIAN: 'median [least, greatest]', INTERQUARTILE_MEAN: 'interquartile mean [95% interval]'}
RESAMPLES, CONFIDENCE = 50_000, 95.
# Characters that a table needs for the titles of measures, for most values, and for the rules between columns.
TITLE_WIDTH, VALUE_WIDTH, RULE_WIDTH = 28, 8, 3
# The page shows all of them.
SHOWN_DIFFERENCES = 15
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


class Comparison:
    """
    All numbers and warnings of a comparison; ``groups`` are (name, pattern) of sides, as of ``compare_runs``, and
    ``left_out`` has the reason for each run that could not be read. For each side, ``mixed`` has the measures in which
    its own runs cannot be compared, and ``apart`` those in which it cannot be compared with the baseline.
    """

    def __init__(self, runs: Sequence[TrainedRun], groups: Sequence[Tuple[str, str]], left_out: Dict[str, str]) -> None:
        self.left_out = left_out
        self.sides = judging.sort_into_sides(runs, groups)
        self.baseline, *self.others = self.sides
        self.runs = judging.runs_of(self.sides)
        self.mixed = {side.name: judging.blocked([side]) for side in self.sides}
        self.apart = {side.name: judging.blocked([self.baseline, side]) for side in self.others}
        self.differences = judging.config_differences(self.sides)
        self.warnings = judging.warnings_of(self.sides, self.differences)
        many = all(len(side.runs) >= MANY_RUNS for side in self.sides)
        self.statistic = INTERQUARTILE_MEAN if many else MEDIAN
        self.rows = [self._row(measure) for measure in MEASURES]

    def _row(self, measure: Measure) -> Row:
        sources: Dict[str, Dict[str, Number]] = {}
        if measure.summary:
            sources['summary'] = {run.name: finite(run.from_summary(*measure.summary)) for run in self.runs}
        sources['events'] = {run.name: measure.events(run) for run in self.runs}
        source = max(sources, key=lambda name: sum(value is not None for value in sources[name].values()))
        values = sources[source]
        spreads = {side.name: None if measure.about in self.mixed[side.name]  # no repeats of each other are no spread
                   else _spread([values[run.name] for run in side.runs], self.statistic) for side in self.sides}
        centres = {name: spread and spread.centre for name, spread in spreads.items()}
        ratios = {name: None if measure.about in about else _ratio(centres[self.baseline.name], centres[name])
                  for name, about in self.apart.items()}
        return Row(measure, source, values, spreads, ratios)

    @property
    def lines_left_out(self) -> List[str]:
        return [f'{name} is left out: {why}' for name, why in self.left_out.items()]

    def as_json(self) -> Dict[str, Any]:
        """For other programs; there is neither nan nor infinity in it."""
        return dict(
            baseline=self.baseline.name,
            sides=[dict(name=side.name, runs=[
                dict(name=run.name, folder=run.folder, cache=run.cache, seed=run.seed, points=run.points,
                     event_files=run.event_files) for run in side.runs
            ]) for side in self.sides],
            measures=[
                dict(
                    name=row.measure.name, title=row.measure.title, source=row.source, runs=row.values,
                    sides={name: None if spread is None else spread._asdict() for name, spread in row.spreads.items()},
                    ratios=row.ratios,
                ) for row in self.rows
            ],
            config_differences=[dict(key=key, values=values) for key, values in self.differences.items()],
            warnings=[warning.text for warning in self.warnings],
            left_out=self.left_out,
        )


def _spread(values: Sequence[Number], statistic: str) -> Optional[Spread]:
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    return Spread(len(known), statistic, *map(float, summed_up(np.array(known), statistic, RESAMPLES)))


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


# ---- measures --------------------------------------------------------------------------------------------------------

def _device_memory(run: TrainedRun) -> Number:
    gigabytes = run.reduced(MEMORY_OF_DEVICE, np.nanmax)
    return gigabytes * 1024 if gigabytes else None


def _speed(run: TrainedRun) -> Number:
    """Over what its own event files hold; a run that went on from a checkpoint has steps of another before them."""
    return None if run.env_step is None else _ratio(run.env_step - (run.before or run.first_step or 0), run.seconds)


def _hit_rate(pool: str, what: str) -> Measure:
    hits, queries = f'{CACHE}{pool}_hits', f'{CACHE}{pool}_queries'
    return Measure(f'{pool}_hit_rate', f'hit rate, {what}', 'share', HITS,
                   lambda run: _ratio(run.reduced(hits, LAST), run.reduced(queries, LAST)), ('hit_rates', pool))


MEASURES = (
    Measure('seconds', 'training time', 'time', TIME, lambda run: run.seconds, ('seconds', )),
    Measure('env_step', 'environment steps', 'count', COUNT, lambda run: run.env_step, ('env_step', )),
    Measure('env_steps_per_second', 'environment steps per second', 'number', SPEED, _speed,
            ('env_steps_per_second', )),
    Measure('search_ms', 'search, ms', 'number', CALL_TIME, lambda run: run.reduced(CACHE + 'search_ms', np.nanmean)),
    Measure('step_ms', 'recurrent step, ms', 'number', CALL_TIME,
            lambda run: run.reduced(CACHE + 'step_ms', np.nanmean)),
    Measure('host_memory_mb', 'peak host memory, MiB', 'number', HOST_MEMORY,
            lambda run: run.reduced(MEMORY_OF_HOST, np.nanmax), ('host_memory_mb', )),
    Measure('device_memory_mb', 'peak device memory, MiB', 'number', MEMORY, _device_memory, ('device_memory_mb', )),
    Measure('cache_memory_mb', 'peak cache memory, MiB', 'number', MEMORY,
            lambda run: run.reduced(CACHE + 'memory_mb', np.nanmax)),
    _hit_rate('init', 'roots'), _hit_rate('recur', 'nodes'), _hit_rate('total', 'all'),
    Measure('evictions', 'evictions', 'count', COUNT, lambda run: run.reduced(CACHE + 'total_evictions', LAST),
            ('counters', 'total', 'evictions')),
    Measure('last_reward', 'last reward', 'number', REWARDS, lambda run: run.reduced(REWARD, LAST), ('last_reward', )),
    Measure('best_reward', 'best reward', 'number', REWARDS, lambda run: run.reduced(REWARD, np.nanmax),
            ('best_reward', )),
)


# ---- tables ----------------------------------------------------------------------------------------------------------

class Table(NamedTuple):
    """Rows have as many cells as there are headings; the first cell of a row is its heading."""
    caption: str
    headings: List[str]
    rows: List[List[str]]


def measures_table(comparison: Comparison, others: Optional[Sequence[Side]] = None) -> Table:
    """The measures by side; after each side that is not the baseline, a column says which is better and by how much."""
    baseline, others = comparison.baseline, comparison.others if others is None else others
    table = Table(f"Comparison: {' / '.join(side.name for side in [baseline, *others])}",
                  [SPREADS[comparison.statistic], side_text(baseline)],
                  [[row.measure.title, _spread_text(row, baseline)] for row in comparison.rows])
    for side in others:
        table.headings.extend((side_text(side), f'{side.name} against {baseline.name}'))
        for row, cells in zip(comparison.rows, table.rows):
            comparable = row.measure.about not in comparison.apart[side.name]
            cells.extend((_spread_text(row, side), _verdict(row, baseline, side) if comparable else NONE))
    return table


def runs_table(comparison: Comparison, runs: Optional[Sequence[TrainedRun]] = None) -> Table:
    """The measures by run, of all runs or of some."""
    runs = comparison.runs if runs is None else runs
    sides = {run.name: side.name for side in comparison.sides for run in side.runs}
    rows = [['side', *(sides[run.name] for run in runs)],
            ['seed', *(NONE if run.seed is None else str(run.seed) for run in runs)]]
    rows += [[row.measure.title, *(_value_text(row.values[run.name], row.measure.kind) for run in runs)]
             for row in comparison.rows]
    return Table('Each run', ['run', *(run.name for run in runs)], rows)


def config_table(comparison: Comparison) -> Table:
    """The config keys that sides have different values for; without rows if the configs are the same."""
    names = [side.name for side in comparison.sides]
    rows = [[key, *(values.get(name, NONE) for name in names)] for key, values in comparison.differences.items()]
    return Table('What the configs differ in', ['key', *names], rows)


def origin(comparison: Comparison) -> List[str]:
    """When, where and with which versions and commands the runs were trained, as far as their summaries say it."""
    runs = comparison.runs
    lines = ['Trained {} to {} UTC'.format(*(
        datetime.datetime.fromtimestamp(moment, datetime.timezone.utc).strftime('%Y-%m-%d %H:%M')
        for moment in (min(run.spans[0][0] for run in runs), max(run.spans[-1][1] for run in runs))))]
    for title in ('machine', 'versions'):
        said = [run.from_summary(title) for run in runs]
        texts = [', '.join(f'{key} {value}' for key, value in known.items() if value is not None)
                 for known in said if isinstance(known, dict)]
        lines += [f'{title.capitalize()}: {text}' for text in dict.fromkeys(texts)]
    for run in runs:
        commands = [part['command'] for part in run.parts if part.get('command')]
        for number, command in enumerate(commands, 1):
            name = f'{run.name}, part {number}' if len(commands) > 1 else run.name
            lines.append(f'{name}: {shlex.join(map(str, command)) if isinstance(command, list) else command}')
    return lines


# ---- text ------------------------------------------------------------------------------------------------------------

def _value_text(value: Optional[float], kind: str, beside: Optional[float] = None) -> str:
    """As '1:02:03', '1,234', '12.3' or '57.3%'; with as many digits after the point as ``beside`` has."""
    if value is None:
        return NONE
    if kind == 'time':
        return time_text(value)
    if kind == 'share':
        return f'{value:.1%}'
    size = abs(value if beside is None else beside)
    return '{:,.{}f}'.format(value, 0 if kind == 'count' or size >= 1000 else 2 if size < 10 else 1)


def _spread_text(row: Row, side: Side) -> str:
    """As '12.3 [11.9, 12.8]'; the centre alone where there is nothing around it."""
    spread = row.spreads[side.name]
    if spread is None:
        return NONE
    centre, low, high = (_value_text(value, row.measure.kind, spread.centre)
                         for value in (spread.centre, spread.low, spread.high))
    return centre if low == high else f'{centre} [{low}, {high}]'


def _verdict(row: Row, baseline: Side, side: Side) -> str:
    """As '1.62 x faster' or, where a ratio says little, '33.9 points higher'; a dash where nothing can be said."""
    base, own = row.spreads[baseline.name], row.spreads[side.name]
    if base is None or own is None or row.measure.about not in WORDS:
        return NONE
    greater, less = WORDS[row.measure.about]
    if row.measure.about in (HITS, REWARDS):
        # Of the numbers as they are shown, from which a reader will work it out.
        shown = [float(_value_text(spread.centre, row.measure.kind).strip('%').replace(',', ''))
                 for spread in (base, own)]
        difference = shown[1] - shown[0]
        text = f'{abs(difference):.1f} points'
        if row.measure.about == REWARDS:
            text = _value_text(abs(difference), row.measure.kind, max(shown, key=abs))
        return f'{text} {greater if difference > 0 else less}' if any(map('123456789'.count, text)) else SAME
    ratio = row.ratios[side.name]
    if not ratio:
        return NONE
    times = f'{max(ratio, 1 / ratio):,.2f}'
    return SAME if times == '1.00' else f'{times} x {less if ratio > 1 else greater}'


def side_text(side: Side) -> str:
    return f'{side.name}, {runs_text(len(side.runs))}'


def runs_text(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"


# ---- terminal --------------------------------------------------------------------------------------------------------

def show(comparison: Comparison, console: Console) -> None:
    blocking = [warning.text for warning in comparison.warnings if warning.blocks]
    for text in [*comparison.lines_left_out, *blocking]:
        line(console, f'WARNING: {text}')
    for others in [[side] for side in comparison.others] or [[]]:
        console.print(drawn(*measures_table(comparison, others), numbers=True))
    several = len(comparison.sides) < len(comparison.runs) and comparison.statistic == MEDIAN
    if several or any(comparison.mixed.values()):
        column = max(VALUE_WIDTH, *(len(run.name) for run in comparison.runs)) + RULE_WIDTH
        at_once = max(1, (console.width - TITLE_WIDTH - 2 * RULE_WIDTH) // column)
        for first in range(0, len(comparison.runs), at_once):
            beside = comparison.runs[first:first + at_once]
            console.print(drawn(*runs_table(comparison, beside), numbers=True))
    differences = config_table(comparison)
    if differences.rows:
        console.print(drawn(*differences._replace(rows=differences.rows[:SHOWN_DIFFERENCES])))
    if len(differences.rows) > SHOWN_DIFFERENCES:
        line(console, f'... and {len(differences.rows) - SHOWN_DIFFERENCES} more; report.html has all of them')
    for warning in comparison.warnings:
        if not warning.blocks:
            line(console, f'WARNING: {warning.text}')
    for text in origin(comparison):
        line(console, text)


def line(console: Console, text: str) -> None:
    """Print one line as it is."""
    console.print(Text(text), soft_wrap=True)
