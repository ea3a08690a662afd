"""``python -m lzero_kvcache``. Exit codes are 0: done; 1: a run failed; 2: wrong usage; 130: interrupted."""
import argparse
import os
import sys
from typing import Optional, Sequence

from lzero_kvcache_options import COMMAND, command_parser, parsed, refused

from ..config import ConfigError


def main(argv: Optional[Sequence[str]] = None) -> int:
    options = parsed(command_parser(), argv)
    try:
        return {'compare': compare, 'experiment': experiment, 'info': info}[options.command](options)
    except ConfigError as error:
        return refused(COMMAND, str(error))
    except KeyboardInterrupt:
        return 130


def compare(options: argparse.Namespace) -> int:
    from ..comparison import compare_runs
    return compare_runs(options.runs, options.out, sum(options.group, []))


def experiment(options: argparse.Namespace) -> int:
    """Train what is not done yet, and compare all that is; 128 and the signal's number if it was interrupted."""
    from ..comparison import compare_runs
    from ..training.error_hints import hinted
    from ..training.experiment import Experiment
    from ..training.output import Output
    from ..training.processes import Board, Children
    name = os.path.splitext(os.path.basename(options.config))[0]
    folder = options.out or os.path.join('data_experiment', name)
    with Output(silent=True), hinted():  # loading a config prints much
        experiment = Experiment(
            folder, options.config, options.cache, options.seeds, max_env_step=options.max_env_step,
            device=options.device, threads=options.threads, overrides=sum(options.assignments, []))
    with experiment.opened() as lock:
        board = Board(sys.stdout, experiment)
        children = Children(experiment, lock, options.jobs, board)
        try:
            children.run()
        finally:
            board.close()
        done = [trial for trial in experiment.trials if trial.result is not None]
        print(f'{len(done)} of {len(experiment.trials)} runs are done, in {folder}')
        if children.interrupted is not None:
            print('interrupted; the same command goes on')
            return 128 + children.interrupted
        if done:
            caches = {trial.cache for trial in done}
            groups = [(cache, f'{cache}_seed*') for cache in experiment.caches if cache in caches]
            compare_runs([trial.folder for trial in done], folder, groups)
        return 1 if children.failed else 0


def info(options: argparse.Namespace) -> int:
    """Print what is installed, and what a config's cache takes."""
    from ..training.error_hints import hinted
    from ..training.info import installed, of_plan
    from ..training.output import Output
    from ..training.plan import make_plan
    from ..training.terminal import Terminal
    if options.assignments and options.config is None:
        raise ConfigError('--set changes a config; give --config too')
    with Output(silent=True), hinted():  # building a policy prints much
        tables = [('installed', installed())]
        if options.config is not None:
            tables.append(('cache', of_plan(make_plan(options.config, overrides=sum(options.assignments, [])))))
    terminal = Terminal(sys.stdout)
    for title, rows in tables:
        terminal.table(title, rows)
    return 0
