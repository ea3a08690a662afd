"""The curves of the sides as a picture: a mean, a band of one standard deviation over the runs, and each run."""
import io
from typing import Any, List, NamedTuple, Optional, Tuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.style import context
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from .comparison import Comparison
from .events import Curve
from .runs import CACHE_BY_STEP, HOST_MEMORY, REWARD, Run
from .wording import side_text

# Told apart by who sees colours otherwise (Okabe and Ito), on white and on black.
COLOURS = ('#D55E00', '#0072B2', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
COLOURS_ON_DARK = ('#F0793A', '#4AA8E0', '#2FC49A', '#DE9BC0', '#F0B840', '#8CCBF2')
PAPER, INK, RULES = '#FFFFFF', '#1F2328', '#D7DCE1'
DARK_PAPER, LIGHT_INK, DARK_RULES = '#15181C', '#DDE2E8', '#343A41'
COLUMNS, PANEL_INCHES, DPI = 3, (4.1, 2.9), 144
STEPS, MINUTES = 'environment steps', 'minutes'
# More points than a panel has pixels to show them are averaged.
SHOWN_POINTS = 200


class Panel(NamedTuple):
    """
    Overview:
        What a panel shows: a tag against environment steps or minutes, its values times ``factor``, whether zero
        is shown, and the greatest value shown.
    """
    title: str
    tag: str
    against: str
    factor: float = 1.
    from_zero: bool = False
    top: Optional[float] = None


PANELS = (
    Panel('Reward of evaluations', REWARD, STEPS),
    Panel('Reward of evaluations', REWARD, MINUTES),
    Panel('Root contexts found, %', CACHE_BY_STEP + 'init_hit_rate', STEPS, 100., True, 104.),
    Panel('Time of a search, ms', CACHE_BY_STEP + 'search_ms', STEPS, from_zero=True),
    Panel('Memory of the cache, MiB', CACHE_BY_STEP + 'memory_mb', STEPS, from_zero=True),
    Panel('Memory of the process, MiB', HOST_MEMORY, MINUTES, from_zero=True),
)


def draw(comparison: Comparison, dark: bool = False, columns: int = COLUMNS) -> bytes:
    """
    Overview:
        Draw all panels that a run has points for.
    Arguments:
        - comparison (:obj:`Comparison`): What to show.
        - dark (:obj:`bool`): Light lines on a dark ground.
        - columns (:obj:`int`): At most so many panels side by side.
    Returns:
        - png (:obj:`bytes`): The picture.
    """
    paper, ink, rules = (DARK_PAPER, LIGHT_INK, DARK_RULES) if dark else (PAPER, INK, RULES)
    colours = COLOURS_ON_DARK if dark else COLOURS
    style: Any = {
        'figure.facecolor': paper, 'axes.facecolor': paper, 'savefig.facecolor': paper, 'text.color': ink,
        'axes.labelcolor': ink, 'axes.titlecolor': ink, 'xtick.color': ink, 'ytick.color': ink, 'axes.edgecolor': rules,
        'grid.color': rules, 'axes.grid': True, 'grid.linewidth': 0.6, 'axes.spines.top': False,
        'axes.spines.right': False, 'axes.titlesize': 11, 'axes.titlelocation': 'left', 'axes.titleweight': 'bold',
        'font.size': 9.5, 'text.parse_math': False, 'xtick.major.size': 0, 'ytick.major.size': 0,
    }
    panels = shown_panels(comparison)
    with context(['default', style]):
        columns = max(1, min(columns, len(panels)))
        lines = max(1, -(-len(panels) // columns))
        width, height = columns * PANEL_INCHES[0], lines * PANEL_INCHES[1] + 0.7
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, rect=(0, 0, 1, 1 - 0.45 / height))
        figure = Figure(figsize=(width, height), layout=layout)
        for index, panel in enumerate(panels):
            _draw_panel(figure.add_subplot(lines, columns, index + 1), panel, comparison, colours)
        handles = [Line2D([], [], color=_colour(colours, index), linewidth=2.4)
                   for index in range(len(comparison.sides))]
        figure.legend(handles, [' ' + side_text(side) for side in comparison.sides], loc='upper left',
                      bbox_to_anchor=(0.005, 1.), ncols=len(handles), frameon=False, fontsize=11)
        file = io.BytesIO()
        figure.savefig(file, format='png', dpi=DPI)
    return file.getvalue()


def shown_panels(comparison: Comparison) -> List[Panel]:
    """
    Overview:
        The panels that there is something to show in.
    Arguments:
        - comparison (:obj:`Comparison`): What to show.
    Returns:
        - panels (:obj:`List[Panel]`): Some of ``PANELS``.
    """
    runs = [run for side in comparison.sides for run in side.runs]
    return [panel for panel in PANELS if any(run.curve(panel.tag) is not None for run in runs)]


def line_of(curve: Curve, panel: Panel) -> Tuple[np.ndarray, np.ndarray]:
    """
    Overview:
        The points of a curve as they are drawn.
    Arguments:
        - curve (:obj:`Curve`): A run's.
        - panel (:obj:`Panel`): Where it is drawn.
    Returns:
        - x (:obj:`np.ndarray`), y (:obj:`np.ndarray`): Strictly increasing places, and the mean of what is there.
    """
    x = curve.steps.astype(float) if panel.against == STEPS else curve.seconds / 60
    y = curve.values * panel.factor
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    places, index = np.unique(x, return_inverse=True)
    if len(places) > SHOWN_POINTS:
        edges = np.linspace(places[0], places[-1], SHOWN_POINTS + 1)
        index = np.clip(np.searchsorted(edges, x, side='right') - 1, 0, SHOWN_POINTS - 1)
    counts = np.bincount(index)
    there = counts > 0
    return (np.bincount(index, x)[there] / counts[there], np.bincount(index, y)[there] / counts[there])


def band_of(lines: List[Tuple[np.ndarray, np.ndarray]]) -> Optional[Tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """
    Overview:
        Mean and standard deviation of several lines where all of them are.
    Arguments:
        - lines (:obj:`List[Tuple[np.ndarray, np.ndarray]]`): As from ``line_of``.
    Returns:
        - band (:obj:`Optional[Tuple[np.ndarray, np.ndarray, np.ndarray]]`): Places, means and deviations; None if the \
            lines have no stretch in common or are fewer than two.
    """
    if len(lines) < 2:
        return None
    first, last = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    if first >= last:
        return None
    places = np.linspace(first, last, SHOWN_POINTS)
    values = np.stack([np.interp(places, x, y) for x, y in lines])
    return places, values.mean(axis=0), values.std(axis=0, ddof=1)


def _draw_panel(axes: Any, panel: Panel, comparison: Comparison, colours: Tuple[str, ...]) -> None:
    for index, side in enumerate(comparison.sides):
        colour = _colour(colours, index)
        lines = [line for line in (_line(run, panel) for run in side.runs) if line is not None]
        band = band_of(lines)
        for x, y in lines:
            alone = band is None
            axes.plot(x, y, color=colour, linewidth=2. if alone else 0.8, alpha=1. if alone else 0.45,
                      marker='o' if len(x) == 1 else None, markersize=4)
        if band is not None:
            places, mean, deviation = band
            axes.plot(places, mean, color=colour, linewidth=2.2)
            axes.fill_between(places, mean - deviation, mean + deviation, color=colour, alpha=0.16, linewidth=0)
    axes.set_title(panel.title)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel(panel.against)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter(StrMethodFormatter('{x:,g}'))
    axes.xaxis.set_major_formatter(StrMethodFormatter('{x:,g}'))
    if panel.from_zero:
        axes.set_ylim(0, panel.top or 1.08 * axes.dataLim.y1 or None)
    axes.set_xlim(left=min(0, axes.dataLim.x0))


def _line(run: Run, panel: Panel) -> Optional[Tuple[np.ndarray, np.ndarray]]:
    curve = run.curve(panel.tag)
    if curve is None:
        return None
    line = line_of(curve, panel)
    return line if len(line[0]) else None


def _colour(colours: Tuple[str, ...], index: int) -> str:
    return colours[index % len(colours)]
