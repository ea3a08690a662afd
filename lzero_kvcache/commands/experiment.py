"""
``python -m lzero_kvcache experiment``: its options. The runs are the business of ``lzero_kvcache.training``, the
figures of ``lzero_kvcache.comparison``.
"""
import argparse
import os
import sys
from typing import Any, List

DEFAULT_OUT = 'data_experiment'
EPILOG = """
example:
  python -m lzero_kvcache experiment --config config_new.py --cache old new --seeds 0 1 2
"""


def add_parser(subparsers: Any) -> None:
    """
    Overview:
        Add this command.
    Arguments:
        - subparsers (:obj:`Any`): What ``add_subparsers`` of the program's parser returned.
    """
    parser = subparsers.add_parser(
        'experiment', help='train over cache systems and seeds, and compare', epilog=EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Train one config for each cache system and seed, each in a process of its own, and compare them. '
        'The same command goes on where it was cut off.',
    )
    parser.add_argument('--config', required=True, metavar='FILE', help='a LightZero config file, as for train.py')
    parser.add_argument('--cache', nargs='+', choices=('old', 'new'), default=['old', 'new'], metavar='SYSTEM',
                        help='old, new or both, the baseline first (default: old new)')
    parser.add_argument('--seeds', nargs='+', type=_count(0), default=[0, 1, 2], metavar='N',
                        help='default: 0 1 2')
    parser.add_argument('--jobs', type=_count(1), default=1, metavar='N',
                        help='runs at once; they share the machine, and so their times (default: 1)')
    parser.add_argument('--out', metavar='DIR', help=f'folder of the experiment (default: {DEFAULT_OUT}/NAME of the '
                        'config)')
    parser.add_argument('--max-env-step', metavar='N', help='environment steps of each run (default: that of the '
                        'config)')
    parser.add_argument('--device', metavar='DEVICE', help='auto, cpu or cuda, as for train.py')
    parser.add_argument('--threads', metavar='N', help='CPU threads of each run, as for train.py')
    parser.add_argument('--set', nargs='+', action='append', default=[], metavar='KEY=VALUE', dest='assignments',
                        help='set any key of the config in every run')
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """
    Overview:
        Train what is not done yet, and compare all that is.
    Arguments:
        - options (:obj:`argparse.Namespace`): As from the program's parser.
    Returns:
        - code (:obj:`int`): 0: all are done; 1: a run failed; 128 and the signal's number: interrupted.
    """
    from ..comparison import compare_runs
    from ..training.children import Board, Children
    from ..training.experiment import Experiment
    from ..training.mending import mended
    from ..training.output import Output
    name = os.path.splitext(os.path.basename(options.config))[0]
    folder = options.out or os.path.join(DEFAULT_OUT, name)
    with Output(), mended():  # loading a config says much
        experiment = Experiment(folder, options.config, options.cache, options.seeds, _of_each(options))
    with experiment.opened() as lock:
        board = Board(sys.stdout, experiment)
        children = Children(experiment, lock, options.jobs, board)
        try:
            children.run()
        finally:
            board.close()
        done = [run for run in experiment.runs if run.result is not None]
        print(f'{len(done)} of {len(experiment.runs)} runs are done, in {folder}')
        if children.interrupted is not None:
            print('interrupted; the same command goes on')
            return 128 + children.interrupted
        if done:
            groups = [(cache, f'{cache}_seed*') for cache in experiment.caches if cache in {run.cache for run in done}]
            compare_runs([run.folder for run in done], folder, groups)
        return 1 if children.failed else 0


def _of_each(options: argparse.Namespace) -> List[str]:
    """What is handed on to every training."""
    given = (('--max-env-step', options.max_env_step), ('--device', options.device), ('--threads', options.threads))
    handed = [part for option, value in given if value is not None for part in (option, value)]
    assignments = [assignment for group in options.assignments for assignment in group]
    return handed + (['--set', *assignments] if assignments else [])


def _count(minimum: int) -> Any:

    def count(text: str) -> int:
        if not text.isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least {minimum}')
        return int(text)

    return count
