"""``python -m lzero_kvcache COMMAND``: ``compare``, ``experiment`` or ``info``."""
import sys

from .cli.commands import main

if __name__ == '__main__':
    sys.exit(main())
