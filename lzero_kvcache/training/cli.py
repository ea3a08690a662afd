"""
The command line of ``train.py``: options, what they override, and exit codes. 0: done; 1: an error, with its traceback;
2: bad usage or config, with one line; 130 and 143: ended by an interrupt or a kill, with a whole checkpoint.
"""
import argparse
import logging
import os
import re
import sys
import traceback
from typing import List, Optional, Sequence

import torch
from easydict import EasyDict

from lzero_kvcache import check_config, disable, enable
from lzero_kvcache.config import FLAG, ConfigError

from . import lightzero
from .checkpoints import CHECKPOINTS
from .config_file import load_config, whole_number
from .data_parallel import DataParallel, Ranks
from .derived import replace_token
from .mending import mend
from .output import PACKAGE_LOGGER, Output
from .overrides import apply_overrides
from .runner import EVALUATE, TRAIN, Plan, run
from .terminal import Terminal

DONE, FAILED, BAD_USAGE = 0, 1, 2
PLUGIN = 'lzero_kvcache'
EPILOG = """
examples:
  python train.py --config config_new.py
  python train.py --config cartpole_unizero_config.py --cache old --max-env-step 5000 --seed 1
  python train.py --config config_new.py --set policy.num_simulations=10
  policy.model.world_model_cfg.kv_cache_cfg.eviction=lru
  torchrun --nproc_per_node=2 train.py --config config_new.py
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f'{message} (--help lists the options)')


def build_parser() -> argparse.ArgumentParser:
    """
    Overview:
        The options of ``train.py``.
    Returns:
        - parser (:obj:`argparse.ArgumentParser`): Raises ``ConfigError`` where argparse would exit.
    """
    parser = _Parser(
        prog='train.py', description='Train a LightZero UniZero config with the old or the new KV cache.',
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    parser.add_argument('--config', required=True, metavar='FILE', help=(
        'a LightZero config file; a bare name is looked for here, in configs/ and in zoo_configs/. '
        'It is Python code, and it will be run'))
    parser.add_argument('--cache', choices=('old', 'new'), help='the cache system (default: what the config says)')
    parser.add_argument('--seed', type=_count(0), metavar='N', help="default: the config's seed, or 0")
    parser.add_argument('--exp-name', metavar='PATH', help='folder of the experiment; a name that exists gets the time '
                        'appended (default: exp_name of the config)')
    parser.add_argument('--max-env-step', type=_count(1), metavar='N', help='environment steps to stop after, when '
                        'what was begun is finished (default: max_env_step of the config)')
    parser.add_argument('--max-train-iter', type=_count(1), metavar='N', help='training iterations to stop after')
    parser.add_argument('--device', choices=('auto', 'cpu', 'cuda'), help='auto: the GPU if there is one (default: '
                        'what the config says, and the CPU where there is no GPU)')
    checkpoint = parser.add_mutually_exclusive_group()
    checkpoint.add_argument('--resume', metavar='CKPT', help='go on from a checkpoint of either cache system; '
                            'steps and iterations go on, and --max-env-step counts all of them')
    checkpoint.add_argument('--eval', metavar='CKPT', help='evaluate a checkpoint, and train nothing')
    parser.add_argument('--in-place', action='store_true', help='with --resume: go on in the folder that the '
                        'checkpoint is of, whose summary then covers all of the training')
    parser.add_argument('--threads', type=_count(1), metavar='N', help="CPU threads of torch (default: threads of the "
                        "config, or torch's own choice)")
    parser.add_argument('--set', nargs='+', action='append', default=[], metavar='KEY=VALUE', dest='assignments',
                        help='set any key of the config, a new one as +KEY=VALUE; what follows from a value follows')
    parser.add_argument('--verbose', action='store_true', help="show LightZero's own output as well")
    parser.add_argument('--log-level', choices=('info', 'debug'), default='info',
                        help="debug: every miss, eviction, clear and growth of the cache, in the run's log file")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """
    Overview:
        ``train.py``.
    Arguments:
        - argv (:obj:`Optional[Sequence[str]]`): The options, those of the command line by default.
    Returns:
        - code (:obj:`int`): The exit code.
    """
    ranks = DataParallel(Ranks.read())
    try:
        options = build_parser().parse_args(argv)
    except ConfigError as error:
        return _bad_usage(str(error), sys.stderr, ranks)
    with Output(options.verbose, silent=not ranks.main) as output:
        terminal = Terminal(output.terminal, live=not options.verbose)
        output.on_log, output.on_printed = terminal.line, terminal.repeated
        logging.getLogger(PACKAGE_LOGGER).setLevel(options.log_level.upper())
        try:
            return run(make_plan(options), output, terminal, ranks).exit_code
        except ConfigError as error:
            return _bad_usage(str(error), output.errors, ranks)
        except KeyboardInterrupt:
            print('interrupted before the training began; nothing to save', file=output.errors)
            return 130
        except Exception as error:
            line = mend(error)
            if line:
                return _bad_usage(line, output.errors, ranks)
            output.errors.write(traceback.format_exc())
            if output.path:
                output.errors.write(f"what led to it is in {output.path}\n")
            return FAILED


def make_plan(options: argparse.Namespace) -> Plan:
    """
    Overview:
        Load the config, apply the options, and check the outcome before anything is started or written.
    Arguments:
        - options (:obj:`argparse.Namespace`): As from ``build_parser``.
    Returns:
        - plan (:obj:`Plan`): What to run.
    """
    loaded = load_config(options.config)
    main_config, create_config = loaded.main_config, loaded.create_config
    load_plugin(create_config)
    if options.cache:
        set_cache(options.cache, main_config, create_config)
    main_config.exp_name = str(main_config.get('exp_name') or 'data_unizero/' + _stem(loaded.path))
    if options.assignments:
        assignments = [assignment for group in options.assignments for assignment in group]
        apply_overrides(main_config, create_config, assignments, lightzero.default_tree(main_config, create_config))
    set_device(options.device, main_config)
    seed = loaded.seed if options.seed is None else options.seed
    if options.in_place:
        main_config.exp_name = _folder_of(options)
    elif options.exp_name:
        main_config.exp_name = options.exp_name
    elif options.eval:
        main_config.exp_name += '_eval'
    else:
        main_config.exp_name = replace_token(main_config.exp_name, 'seed', loaded.seed, seed)
    check_config(main_config, create_config)
    return Plan(
        main_config=main_config, create_config=create_config, entry=loaded.entry, config=loaded.path, seed=seed,
        max_env_step=options.max_env_step or loaded.max_env_step,
        max_train_iter=options.max_train_iter or loaded.max_train_iter,
        threads=options.threads or loaded.threads, task=EVALUATE if options.eval else TRAIN,
        checkpoint=options.eval or options.resume, in_place=options.in_place,
    )


def load_plugin(create_config: EasyDict) -> None:
    """
    Overview:
        Add this package to what DI-engine imports, so that the flag and the statistics work in any LightZero config.
    Arguments:
        - create_config (:obj:`EasyDict`): Changed in place.
    """
    names: List[str] = list(create_config.policy.get('import_names', []))
    if PLUGIN not in names:
        create_config.policy.import_names = names + [PLUGIN]


def set_cache(cache: str, main_config: EasyDict, create_config: EasyDict) -> None:
    """
    Overview:
        Pick the cache system, and let a name that says 'old' or 'new' say it.
    Arguments:
        - cache (:obj:`str`): 'old' or 'new'.
        - main_config (:obj:`EasyDict`), create_config (:obj:`EasyDict`): Changed in place.
    """
    was = 'new' if main_config.policy.model.world_model_cfg.get(FLAG, False) else 'old'
    (enable if cache == 'new' else disable)(main_config, create_config)
    name = main_config.get('exp_name')
    if isinstance(name, str) and was != cache:
        main_config.exp_name = re.sub(rf'(?<![A-Za-z0-9]){was}(?![A-Za-z0-9])', cache, name)


def set_device(device: Optional[str], main_config: EasyDict) -> None:
    """
    Overview:
        Write one device into all the places that LightZero reads it from.
    Arguments:
        - device (:obj:`Optional[str]`): 'auto', 'cpu' or 'cuda'; None for what the config says.
        - main_config (:obj:`EasyDict`): Changed in place.
    """
    world_model = main_config.policy.model.world_model_cfg
    has_gpu = torch.cuda.is_available()
    if device == 'cuda' and not has_gpu:
        raise ConfigError('--device cuda: torch finds no GPU here; use --device cpu, or auto')
    if device is None:
        device = str(world_model.get('device', 'auto'))
    if device == 'auto' or not has_gpu:
        device = 'cuda' if has_gpu else 'cpu'
    world_model.device = main_config.policy.device = device
    main_config.policy.cuda = device.startswith('cuda')


def _count(minimum: int):  # type: ignore[no-untyped-def]

    def count(text: str) -> int:
        try:
            value = whole_number(float(text), 'value', 'option', minimum)
        except (ValueError, ConfigError):
            raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least {minimum}') from None
        assert value is not None
        return value

    return count


def _folder_of(options: argparse.Namespace) -> str:
    if not options.resume or options.exp_name:
        raise ConfigError('--in-place goes on where --resume was; give that, and no --exp-name')
    folder, ckpt = os.path.split(os.path.dirname(os.path.abspath(options.resume)))
    if ckpt != CHECKPOINTS:
        raise ConfigError(f'--in-place: {options.resume} is in no folder {CHECKPOINTS} of an experiment')
    return folder


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _bad_usage(line: str, stream, ranks: DataParallel) -> int:  # type: ignore[no-untyped-def]
    if ranks.main:  # all ranks find the same
        print('train.py: error: ' + ' '.join(line.split()), file=stream)
    return BAD_USAGE
