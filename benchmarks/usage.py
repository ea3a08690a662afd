"""How benchmarks end where their user must change something: in one line, with exit code 2."""
import argparse
import os
import sys
from typing import Callable

from lzero_kvcache_options import BAD_USAGE, Parser, UsageError


def parser(description: str) -> argparse.ArgumentParser:
    """With the option that nearly all benchmarks have."""
    options = Parser(description=description)
    options.add_argument('--device', choices=('cpu', 'cuda'), type=device, default='cpu')
    return options


def device(text: str) -> str:
    """Reads the name of a device that is here."""
    if text == 'cuda':
        import torch
        if not torch.cuda.is_available():
            raise argparse.ArgumentTypeError('torch finds no GPU here; use cpu')
    return text


def run(main: Callable[[], None]) -> None:
    """Run a benchmark."""
    try:
        main()
    except ValueError as error:
        from lzero_kvcache.config import ConfigError
        if not isinstance(error, (ConfigError, UsageError)):
            raise
        print(f'{os.path.basename(sys.argv[0])}: error: {error}', file=sys.stderr)
        sys.exit(BAD_USAGE)
