"""
Trainings side by side, from what they left behind: event files, saved configs, summaries. Nothing here trains, runs a
config or knows how the cache works.
"""
import functools
import json
import os
from typing import Dict, List, Optional, Sequence, Tuple

from rich.console import Console

from ..config import ConfigError
from .comparison import Comparison, as_json, compare
from .events import Unreadable
from .finding import Experiment, find_experiments
from .plot import draw
from .report import report_of
from .runs import Run, read_run
from .sides import check_groups
from .terminal import default_console, line, reading_bar, show

__all__ = ['compare_runs']

PICTURE, PAGE, DATA = 'compare.png', 'report.html', 'compare.json'


def compare_runs(runs: Sequence[str], out: str = 'comparison', groups: Sequence[Tuple[str, str]] = (),
                 console: Optional[Console] = None) -> int:
    """
    Overview:
        Compare trainings: print one table, and write ``compare.png``, ``report.html`` and ``compare.json``.
    Arguments:
        - runs (:obj:`Sequence[str]`): Folders of experiments, folders of several, or event files.
        - out (:obj:`str`): The folder to write into; made if it is not there.
        - groups (:obj:`Sequence[Tuple[str, str]]`): (name, pattern) of each side, the baseline first; runs that no \
            pattern matches are grouped by their config, or else by their name without the seed.
        - console (:obj:`Optional[Console]`): Where to print; standard output by default.
    Returns:
        - code (:obj:`int`): 0.
    Raises:
        - ConfigError: If a path is not there, a pattern matches nothing, no run can be read, or ``out`` cannot be \
            written to.
    """
    console = console or default_console()
    experiments = find_experiments(runs)
    check_groups(experiments, groups)
    readable, left_out = _read(experiments, console)
    for name, why in left_out.items():
        line(console, f'{name} is left out: {why}')
    if not readable:
        raise ConfigError('none of these runs can be read')
    comparison = compare(readable, groups, left_out)
    show(comparison, console)
    line(console, f'Wrote {", ".join(_write(comparison, out))}')
    return 0


def _read(experiments: Sequence[Experiment], console: Console) -> Tuple[List[Run], Dict[str, str]]:
    readable: List[Run] = []
    left_out: Dict[str, str] = {}
    total = sum(os.path.getsize(file) for experiment in experiments for file in experiment.event_files)
    with reading_bar(console, total) as advance:
        for experiment in experiments:
            try:
                readable.append(read_run(experiment, functools.partial(advance, experiment.name)))
            except Unreadable as error:
                left_out[experiment.name] = str(error)
    return readable, left_out


def _write(comparison: Comparison, out: str) -> List[str]:
    data = json.dumps(as_json(comparison), indent=2, allow_nan=False, ensure_ascii=False)
    paths = []
    try:
        os.makedirs(out, exist_ok=True)
        for name, content in (
            (PICTURE, draw(comparison)), (PAGE, report_of(comparison).encode('utf-8')), (DATA, data.encode('utf-8'))
        ):
            paths.append(os.path.join(out, name))
            with open(paths[-1], 'wb') as file:
                file.write(content)
    except OSError as error:
        raise ConfigError(f'--out {out}: it cannot be written to ({error.strerror})') from error
    return paths
