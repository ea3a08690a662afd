"""``python -m lzero_kvcache.training``: the same as ``python train.py``, from anywhere."""
import sys

from ..cli.train import main

if __name__ == '__main__':
    sys.exit(main())
