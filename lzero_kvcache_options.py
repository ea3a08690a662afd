"""
The command ``lzero-kvcache``, which is also ``python -m lzero_kvcache``, and with ``train`` before its arguments
``train.py``. Its options stand beside the package, which brings torch and takes seconds to import: ``--help``,
``--version``, wrong usage and a config that is nowhere must be answered at once.
"""
import argparse
import contextlib
import difflib
import importlib.util
import io
import os
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Callable, Dict, List, NoReturn, Optional, Sequence, Tuple

COMMAND = 'lzero-kvcache'
BAD_USAGE, INTERRUPTED = 2, 130
LIGHTZERO_PREFIX = 'lightzero:'
SYSTEMS = ('old', 'lightzero', 'new')
# Where experiments are, if --out does not say.
EXPERIMENTS = 'data_experiment'
NO_CHECKPOINT = '{}: no such checkpoint; an experiment has them in its folder ckpt/'
DEVICES = ('auto', 'cpu', 'cuda')
TRAIN_EXAMPLES = """
examples:
  lzero-kvcache train --config config_new.py
  lzero-kvcache train --config cartpole_unizero_config --cache old --max-env-step 5000 --seed 1
  lzero-kvcache train --config lightzero:cartpole_unizero_config --cache new
  lzero-kvcache train --config config_new.py --set policy.num_simulations=10
  policy.model.world_model_cfg.kv_cache_cfg.eviction=lru
  torchrun --nproc_per_node=2 train.py --config config_new.py
"""
COMPARE_EXAMPLES = """
examples:
  lzero-kvcache compare data_unizero/cartpole_old_seed0 data_unizero/cartpole_new_seed0
  lzero-kvcache compare data_unizero --out figures
  lzero-kvcache compare runs/* --group fifo='*_fifo_*' lru='*_lru_*'
"""
EXPERIMENT_EXAMPLES = """
example:
  lzero-kvcache experiment --config config_new.py --cache old new --seeds 0 1 2
"""


class UsageError(ValueError):
    """Options that no parser accepts, in one line."""


class Parser(argparse.ArgumentParser):

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f'{message} (--help lists the options)')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Parse and run a command; returns its exit code. ``--help`` and ``--version`` end the program."""
    try:
        options = command_parser().parse_args(argv)
        check_options(options)
        if getattr(options, 'config', None) is not None:
            options.config = path_of_config(options.config)
            if ranks_of_torchrun()[0] == 0:
                print(f'Config: {options.config}', flush=True)
        # What LightZero, DI-engine and gym say while they are imported is of no use here.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from lzero_kvcache.cli.commands import run
    except UsageError as error:
        return refused(str(error))
    except ModuleNotFoundError as error:
        return refused(f"the module '{error.name}' is not installed; in a clone of lzero_kvcache, pip install -e .")
    except ImportError as error:  # a LightZero that is not known
        return refused(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    return run(options)


def ranks_of_torchrun() -> Tuple[int, ...]:
    """The rank of this process, how many there are, and how many on this machine. A RANK alone is not torchrun's."""
    told = [os.environ.get(name, '') for name in ('RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE')]
    if not (all(told) and os.environ.get('MASTER_ADDR')):
        return 0, 1, 1
    return tuple(map(int, told))


def refused(message: str) -> int:
    """Say in one line what is wrong, once for all processes, which find the same; returns the exit code."""
    if ranks_of_torchrun()[0] == 0:
        print(f'{COMMAND}: error: ' + ' '.join(message.split()), file=sys.stderr)
    return BAD_USAGE


def our_configs() -> Dict[str, str]:
    """The files of ``configs`` and ``zoo_configs`` by name; a wheel has these folders inside of the package."""
    package = _package('lzero_kvcache')
    home = package if (package / 'configs').is_dir() else package.parent
    return {path.stem: str(path) for folder in ('configs', 'zoo_configs')
            for path in sorted((home / folder).glob('[!_]*.py'))}


