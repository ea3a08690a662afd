"""
The commands of ``lzero-kvcache``. Exit codes are 0: done; 1: a run failed, or an error, with its traceback; 2: wrong
usage or config, with one line; 130 and 143: ended by an interrupt or a kill, a training with a whole checkpoint.
"""
import argparse
import logging
import os
import shutil
import sys
import traceback

from rich.console import Console

from lzero_kvcache_options import EXPERIMENTS, INTERRUPTED, TrainOptions, ranks_of_torchrun, refused

from ..config import ConfigError
from ..info import installed, of_plan, of_zoo
from ..run_files import results_in
from ..text import drawn
from ..training import run as run_plan
from ..training.error_hints import hinted
from ..training.experiment import Experiment
from ..training.plan import plan_of
from ..training.processes import TrialProcesses
from ..training.ranks import DataParallel
from ..training.terminal import PACKAGE_LOGGER, Output

FAILED = 1
# Of what goes to a file or a pipe, if COLUMNS says nothing.
WIDTH = 100


def run(options: argparse.Namespace) -> int:
    """Run the command that options are of; returns the exit code."""
    commands = {'train': train, 'compare': compare, 'experiment': experiment, 'info': info, 'zoo': zoo}
    try:
        with hinted():
            return commands[options.command](options)
    except ConfigError as error:
        return refused(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED


def train(options: argparse.Namespace) -> int:
    """Train or evaluate one plan."""
    ranks = DataParallel(*ranks_of_torchrun())
    output = Output(options.verbose, silent=not ranks.main)
    try:
        with hinted(), output:
            logging.getLogger(PACKAGE_LOGGER).setLevel(options.log_level.upper())
            code = run_plan(plan_of(TrainOptions.of(options)), output, ranks).exit_code
            assert code is not None, 'it has ended'
            return code
    except ConfigError:
        raise
    except KeyboardInterrupt:
        print('interrupted before the training began; nothing to save', file=sys.stderr)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        if output.path and os.path.exists(output.path):
            print(f'what led to it is in {output.path}', file=sys.stderr)
        return FAILED


def compare(options: argparse.Namespace) -> int:
    from ..comparison import compare_runs
    compare_runs(options.runs, options.out, options.group, console())
    return 0


def experiment(options: argparse.Namespace) -> int:
    """Train the missing runs, and compare all finished ones; returns 128 plus the signal's number if interrupted."""
    from ..comparison import compare_runs
    name = os.path.splitext(os.path.basename(options.config))[0]
    folder = options.out or os.path.join(EXPERIMENTS, name)
    with results_in(folder):
        with Output(silent=True):  # loading a config prints much
            experiment = Experiment(folder, TrainOptions.of(options), options.caches, options.seeds)
        with experiment.opened() as lock:
            children = TrialProcesses(experiment, lock, options.jobs)
            children.run()
            done = [trial for trial in experiment.trials if trial.result is not None]
            print(f'{len(done)} of {len(experiment.trials)} runs are done, in {folder}')
            if children.interrupted is not None:
                print('interrupted; the same command goes on')
                return 128 + children.interrupted
            if done:
                caches = {trial.cache for trial in done}
                groups = [(cache, f'{cache}_seed*') for cache in experiment.caches if cache in caches]
                compare_runs([trial.folder for trial in done], folder, groups, console())
            return FAILED if children.failed else 0


def info(options: argparse.Namespace) -> int:
    """Print installed versions, and the memory of a config's cache."""
    with Output(silent=True):  # building a policy prints much
        tables = {'installed': installed()}
        if options.config is not None:
            tables.update(of_plan(plan_of(TrainOptions.of(options))))
    for title, rows in tables.items():
        console().print(drawn(title, (), rows))
    return 0


def zoo(options: argparse.Namespace) -> int:
    """Print which configs there are, and what they need."""
    with Output(silent=True):  # building environments prints much
        rows = of_zoo()
    console().print(drawn('configs', (), rows))
    return 0


def console() -> Console:
    """Standard output."""
    return Console(highlight=False, width=shutil.get_terminal_size((WIDTH, 0)).columns)
