"""``python -m lzero_kvcache compare``: its options. What it does is in ``lzero_kvcache.comparison``."""
import argparse
from typing import Any, Tuple

DEFAULT_OUT = 'comparison'
EPILOG = """
examples:
  python -m lzero_kvcache compare data_unizero/cartpole_old_seed0 data_unizero/cartpole_new_seed0
  python -m lzero_kvcache compare data_unizero --out figures
  python -m lzero_kvcache compare runs/* --group fifo='*_fifo_*' lru='*_lru_*'
"""


def add_parser(subparsers: Any) -> None:
    """
    Overview:
        Add this command.
    Arguments:
        - subparsers (:obj:`Any`): What ``add_subparsers`` of the program's parser returned.
    """
    parser = subparsers.add_parser(
        'compare', help='put runs side by side: a table, curves, a page', epilog=EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Compare trainings: time, memory, hit rates and rewards, with the spread over seeds and the ratio '
        'to the first side. Prints a table, and writes compare.png, report.html and compare.json.',
    )
    parser.add_argument('runs', nargs='+', metavar='RUN',
                        help='the folder of an experiment, a folder of several, or an event file of tensorboard')
    parser.add_argument('--out', default=DEFAULT_OUT, metavar='DIR', help='where to write (default: %(default)s)')
    parser.add_argument('--group', nargs='+', action='append', default=[], type=_group, metavar='NAME=PATTERN',
                        help='the runs whose name or path matches PATTERN (* and ? stand for anything) are seeds of '
                        'NAME; the first is what the others are compared to (default: runs whose configs differ in '
                        "nothing but seed and name belong together, and the old system's come first)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """
    Overview:
        Compare.
    Arguments:
        - options (:obj:`argparse.Namespace`): As from the program's parser.
    Returns:
        - code (:obj:`int`): The exit code.
    """
    from ..comparison import compare_runs
    return compare_runs(options.runs, options.out, [group for groups in options.group for group in groups])


def _group(text: str) -> Tuple[str, str]:
    name, separator, pattern = text.partition('=')
    if not (name and separator and pattern):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATTERN, as in lru='*_lru_*'")
    return name, pattern