def lightzero_configs() -> Dict[str, str]:
    """The UniZero configs of LightZero's zoo by name, wherever it is installed."""
    paths = sorted((_package('lzero').parent / 'zoo').rglob('*_config.py'))
    return {LIGHTZERO_PREFIX + path.stem: str(path) for path in paths
            if not path.stem.startswith('test_') and 'unizero' in path.read_text(encoding='utf-8')}


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that lack what they need, or name a thing twice."""
    for name in ('overrides', 'cache'):
        if getattr(options, name, None) and options.config is None:
            raise UsageError(f'{flag_of(name)} changes a config; give --config too')
    for option, path in (('resume', getattr(options, 'resume', None)), ('eval', getattr(options, 'evaluate', None))):
        if path is not None and not os.path.isfile(path):
            raise UsageError(f'--{option} {NO_CHECKPOINT.format(path)}')
    for option, values in (('cache', getattr(options, 'caches', [])), ('seeds', getattr(options, 'seeds', []))):
        if len(set(values)) < len(values):
            raise UsageError(f'--{option} {" ".join(map(str, values))}: give each of them once')


def path_of_config(name: str) -> str:
    """The absolute path of a config file; ``.py`` may be left out."""
    stem = re.sub(r'\.py$', '', name)
    for path in (name, stem + '.py'):
        if os.path.isfile(path):
            return os.path.abspath(path)
    ours, theirs = our_configs(), lightzero_configs()
    if stem in ours or LIGHTZERO_PREFIX + stem in theirs or stem in theirs:
        return ours.get(stem) or theirs.get(stem) or theirs[LIGHTZERO_PREFIX + stem]
    if name.startswith(LIGHTZERO_PREFIX):
        whose, near = 'LightZero has no config', near_names(stem, list(theirs))
    else:
        whose = 'there is no such file, and neither we nor LightZero have a config'
        near = near_names(os.path.basename(stem), [*ours, *(each[len(LIGHTZERO_PREFIX):] for each in theirs)])
    advice = f"give a path, or a name that '{COMMAND} zoo' lists"
    if near:
        advice = f'did you mean {" or ".join(map(repr, near))}?'
    raise UsageError(f'--config {name}: {whose} of this name; {advice}')


def near_names(name: str, names: Sequence[str]) -> List[str]:
    """Up to three names of configs that have one in them, or else the one that it may be misspelt from. 'unizero' and
    '_config' are ignored, since nearly all names contain them."""
    own = {each: re.sub(rf'^{LIGHTZERO_PREFIX}|_?unizero|_config$', '', each) for each in names}
    wanted = re.sub(rf'^{LIGHTZERO_PREFIX}|_?unizero|_config$', '', name)
    within = [each for each in own if len(wanted) > 2 and wanted in own[each]]
    if within:
        return within[:3]
    close = difflib.get_close_matches(wanted, own.values(), n=1, cutoff=0.7)
    return [each for each in own if own[each] in close][:1]


def _package(name: str) -> Path:
    """The folder of a package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(name=name)
    return Path(spec.origin).resolve().parent


def version() -> str:
    """The package's, read without importing it."""
    source = (_package('lzero_kvcache') / '__init__.py').read_text(encoding='utf-8')
    return 'lzero_kvcache ' + re.findall(r"^__version__ = '([^']+)'$", source, re.MULTILINE)[0]


def count(minimum: int) -> Callable[[Any], int]:
    """Reads a whole number, which may be written as 2e5."""

    def read(text: Any) -> int:
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = float(text)
            if number >= minimum and number.is_integer():
                return int(text) if str(text).isdigit() else int(number)
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least {minimum}')

    return read


def threads(text: Any) -> int:
    """Reads a number of threads that this machine can run."""
    number, most = count(1)(text), 8 * (os.cpu_count() or 1)
    if number > most:
        raise argparse.ArgumentTypeError(f'{text!r} is more than {most}, eight for each processor of this machine')
    return number


def device(text: str) -> str:
    """Reads the name of a device."""
    if text not in DEVICES:
        raise argparse.ArgumentTypeError(f'{text!r} is none of {", ".join(DEVICES)}')
    return text


def group(text: str) -> Tuple[str, str]:
    """Reads NAME=PATTERN."""
    name, separator, pattern = text.partition('=')
    if not (name and separator and pattern):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATTERN, as in lru='*_lru_*'")
    return name, pattern


def run_folder(text: str) -> str:
    """Reads the path of a run."""
    if not os.path.exists(os.path.expanduser(text)):
        raise argparse.ArgumentTypeError(f'{text}: no such folder or event file')
    return text


