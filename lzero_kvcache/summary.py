"""The numbers of a run: while it goes on, in its ``progress.json``, and when it has ended, in its ``summary.json``."""
import contextlib
import datetime
import os
import platform
import resource
import subprocess
import sys
import uuid
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from typing import Any, Dict, List, Optional

import ding
import torch

from .run_files import POOLS, PROGRESS, SUMMARY, TRAIN, read_if_whole, read_said, write_json
from .text import time_text


@dataclass
class Evaluation:
    """One evaluation: when it took place, its mean episode return, the standard deviation, and of how many episodes."""
    env_step: int
    train_iter: int
    reward: float
    deviation: Optional[float] = None
    episodes: Optional[int] = None


@dataclass
class Segment:
    """The command and overrides of a part of a training that went on in place."""
    command: List[str] = field(default_factory=list)
    overrides: List[str] = field(default_factory=list)


@dataclass
class Result:
    """
    A run as far as it is, and ``summary.json`` in its folder when it has ended. ``env_step`` steps are trained on, of
    ``collected_env_step``. The first fields say which run it is and whether it is done; each field after them has a
    default, for summaries of versions that did not have it.
    """
    exit_code: Optional[int]  # None until it has ended
    task: str
    cache: str
    seed: int
    outcome: str = ''
    exp_name: str = ''
    config: str = ''
    entry: str = ''
    device: str = ''
    max_env_step: Optional[int] = None
    max_train_iter: Optional[int] = None
    env_step: int = 0
    collected_env_step: int = 0
    train_iter: int = 0
    seconds: float = 0.0
    env_steps_per_second: Optional[float] = None
    host_memory_mb: Optional[float] = None
    device_memory_mb: Optional[float] = None
    cache_memory_mb: Optional[float] = None
    hit_rates: Dict[str, Optional[float]] = field(default_factory=dict)
    counters: Dict[str, Any] = field(default_factory=dict)
    loss: Optional[float] = None
    last_reward: Optional[float] = None
    best_reward: Optional[float] = None
    evaluations: List[Evaluation] = field(default_factory=list)
    event_files: str = ''
    checkpoint: Optional[str] = None
    log_file: Optional[str] = None
    processes: int = 1
    machine: Dict[str, Any] = field(default_factory=dict)
    versions: Dict[str, str] = field(default_factory=dict)
    command: List[str] = field(default_factory=list)
    overrides: List[str] = field(default_factory=list)
    earlier: List[Segment] = field(default_factory=list)  # parts before the last, which command and overrides are of
    started: str = ''
    ended: str = ''
    resumed_at: List[int] = field(default_factory=list)  # env steps where it went on with an empty replay buffer
    run_id: str = ''  # of all of a training in one folder, and of its copies; none of earlier versions

    @property
    def steps_at_the_end(self) -> Optional[int]:
        """Environment steps after which it is to end; estimated, where it is iterations that end it."""
        ends = [] if self.max_env_step is None else [self.max_env_step]
        if self.max_train_iter is not None and self.train_iter and self.collected_env_step:
            ends.append(round(self.collected_env_step * max(1., self.max_train_iter / self.train_iter)))
        return min(ends, default=None)

    def count(self, counters: Dict[str, Any]) -> None:
        """Take a manager's counts, and compute hit rates from them: of all look-ups, and of each pool."""
        self.counters = counters
        counts = {pool: counters.get(pool) or {} for pool in ('total', *(pool for pool in POOLS if pool != 'total'))}
        self.hit_rates = {pool: held.get('hits', 0) / held['queries'] if held.get('queries') else None
                          for pool, held in counts.items()}

    def at_its_end(self, counters: Dict[str, Any], **known: Any) -> 'Result':
        """This result at the end of the run, with the memory of this process and its caches."""
        result = replace(
            self, cache_memory_mb=counters.get('memory_mb'), host_memory_mb=peak_host_memory_mb(),
            device_memory_mb=peak_device_memory_mb(), machine=machine(), ended=moment(), **known)
        result.count(counters)
        return result

    def line(self, phase: str) -> str:
        """Steps that are trained on and those collected since, of all; how long it has left; how it does."""
        steps = f'{self.env_step:,}+{self.collected_env_step - self.env_step:,}'
        total, speed = self.steps_at_the_end, self.env_steps_per_second
        if total is not None:
            steps += f'/{total:,} ({min(1., self.collected_env_step / total):.0%})'
            if speed:
                left = max(0, total - self.collected_env_step)
                steps += f', {time_text(left / speed)} left' if left else ', the last updates' * (phase == 'train')
        rewards = f'reward {number_text(self.last_reward)}, best {number_text(self.best_reward)}'
        rate = rate_text(self.hit_rates.get('total'))
        loss = '' if self.loss is None else f'  loss {self.loss:.3g}'
        return f'{phase:<8} {steps}  {rewards}{loss}  hit rate {rate}  {number_text(speed)} steps/s on {self.device}'

    def write(self, path: Optional[str] = None) -> None:
        """Leave the numbers in the run's folder, or elsewhere."""
        write_json(path or os.path.join(self.exp_name, SUMMARY), asdict(self))

    def write_progress(self, phase: str, **known: Any) -> None:
        """
        Write the numbers so far into the run's folder; they are the only record if the run is killed. If the disk is
        full, its event files will tell.
        """
        with contextlib.suppress(OSError):
            write_json(os.path.join(self.exp_name, PROGRESS), dict(asdict(self), phase=phase, **known))


