"""Train a LightZero UniZero config: ``python train.py --config config_new.py``. ``--help`` lists the options."""
import contextlib
import io
import sys


def main() -> int:
    # What LightZero, DI-engine and gym say while they are imported is of no use to who trains.
    noise = io.StringIO()
    try:
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            from lzero_kvcache.training.cli import main as run
    except ModuleNotFoundError as error:
        print(f"train.py: error: the module '{error.name}' is missing; pip install -e .", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return run()


if __name__ == '__main__':
    sys.exit(main())
