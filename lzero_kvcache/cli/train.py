"""
``train.py``. Exit codes are 0: done; 1: an error, with its traceback; 2: wrong usage or config, with one line; 130 and
143: ended by an interrupt or a kill, with a whole checkpoint.
"""
import argparse
import logging
import sys
import traceback
from typing import Optional, Sequence

from lzero_kvcache_options import parsed, refused, train_parser

from ..config import ConfigError
from ..training.error_hints import hint
from ..training.output import PACKAGE_LOGGER, Output
from ..training.plan import Plan, make_plan
from ..training.ranks import DataParallel
from ..training.runner import run as run_plan

FAILED = 1


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Parse and run; wrong usage ends the program, as ``--help`` does."""
    return run(parsed(train_parser(), argv))


def run(options: argparse.Namespace) -> int:
    ranks = DataParallel.of_torchrun()
    with Output(options.verbose, silent=not ranks.main) as output:
        logging.getLogger(PACKAGE_LOGGER).setLevel(options.log_level.upper())
        try:
            return run_plan(plan_of(options), output, ranks).exit_code
        except ConfigError as error:
            return refused('train.py', str(error), output.errors)
        except KeyboardInterrupt:
            print('interrupted before the training began; nothing to save', file=output.errors)
            return 130
        except Exception as error:
            line = hint(error)
            if line:
                return refused('train.py', line, output.errors)
            output.errors.write(traceback.format_exc())
            if output.path:
                output.errors.write(f"what led to it is in {output.path}\n")
            return FAILED


def plan_of(options: argparse.Namespace) -> Plan:
    return make_plan(
        options.config, cache=options.cache, seed=options.seed, exp_name=options.exp_name,
        max_env_step=options.max_env_step, max_train_iter=options.max_train_iter, device=options.device,
        resume=options.resume, evaluate=options.eval, in_place=options.in_place, threads=options.threads,
        overrides=sum(options.assignments, []),
    )


if __name__ == '__main__':
    sys.exit(main())