def _option(flag: str, default: Any = None, **of_parser: Any) -> Any:
    """A field of ``TrainOptions``: how it is typed, and what argparse is told of it."""
    return field(default=default, metadata={'flag': flag, **of_parser})


@dataclass(frozen=True)
class TrainOptions:
    """What a user asks of one training or evaluation: a field for each option, of which the parsers are made."""
    config: str = _option(
        '--config', default='', metavar='FILE',
        help="a LightZero config file: a path, a name of ours, or a name of LightZero's own zoo, in this order; "
        "lightzero:NAME is LightZero's own. It is Python code, and it will be run")
    max_env_step: Optional[int] = _option(
        '--max-env-step', type=count(1), metavar='N', help='environment steps to stop after; the collection and the '
        'updates under way are completed (default: max_env_step of the config)')
    device: Optional[str] = _option(
        '--device', type=device, metavar='{' + ','.join(DEVICES) + '}', help='auto: the GPU if there is one (default: '
        'what the config says, and the CPU where there is no GPU)')
    threads: Optional[int] = _option(
        '--threads', type=threads, metavar='N', help='CPU threads of torch (default: threads of the config, or '
        "torch's own choice)")
    cache: Optional[str] = _option(
        '--cache', choices=SYSTEMS, help="the cache system; lightzero is the new manager of LightZero's main branch "
        '(default: what the config says)')
    seed: Optional[int] = _option('--seed', type=count(0), metavar='N', help="default: the config's seed, or 0")
    exp_name: Optional[str] = _option(
        '--exp-name', metavar='PATH', help='folder of the experiment; a name that exists gets the time appended '
        '(default: exp_name of the config)')
    max_train_iter: Optional[int] = _option(
        '--max-train-iter', type=count(1), metavar='N', help='training iterations to stop after')
    resume: Optional[str] = _option(
        '--resume', metavar='CKPT', help='go on from a checkpoint of either cache system; steps and iterations go on, '
        'and --max-env-step counts all of them')
    evaluate: Optional[str] = _option(
        '--eval', metavar='CKPT', help='evaluate a checkpoint, and train nothing')
    in_place: bool = _option(
        '--in-place', default=False, action='store_true', help="with --resume: go on in the checkpoint's own folder, "
        'and delete the points after it from the event files; the summary then covers all of the training')
    keep_checkpoints: Optional[int] = _option(
        '--keep-checkpoints', type=count(1), metavar='N', help='keep the newest N checkpoints and the best one '
        '(default: all)')
    overrides: Sequence[str] = _option(
        '--set', default=(), nargs='+', action='extend', metavar='KEY=VALUE',
        help='set any key of the config, a new one as +KEY=VALUE; copies of the value in other keys follow it')

    def __post_init__(self) -> None:
        """Read what was not typed, but given in Python, as the parsers do."""
        for name, option in TRAIN_OPTIONS.items():
            value, choices = getattr(self, name), option.metadata.get('choices')
            if value is None:
                continue
            if choices and value not in choices:
                raise UsageError(f'{name}={value!r} is none of {", ".join(choices)}')
            if 'type' in option.metadata:
                try:
                    object.__setattr__(self, name, reader_of(name)(value))
                except argparse.ArgumentTypeError as error:
                    raise UsageError(f'{name}={error}') from None
        if isinstance(self.overrides, str):
            raise UsageError(f'overrides={self.overrides!r} is no list; give [{self.overrides!r}]')
        if self.resume is not None and self.evaluate is not None:
            raise UsageError(f'resume={self.resume!r} and evaluate={self.evaluate!r} exclude each other; give one')

    @classmethod
    def of(cls, parsed: argparse.Namespace) -> 'TrainOptions':
        """What a parser has read."""
        return cls(**{name: value for name, value in vars(parsed).items()
                      if name in TRAIN_OPTIONS and value is not None})

    def arguments(self) -> List[str]:
        """The command line that says the same."""
        words: List[str] = []
        for name, option in TRAIN_OPTIONS.items():
            value, flag = getattr(self, name), flag_of(name)
            if value == option.default:
                continue
            values = value if 'nargs' in option.metadata else [value]
            # In one word, since a value may begin with '-'.
            words += [flag if each is True else f'{flag}={each}' for each in values]
        return words


TRAIN_OPTIONS = {option.name: option for option in fields(TrainOptions)}


