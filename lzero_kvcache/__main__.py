"""``python -m lzero_kvcache COMMAND``: picks the command, and makes exit codes. No command is here."""
import argparse
import logging
import sys
from typing import Optional, Sequence

from .commands import compare, experiment, info
from .config import ConfigError

COMMANDS = (compare, experiment, info)
BAD_USAGE = 2
PROGRAM = 'python -m lzero_kvcache'


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f'{message} (--help lists the options)')


def build_parser() -> argparse.ArgumentParser:
    """
    Overview:
        The commands and their options.
    Returns:
        - parser (:obj:`argparse.ArgumentParser`): Raises ``ConfigError`` where argparse would exit.
    """
    parser = _Parser(prog=PROGRAM, description='Tools around the KV cache of UniZero.', allow_abbrev=False)
    subparsers = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """
    Overview:
        Run a command.
    Arguments:
        - argv (:obj:`Optional[Sequence[str]]`): The command and its options, those of the command line by default.
    Returns:
        - code (:obj:`int`): 0: done; 2: bad usage, with one line; 130: interrupted. Other errors are raised.
    """
    # LightZero sets the root logger to DEBUG, and then every library speaks.
    logging.getLogger().setLevel(logging.WARNING)
    try:
        options = build_parser().parse_args(argv)
        return options.run(options)
    except ConfigError as error:
        print(f'{PROGRAM}: error: ' + ' '.join(str(error).split()), file=sys.stderr)
        return BAD_USAGE
    except KeyboardInterrupt:
        return 130


if __name__ == '__main__':
    sys.exit(main())
