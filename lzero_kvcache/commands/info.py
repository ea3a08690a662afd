"""``python -m lzero_kvcache info``: its options. What it says is found by ``lzero_kvcache.info``."""
import argparse
import sys
from typing import Any


def add_parser(subparsers: Any) -> None:
    """
    Overview:
        Add this command.
    Arguments:
        - subparsers (:obj:`Any`): What ``add_subparsers`` of the program's parser returned.
    """
    parser = subparsers.add_parser(
        'info', help='versions, device, backend; sizes and memory of a config', allow_abbrev=False,
        description='Say what is installed, and what the cache of a config will take. The policy of the config is '
        'built on the CPU, without environments.',
    )
    parser.add_argument('--config', metavar='FILE', help='a LightZero config file, as for train.py')
    parser.add_argument('--set', nargs='+', action='append', default=[], metavar='KEY=VALUE', dest='assignments',
                        help='set any key of the config')
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """
    Overview:
        Print one table, or two.
    Arguments:
        - options (:obj:`argparse.Namespace`): As from the program's parser.
    Returns:
        - code (:obj:`int`): 0.
    """
    from .. import info
    from ..config import ConfigError
    from ..training.mending import mended
    from ..training.output import Output
    from ..training.terminal import Terminal
    if options.assignments and options.config is None:
        raise ConfigError('--set changes a config; give --config too')
    with Output(), mended():  # building a policy says much
        tables = [('installed', info.installed())]
        if options.config is not None:
            assignments = [assignment for group in options.assignments for assignment in group]
            tables.append(('cache', info.of_config(options.config, assignments)))
    terminal = Terminal(sys.stdout)
    for title, rows in tables:
        terminal.table(title, rows)
    return 0
