"""
The comparison as curves in a picture, and as one page with everything in it: pictures and styles, no scripts. A line is
``x`` and ``y`` of one dimension each, ``x`` increasing.
"""
import base64
import io
import textwrap
from html import escape
from pathlib import Path
from string import Template
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.style import context
from matplotlib.ticker import MaxNLocator

from . import table
from .judging import CALL_TIME, HITS, HOST_MEMORY, MEMORY, REWARDS, TIME
from .reading import CACHE_BY_STEP, MEMORY_OF_HOST, REWARD, Curve, TrainedRun
from .table import INTERQUARTILE_MEAN, MEDIAN, Comparison, Table

# Readers who are colour-blind can tell them apart (Okabe and Ito).
COLOURS = ('#D55E00', '#0072B2', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
COLUMNS, PANEL_INCHES, DPI = 3, (4.1, 2.9), 144
STEPS, MINUTES = 'environment steps', 'minutes'
SHOWN_POINTS = 200  # more are averaged: a panel has no pixels for them
BAND_RESAMPLES = 500  # fewer than in a table, since a band needs an interval at each of its points
# No dates, so that the same comparison gives the same file.
UNDATED = {'png': None, 'svg': {'Date': None}, 'pdf': {'CreationDate': None}}
STYLE_OF_FIGURES = {
    **dict.fromkeys(('text.color', 'axes.labelcolor', 'axes.titlecolor', 'xtick.color', 'ytick.color'), '#1F2328'),
    **dict.fromkeys(('axes.edgecolor', 'grid.color'), '#D7DCE1'), 'axes.grid': True, 'grid.linewidth': 0.6,
    'axes.axisbelow': True, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.titlesize': 11,
    'axes.titlelocation': 'left', 'axes.titleweight': 'bold', 'font.size': 9.5, 'text.parse_math': False,
    'xtick.major.size': 0, 'ytick.major.size': 0, 'svg.hashsalt': 'comparison',
}
# Of the small print below the curves: the height of a line, characters to an inch, and as many lines as do not crowd.
FOOTER_INCHES, FOOTER_CHARACTERS, FOOTER_LINES = 0.115, 22, 12
Line = Tuple[np.ndarray, np.ndarray]


class Panel(NamedTuple):
    """A tag, what it is about, its values times ``factor``, against environment steps or minutes."""
    title: str
    tag: str
    about: str
    against: str
    factor: float = 1.
    from_zero: bool = False


PANELS = (
    Panel('Reward of evaluations', REWARD, REWARDS, STEPS),
    Panel('Reward of evaluations', REWARD, REWARDS, MINUTES),
    Panel('Root contexts found, %', CACHE_BY_STEP + 'init_hit_rate', HITS, STEPS, 100., True),
    Panel('Time of a search, ms', CACHE_BY_STEP + 'search_ms', CALL_TIME, STEPS, from_zero=True),
    Panel('Memory of the cache, MiB', CACHE_BY_STEP + 'memory_mb', MEMORY, STEPS, from_zero=True),
    Panel('Memory of the process, MiB', MEMORY_OF_HOST, HOST_MEMORY, MINUTES, from_zero=True),
)


# ---- curves ----------------------------------------------------------------------------------------------------------

def picture_of(comparison: Comparison, form: str = 'png') -> bytes:
    """All panels that a run has points for as a PNG, SVG or PDF."""
    panels, colours = _shown_panels(comparison), _colours(comparison)
    with context(['default', STYLE_OF_FIGURES]):
        columns = max(1, min(COLUMNS, len(panels)))
        lines = max(1, -(-len(panels) // columns))
        width = columns * PANEL_INCHES[0]
        footer = _footer(comparison, width)
        foot = (len(footer) + 1) * FOOTER_INCHES
        height = lines * PANEL_INCHES[1] + 0.7 + foot
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, rect=(0, foot / height, 1, 1 - (0.45 + foot) / height))
        figure = Figure(figsize=(width, height), layout=layout)
        for index, panel in enumerate(panels):
            _draw_panel(figure.add_subplot(lines, columns, index + 1), panel, comparison)
        handles = [Line2D([], [], color=colours[side.name], linewidth=2.4, label=' ' + table.side_text(side))
                   for side in comparison.sides]
        figure.legend(handles=handles, loc='upper left', bbox_to_anchor=(0.005, 1.), ncols=len(handles), frameon=False,
                      fontsize=11)
        figure.text(0.12 / width, 0.5 * FOOTER_INCHES / height, '\n'.join(footer), fontsize=6, color='0.4',
                    verticalalignment='bottom')
        file = io.BytesIO()
        figure.savefig(file, format=form, dpi=DPI, metadata=UNDATED[form])
    return file.getvalue()


def _colours(comparison: Comparison) -> Dict[str, str]:
    """The colours of the sides, in the order of their runs' names, as tensorboard colours runs."""
    ordered = sorted(comparison.sides, key=lambda side: min(run.name for run in side.runs))
    return {side.name: COLOURS[index % len(COLOURS)] for index, side in enumerate(ordered)}


def _footer(comparison: Comparison, inches: float) -> List[str]:
    """Lines of a width in inches: where the runs are from; of many runs the first ones."""
    wrapped = [part for said in table.origin(comparison)
               for part in textwrap.wrap(said, int(inches * FOOTER_CHARACTERS), subsequent_indent='    ')]
    more = len(wrapped) - FOOTER_LINES
    return wrapped if more <= 0 else [*wrapped[:FOOTER_LINES], f'... and {more} lines more, in report.html']


def _shown_panels(comparison: Comparison) -> List[Panel]:
    return [panel for panel in PANELS if _shown_runs(panel, comparison.runs)]


def _shown_runs(panel: Panel, runs: Sequence[TrainedRun]) -> List[TrainedRun]:
    """The runs that have points in a panel; if a run went on from another's checkpoint, its earlier minutes are
    unknown."""
    return [run for run in runs if panel.tag in run.curves and (panel.against == STEPS or run.before is None)]


def _draw_panel(axes: Any, panel: Panel, comparison: Comparison) -> None:
    colours = _colours(comparison)
    for side in comparison.sides:
        colour = colours[side.name]
        lines = [line_of(run.curves[panel.tag], panel) for run in _shown_runs(panel, side.runs)]
        lines = [line for line in lines if len(line[0])]
        about = {panel.about, TIME} if panel.against == MINUTES else {panel.about}
        band = None if about & comparison.mixed[side.name] else band_of(lines, comparison.statistic)
        for x, y in lines:
            alone = band is None
            axes.plot(x, y, color=colour, linewidth=2. if alone else 0.8, alpha=1. if alone else 0.45,
                      marker='o' if len(x) == 1 else None, markersize=4)
        if band is not None:
            places, centre, low, high = band
            axes.plot(places, centre, color=colour, linewidth=2.2)
            axes.fill_between(places, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.set(title=panel.title, xlabel=panel.against)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter('{x:,g}')
    axes.xaxis.set_major_formatter('{x:,g}')
    if panel.from_zero:
        axes.set_ylim(0, 1.08 * axes.dataLim.y1 or None)
    axes.set_xlim(left=min(0, axes.dataLim.x0))


def line_of(curve: Curve, panel: Panel) -> Line:
    """The finite points of a curve as they are drawn: those at one place as their mean."""
    x = curve.steps.astype(float) if panel.against == STEPS else curve.seconds / 60
    y = curve.values * panel.factor
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    places, index = np.unique(x, return_inverse=True)
    if len(places) > SHOWN_POINTS:
        edges = np.linspace(places[0], places[-1], SHOWN_POINTS + 1)
        index = np.clip(np.searchsorted(edges, x, side='right') - 1, 0, SHOWN_POINTS - 1)
    counts = np.bincount(index)
    there = counts > 0
    return np.bincount(index, x)[there] / counts[there], np.bincount(index, y)[there] / counts[there]


def band_of(lines: Sequence[Line], statistic: str) -> Optional[Tuple[np.ndarray, ...]]:
    """Places, centre, low and high where all lines have points; None if nowhere, or of fewer than two lines."""
    if len(lines) < 2:
        return None
    first, last = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    if first >= last:
        return None
    places = np.linspace(first, last, SHOWN_POINTS)
    values = np.stack([np.interp(places, x, y) for x, y in lines])
    return (places, *table.summed_up(values, statistic, BAND_RESAMPLES))


# ---- page ------------------------------------------------------------------------------------------------------------

# Its content security policy makes the browser refuse everything that would have to be fetched.
TEMPLATE = Template(Path(__file__).with_name('page.html').read_text(encoding='utf-8'))
BANDS = {MEDIAN: 'the median of all runs of a side; band: their range',
         INTERQUARTILE_MEAN: 'the interquartile mean of all runs of a side; band: its 95% bootstrap interval'}


def report_of(comparison: Comparison) -> str:
    """The page as HTML."""
    names = [side.name for side in comparison.sides]
    against = f'; {_listed(names[1:])} against {names[0]}' if comparison.others else ' of one side'
    return TEMPLATE.substitute(
        title=escape(f"KV cache: {' / '.join(names)}"), lead=escape(table.runs_text(len(comparison.runs)) + against),
        notes=_notes(comparison), measures=_table(table.measures_table(comparison), 'numbers', 'measures'),
        curves=_figure(comparison), configs=_configs(comparison),
        runs=_table(table.runs_table(comparison), 'numbers', 'runs'),
        origin=''.join(f'<p>{escape(line)}</p>' for line in table.origin(comparison)))


def _notes(comparison: Comparison) -> str:
    lines = [*(warning.text for warning in comparison.warnings), *comparison.lines_left_out]
    items = ''.join(f'<li>{escape(line)}</li>' for line in lines)
    return ('<section class="notes" aria-label="Warnings"><strong>Before you compare</strong>'
            f'<ul>{items}</ul></section>' if lines else '')


def _table(content: Table, kind: str, label: str) -> str:
    tag = '<code>{}</code>' if kind == 'keys' else '{}'
    head = ''.join(f'<th scope="col">{escape(heading)}</th>' for heading in content.headings)
    rows = [[tag.format(escape(cell)) for cell in row] for row in content.rows]
    body = ''.join(f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'
                   for name, *cells in rows)
    return (f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{label}"><table class="{kind}">'
            f'<caption>{escape(content.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
            f'<tbody>{body}</tbody></table></div>')


def _figure(comparison: Comparison) -> str:
    panels = _shown_panels(comparison)
    if not panels:
        return '<p>No run wrote a curve that is shown here.</p>'
    shown = '; '.join(f'{panel.title} against {panel.against}' for panel in panels)
    alt = f'Curves of {_listed([side.name for side in comparison.sides])}: {shown}.'
    caption = f'Thick: {BANDS[comparison.statistic]}; thin: each run.'
    mixed = [side.name for side in comparison.sides if len(side.runs) > 1 and comparison.mixed[side.name]]
    if mixed:
        caption += f" Runs of {' and of '.join(mixed)} that are not comparable have no band."
    parts = [run.name for run in comparison.runs if run.before is not None]
    if parts:
        caption += (f' Curves against minutes are without {_listed(parts)}: the minutes before its checkpoint are not '
                    'known.')
    picture = base64.b64encode(picture_of(comparison)).decode('ascii')
    return (f'<figure><div class="scroll" role="region" tabindex="0" aria-labelledby="curves">'
            f'<img src="data:image/png;base64,{picture}" alt="{escape(alt)}"></div>'
            f'<figcaption>{escape(caption)}</figcaption></figure>')


def _configs(comparison: Comparison) -> str:
    differences = table.config_table(comparison)
    if differences.rows:
        return _table(differences, 'keys', 'configs')
    if sum(any(run.config for run in side.runs) for side in comparison.sides) > 1:
        return '<p>The configs are the same.</p>'
    return '<p>Unknown: fewer than two sides have a total_config.py.</p>'


def _listed(names: Sequence[str]) -> str:
    return ' and '.join(', '.join(names).rsplit(', ', 1))