def begun(seed: int = 0, task: str = TRAIN, **known: Any) -> Result:
    """A run of this process that begins now."""
    program = os.path.basename(sys.argv[0])
    if program in ('__main__.py', 'lzero_kvcache_options.py'):  # python -m
        program = 'lzero-kvcache'
    command = [program, *sys.argv[1:]]
    return Result(None, task, '', seed, versions=versions(), started=moment(), command=command,
                  run_id=uuid.uuid4().hex, **known)


def peak_host_memory_mb() -> float:
    """The most MiB that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024. ** 2 if sys.platform == 'darwin' else 1024.)


def peak_device_memory_mb() -> Optional[float]:
    """The most MiB that torch has held on the GPU; None if no GPU was used."""
    return torch.cuda.max_memory_allocated() / 1024. ** 2 if torch.cuda.is_initialized() else None


def machine() -> Dict[str, Any]:
    """Hardware and versions, in which runs must agree for their speeds to be comparable."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return dict(
        cpu=_cpu_name(),
        system=platform.system(), processor=platform.machine(), cpus=os.cpu_count(), threads=torch.get_num_threads(),
        gpu=', '.join(gpus) or None, python=platform.python_version(), torch=torch.__version__,
        ding=ding.__version__,
    )


def _cpu_name() -> str:
    """As Linux says it, or what Python knows elsewhere."""
    with contextlib.suppress(OSError), open('/proc/cpuinfo', encoding='utf-8') as file:
        for line in file:
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor()


def version_of(distribution: str) -> str:
    """The version of an installed package."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return 'not installed as a package'


def versions() -> Dict[str, str]:
    """Versions of a run's libraries, and the commit if this package is in a clone."""
    known = {name: version_of(name) for name in ('lzero_kvcache', 'LightZero', 'DI-engine', 'torch')}
    clone = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if os.path.exists(os.path.join(clone, '.git')):
        with contextlib.suppress(OSError):
            # It takes no lock that somebody at work in the clone might need, and names no tag.
            said = subprocess.run(
                ['git', '--no-optional-locks', '-C', clone, 'describe', '--always', '--dirty', '--exclude', '*'],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding='utf-8', check=False)
            known['commit'] = said.stdout.strip()
    return known


def moment() -> str:
    """Now, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')


def read_progress(exp_name: str) -> Dict[str, Any]:
    """How far a run is, or was when it was killed; empty if it has not said so."""
    return read_if_whole(os.path.join(exp_name, PROGRESS))


def read_summary(exp_name: str) -> Optional[Result]:
    """The summary in a run's folder, of whichever version; None if there is none, or no whole one."""
    return read_result(os.path.join(exp_name, SUMMARY))


def read_result(path: str) -> Optional[Result]:
    """The result that a file holds; None if there is none, or no whole one."""
    try:
        held = read_said(path)
        for name, kind in (('evaluations', Evaluation), ('earlier', Segment)):
            held[name] = [_known(kind, part) for part in held.get(name, [])]
        return _known(Result, held)
    except (OSError, ValueError, TypeError):
        return None


def _known(kind: type, held: Dict[str, Any]) -> Any:
    """An object that another version wrote, without unknown fields; missing ones have their defaults."""
    return kind(**{field.name: held[field.name] for field in fields(kind) if field.name in held})


def add_up(before: Result, after: Result) -> Result:
    """The result of a training that was cut off and went on, from its two parts."""
    parts = (before, after)

    def most(name: str) -> Optional[float]:
        return max((getattr(part, name) for part in parts if getattr(part, name) is not None), default=None)

    seconds = before.seconds + after.seconds
    steps = sum((part.env_steps_per_second or 0.) * part.seconds for part in parts)
    result = replace(
        after, seconds=seconds, env_steps_per_second=steps / seconds if steps else None,
        host_memory_mb=most('host_memory_mb'), device_memory_mb=most('device_memory_mb'),
        last_reward=before.last_reward if after.last_reward is None else after.last_reward,
        best_reward=most('best_reward'), evaluations=before.evaluations + after.evaluations,
        earlier=[*before.earlier, Segment(before.command, before.overrides), *after.earlier],
        started=before.started or after.started, resumed_at=before.resumed_at + after.resumed_at,
    )
    counters = dict(after.counters)
    for name in {'skipped', 'captures'} & set(before.counters) & set(after.counters):
        counters[name] += before.counters[name]
    for pool in set(POOLS) & set(before.counters) & set(after.counters):
        earlier, later = before.counters[pool], after.counters[pool]
        counters[pool] = {
            name: value if name == 'occupancy' else value + earlier.get(name, 0) for name, value in later.items()
        }
    result.count(counters)
    return result


def reward_text(evaluation: Evaluation) -> str:
    """As ``57.3 ± 4.1 over 8 episodes``: mean and standard deviation, where there are both."""
    if evaluation.deviation is None or evaluation.episodes == 1:
        return number_text(evaluation.reward)
    return (f'{number_text(evaluation.reward)} ± {number_text(evaluation.deviation)} over {evaluation.episodes} '
            'episodes')


def rate_text(rate: Optional[float]) -> str:
    """A share as ``87.5%``; ``-`` for None."""
    return '-' if rate is None else f'{rate:.1%}'


def number_text(number: Optional[float]) -> str:
    """A number as ``1,234.5``; ``-`` for None."""
    return '-' if number is None else f'{number:,.1f}'
