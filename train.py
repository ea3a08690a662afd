"""Train a LightZero UniZero config: ``python train.py --config config_new.py``. ``--help`` lists the options."""
import contextlib
import io
import sys

from lzero_kvcache_options import parsed, refused, train_parser


def main() -> int:
    options = parsed(train_parser())
    # What LightZero, DI-engine and gym say while they are imported is of no use to who trains.
    noise = io.StringIO()
    try:
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            from lzero_kvcache.cli.train import run
    except ModuleNotFoundError as error:
        return refused('train.py', f"the module '{error.name}' is missing; pip install -e .")
    except KeyboardInterrupt:
        return 130
    return run(options)


if __name__ == '__main__':
    sys.exit(main())
