"""``python -m lzero_kvcache`` is the command ``lzero-kvcache``."""
import sys

from lzero_kvcache_options import main

if __name__ == '__main__':
    sys.exit(main())
