"""
Trainings side by side: ``reading`` finds and reads runs, ``judging`` sorts them into sides and says in what they can be
compared, ``table`` compares their numbers, ``page`` draws them.

Knows the files that trainings leave behind. Must not train, run a config or know how the cache works.
"""
import json
import os
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from rich.console import Console
from rich.progress import track

from ..config import ConfigError
from ..run_files import results_in, writing_to
from .judging import check_groups
from .page import picture_of, report_of
from .reading import TrainedRun, Unreadable, find_runs, read_run
from .table import Comparison, line, show

__all__ = ['compare_runs']

PICTURES, PAGE, DATA = ('compare.png', 'compare.svg', 'compare.pdf'), 'report.html', 'compare.json'


def compare_runs(runs: Sequence[str], out: str = 'comparison', groups: Sequence[Tuple[str, str]] = (),
                 console: Optional[Console] = None) -> None:
    """
    Print how trainings compare, and write ``compare.png``, ``.svg`` and ``.pdf``, ``report.html`` and ``compare.json``
    into ``out``. ``runs`` are folders of experiments, folders of several, or event files; ``groups`` are (name,
    pattern) of each side, the baseline first. Runs that no pattern matches are grouped by their config, or else by
    their name without the seed.
    """
    console = console or Console(highlight=False)
    with results_in(out):
        found = find_runs(runs)
        check_groups(found, groups)
        readable: List[TrainedRun] = []
        left_out: Dict[str, str] = {}
        for run in track(found, 'reading', console=console, transient=True, disable=not console.is_terminal):
            try:
                read_run(run)
                readable.append(run)
            except Unreadable as error:
                left_out[run.name] = str(error)
        if not readable:
            raise ConfigError('no run can be read: ' + '; '.join(f'{name} ({why})' for name, why in left_out.items()))
        comparison = Comparison(readable, groups, left_out)
        show(comparison, console)
        line(console, f'Wrote {", ".join(_write(comparison, out))}')


def _write(comparison: Comparison, out: str) -> List[str]:
    data = json.dumps(comparison.as_json(), indent=2, allow_nan=False, ensure_ascii=False)
    contents = {name: picture_of(comparison, name.rpartition('.')[2]) for name in PICTURES}
    contents.update({PAGE: report_of(comparison).encode('utf-8'), DATA: data.encode('utf-8')})
    paths = [os.path.join(out, name) for name in contents]
    with writing_to(out):
        for path, content in zip(paths, contents.values()):
            Path(path).write_bytes(content)
    return paths
