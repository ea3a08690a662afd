"""What a run has come to: its numbers as a table for the terminal and as ``summary.json`` for other programs."""
import datetime
import json
import os
import platform
import sys
from dataclasses import asdict, fields, replace
from typing import Any, Dict, List, Optional, Tuple, Type, TypeVar

import ding
import torch
from easydict import EasyDict

from lzero_kvcache.config import FLAG, OPTIONS

from .status import Evaluation, Result
from .terminal import number_text, rate_text

SUMMARY = 'summary.json'
POOLS = ('total', 'init', 'recur')
T = TypeVar('T', Evaluation, Result)


def cache_type(world_model_cfg: EasyDict) -> str:
    """
    Overview:
        Which cache a config picks.
    Arguments:
        - world_model_cfg (:obj:`EasyDict`): The world model's config.
    Returns:
        - name (:obj:`str`): 'old', 'new', or the name of a registered manager.
    """
    if not world_model_cfg.get(FLAG, False):
        return 'old'
    return (world_model_cfg.get(OPTIONS) or {}).get('type') or 'new'


def hit_rate(counters: Dict[str, Any], pool: str) -> Optional[float]:
    """
    Overview:
        The share of look-ups that found something.
    Arguments:
        - counters (:obj:`Dict[str, Any]`): As from ``lightzero.cache_counters``.
        - pool (:obj:`str`): 'init', 'recur' or 'total'.
    Returns:
        - rate (:obj:`Optional[float]`): None before the first look-up.
    """
    pool_counters = counters.get(pool) or {}
    queries = pool_counters.get('queries')
    return pool_counters.get('hits', 0) / queries if queries else None


def peak_host_memory_mb() -> Optional[float]:
    """
    Overview:
        The most memory that this process has held.
    Returns:
        - megabytes (:obj:`Optional[float]`): None where the system does not tell.
    """
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024. ** 2 if sys.platform == 'darwin' else 1024.)


def peak_device_memory_mb() -> Optional[float]:
    """
    Overview:
        The most memory that torch has held on the GPU.
    Returns:
        - megabytes (:obj:`Optional[float]`): None if no GPU was used.
    """
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return torch.cuda.max_memory_allocated() / 1024. ** 2


def machine() -> Dict[str, Any]:
    """
    Overview:
        What two runs must share for their speeds to be comparable.
    Returns:
        - machine (:obj:`Dict[str, Any]`): Processor, GPU, threads and versions.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(
        system=platform.system(), processor=platform.machine(), cpus=os.cpu_count(), threads=torch.get_num_threads(),
        gpu=gpu, python=platform.python_version(), torch=torch.__version__, ding=ding.__version__,
    )


def summary_rows(result: Result) -> List[Tuple[str, str]]:
    """
    Overview:
        The table at the end of a run.
    Arguments:
        - result (:obj:`Result`): The run.
    Returns:
        - rows (:obj:`List[Tuple[str, str]]`): Names and values.
    """
    def megabytes(value: Optional[float]) -> str:
        return '-' if value is None else f'{number_text(value)} MiB'

    last = result.evaluations[-1] if result.evaluations else None
    reward = '- (no evaluation yet; policy.eval_freq says how often)'
    if last is not None:
        reward = f'{number_text(last.reward)} after {last.env_step:,} steps'
    rates = '  '.join(f'{pool} {rate_text(result.hit_rates.get(pool))}' for pool in POOLS)
    skipped = result.counters.get('skipped')
    return [
        ('cache system', result.cache),
        *([('processes', str(result.processes))] if result.processes > 1 else []),
        ('time', str(datetime.timedelta(seconds=round(result.seconds)))),
        ('environment steps', f'{result.env_step:,}'),
        ('training iterations', f'{result.train_iter:,}'),
        ('steps per second', number_text(result.env_steps_per_second)),
        ('peak memory, host', megabytes(result.host_memory_mb)),
        ('peak memory, device', megabytes(result.device_memory_mb)),
        ('cache memory', megabytes(result.cache_memory_mb)),
        ('hit rates', rates),
        *([('skipped for nan or inf', f'{skipped:,} rows')] if skipped else []),
        ('last reward', reward),
        ('best reward', number_text(result.best_reward)),
        ('event files', result.event_files),
        ('checkpoint', result.checkpoint or '-'),
        ('log', result.log_file or '-'),
    ]


def write_summary(result: Result) -> str:
    """
    Overview:
        Leave the run's numbers in its folder.
    Arguments:
        - result (:obj:`Result`): The run.
    Returns:
        - path (:obj:`str`): The file.
    """
    path = os.path.join(result.exp_name, SUMMARY)
    temporary = path + '.tmp'
    with open(temporary, 'w', encoding='utf-8') as file:
        json.dump(asdict(result), file, indent=2, default=str)
    os.replace(temporary, path)
    return path


def read_summary(exp_name: str) -> Optional[Result]:
    """
    Overview:
        What ``write_summary`` left.
    Arguments:
        - exp_name (:obj:`str`): The run's folder.
    Returns:
        - result (:obj:`Optional[Result]`): None if there is no summary, or no whole one.
    """
    try:
        with open(os.path.join(exp_name, SUMMARY), encoding='utf-8') as file:
            held = json.load(file)
        held['evaluations'] = [_known(Evaluation, evaluation) for evaluation in held.get('evaluations', [])]
        result = _known(Result, held)
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return result if isinstance(result.exit_code, int) else None


def _known(kind: Type[T], held: Dict[str, Any]) -> T:
    """What another version wrote: its fields that are unknown here are left out, those that it lacks have defaults."""
    return kind(**{field.name: held[field.name] for field in fields(kind) if field.name in held})


def add_up(before: Result, after: Result) -> Result:
    """
    Overview:
        The result of a training that was cut off and went on.
    Arguments:
        - before (:obj:`Result`), after (:obj:`Result`): Of its two parts.
    Returns:
        - result (:obj:`Result`): What adds up is added up; the rest is the second part's.
    """
    parts = (before, after)
    seconds = before.seconds + after.seconds
    steps = sum((part.env_steps_per_second or 0.) * part.seconds for part in parts)
    counters = dict(after.counters)
    for pool in POOLS:
        if pool in before.counters and pool in after.counters:
            earlier, later = before.counters[pool], after.counters[pool]
            counters[pool] = {
                name: value if name == 'occupancy' else value + earlier.get(name, 0) for name, value in later.items()
            }

    def most(name: str) -> Optional[float]:
        return max((getattr(part, name) for part in parts if getattr(part, name) is not None), default=None)

    return replace(
        after, seconds=seconds, env_steps_per_second=steps / seconds if steps else None,
        host_memory_mb=most('host_memory_mb'), device_memory_mb=most('device_memory_mb'),
        counters=counters, hit_rates={pool: hit_rate(counters, pool) for pool in POOLS},
        last_reward=before.last_reward if after.last_reward is None else after.last_reward,
        best_reward=most('best_reward'), evaluations=before.evaluations + after.evaluations,
    )
