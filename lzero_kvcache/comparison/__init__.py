"""
Trainings side by side, from what they left behind: event files, saved configs, summaries. Nothing here trains, imports
a config or knows how the cache works.
"""
from typing import Optional, Sequence, Tuple

from rich.console import Console

__all__ = ['compare_runs']


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
        - ConfigError: If a path is not there, a pattern matches nothing, or no run can be read.
    """
    raise NotImplementedError
