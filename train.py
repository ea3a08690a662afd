"""``python train.py ARGUMENTS`` is ``lzero-kvcache train ARGUMENTS``. ``--help`` lists the options."""
import sys

from lzero_kvcache_options import main

if __name__ == '__main__':
    sys.exit(main(['train', *sys.argv[1:]]))