def flag_of(name: str) -> str:
    """How a field of ``TrainOptions`` is typed."""
    return TRAIN_OPTIONS[name].metadata['flag']


def reader_of(name: str) -> Callable[[Any], Any]:
    """What reads and checks the value of a field of ``TrainOptions``."""
    return TRAIN_OPTIONS[name].metadata['type']


def command_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = Parser(prog=COMMAND, description='Trainings with the KV cache of UniZero, and tools around it.')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    _add_train(commands)
    _add_compare(commands)
    _add_experiment(commands)
    _add_info(commands)
    commands.add_parser(
        'zoo', help="our configs and LightZero's", description="List our configs and LightZero's own for UniZero, what "
        'each needs, and whether that is installed here: an environment of each is built.')
    for each in (parser, *commands.choices.values()):
        each.add_argument('--version', action='version', version=version())
    return parser


def _add(parser: Any, *names: str, **more: Any) -> None:
    """Give a parser options of ``TrainOptions``. An option that was not given is None; ``TrainOptions.of`` then uses
    the field's default."""
    for name in names:
        of_parser = {**TRAIN_OPTIONS[name].metadata, **more}
        parser.add_argument(of_parser.pop('flag'), dest=name, default=None, **of_parser)


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        'train', help='train or evaluate a config', epilog=TRAIN_EXAMPLES,
        description='Train a LightZero UniZero config with the old or the new KV cache.')
    _add(parser, 'config', required=True)
    _add(parser, 'overrides', 'max_env_step', 'device', 'threads', 'cache', 'seed', 'exp_name', 'max_train_iter')
    _add(parser.add_mutually_exclusive_group(), 'resume', 'evaluate')
    _add(parser, 'in_place', 'keep_checkpoints')
    parser.add_argument('--verbose', action='store_true', help="show LightZero's own output as well")
    parser.add_argument('--log-level', choices=('info', 'debug'), default='info', help='debug: every miss, eviction, '
                        "clear and growth of the cache, in the run's log file")


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        'compare', help='put runs side by side: a table, curves, a page', epilog=COMPARE_EXAMPLES,
        description='Compare trainings: time, memory, hit rates and rewards, with the spread over seeds and the ratio '
        'to the first side. Prints a table, and writes compare.png, report.html and compare.json.')
    parser.add_argument('runs', nargs='+', type=run_folder, metavar='RUN',
                        help='the folder of an experiment, a folder of several, or an event file of tensorboard')
    parser.add_argument('--out', default='comparison', metavar='DIR', help='where to write (default: %(default)s)')
    parser.add_argument('--group', nargs='+', action='extend', default=[], type=group, metavar='NAME=PATTERN',
                        help='the runs whose name or path matches PATTERN (* and ? stand for anything) are seeds of '
                        'NAME; the first is what the others are compared to (default: runs whose configs differ in '
                        "nothing but seed and name belong together, and the old system's come first)")


def _add_experiment(commands: Any) -> None:
    parser = commands.add_parser(
        'experiment', help='train over cache systems and seeds, and compare', epilog=EXPERIMENT_EXAMPLES,
        description='Train one config for each cache system and seed, each in a process of its own, and compare them. '
        'The same command goes on where it was cut off.')
    add = parser.add_argument
    _add(parser, 'config', required=True)
    _add(parser, 'overrides', 'max_env_step', 'device', 'threads')
    add('--cache', nargs='+', choices=SYSTEMS, default=['old', 'new'], metavar='SYSTEM', dest='caches',
        help="old, new, and lightzero (the new manager of LightZero's main branch), the baseline first (default: "
        'old new)')
    add('--seeds', nargs='+', type=count(0), default=[0, 1, 2], metavar='N', help='default: 0 1 2')
    add('--jobs', type=count(1), default=1, metavar='N', help='runs at once; they share the machine, and so their '
        'times (default: 1)')
    add('--out', metavar='DIR', help='folder of the experiment (default: data_experiment/NAME of the config)')


def _add_info(commands: Any) -> None:
    parser = commands.add_parser(
        'info', help='versions, device, backend; sizes and memory of a config',
        description='Say what is installed, and what the cache of a config will take. The policy of the config is '
        'built on the CPU, without environments.')
    _add(parser, 'config', 'overrides', 'cache')


if __name__ == '__main__':
    sys.exit(main())
