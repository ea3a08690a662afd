"""Trainings by ``train.py`` in forks of this process, which has the libraries imported, and event files read back."""
import contextlib
import gc
import importlib
import json
import os
import socket
import subprocess
import threading
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Callable, List, Tuple

import torch
from forks import import_what_compiling_imports, in_forks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lzero_kvcache.telemetry import METRICS, POOLS
from lzero_kvcache_options import main

PROJECT_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WM = 'policy.model.world_model_cfg'
ITERATIONS = 3
# LightZero's loss is no number where each sample of a batch is the last step of its episode: 4 of 2 episodes cannot be.
BATCH = 'policy.batch_size=4'
SMALL = [
    '--threads', '1', '--device', 'cpu', '--exp-name', 'run', '--max-train-iter', str(ITERATIONS), '--set',
    'create_config.env_manager.type=base', 'env.collector_env_num=2', 'env.evaluator_env_num=1',
    'policy.num_simulations=2', BATCH, f'policy.update_per_collect={ITERATIONS}',
    f'{WM}.embed_dim=32', f'{WM}.num_layers=1', f'{WM}.num_heads=2',
]
EPISODE = 40  # steps; the time limit of gymnasium's environments


def train(arguments: List[str]) -> int:
    """``train.py``."""
    return main(['train', *arguments])


def trained(folder: Any, arguments: List[str], *prepare: Callable[[], None]) -> List[Tuple[int, str]]:
    """The exit code and the output of each of several processes, one for each function that is called in it first."""

    def run(name: str, prepare: Callable[[], None]) -> int:
        os.chdir(str(folder))
        with open(name, 'w', encoding='utf-8', buffering=1) as printed, contextlib.redirect_stdout(
                printed), contextlib.redirect_stderr(printed):
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            prepare()
            return train(arguments)

    names = [f'printed{rank}' for rank in range(len(prepare))]
    codes = in_forks({name: partial(run, name, function) for name, function in zip(names, prepare)})
    return [(codes[name], (folder / name).read_text(encoding='utf-8')) for name in names]


def trained_by_two(folder: Any, arguments: List[str], prepare: Callable[[int], None]) -> List[Tuple[int, str]]:
    """The same of two processes as torchrun starts them; ``prepare`` is called in each with its rank."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]

    def begin(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2',
                          MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
        prepare(rank)

    return trained(folder, arguments, partial(begin, 0), partial(begin, 1))


def short_episodes() -> None:
    """What makes a training one of seconds, in a fork, so that nothing of it is left to other tests."""
    torch.set_num_threads(1)
    import gymnasium
    from yapf.yapflib import yapf_api
    yapf_api.FormatCode = lambda text: (text, True)  # indenting the saved config would take seconds
    for spec in gymnasium.registry.values():
        spec.max_episode_steps = EPISODE


def when(condition: Callable[[], bool], action: Callable[[], Any]) -> threading.Thread:
    """Do something in another thread as soon as a condition holds."""

    def wait() -> None:
        deadline = time.monotonic() + 600
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def said_by(process: subprocess.Popen, folder: Path, patience: float = 240.) -> str:
    """What a process prints until it ends, which may take any time as long as files below a folder change."""
    newest, changed = 0., time.monotonic()
    while True:
        try:
            return process.communicate(timeout=1)[0]
        except subprocess.TimeoutExpired:
            times = [0.]
            for path in folder.rglob('*'):
                with contextlib.suppress(FileNotFoundError):  # a temporary one
                    times.append(path.stat().st_mtime)
            if max(times) > newest:
                newest, changed = max(times), time.monotonic()
            if time.monotonic() > changed + patience:
                process.kill()
                raise


@lru_cache(maxsize=None)
def import_what_trainings_import() -> None:
    """With the first optimizer, model, environment and compiled function; here, once for all forks."""
    for module in ('torch._dynamo', 'torch._inductor.compile_fx', 'lzero_kvcache.cli.commands',
                   'lzero_kvcache.search.compiled_search', 'zoo.classic_control.cartpole.envs.cartpole_lightzero_env'):
        importlib.import_module(module)
    import_what_compiling_imports()
    gc.freeze()  # or forks would copy all of it when they collect garbage


def summary_of(folder: Any) -> Any:
    return json.loads((folder / 'summary.json').read_text())


def events_in(folder: Any) -> EventAccumulator:
    """All of a folder's event files."""
    events = EventAccumulator(str(folder), size_guidance=dict(scalars=0, tensors=0))
    events.Reload()
    return events


def scalars(folder: Any, tag: str) -> Any:
    return events_in(folder / 'log' / 'serial').Scalars(tag)


def check_run(folder: Any, cache: str) -> Any:
    """A point under every tag of the cache at every iteration, and a summary that fits; returns the summary."""
    summary = summary_of(folder)
    assert (summary['cache'], summary['train_iter']) == (cache, ITERATIONS)
    events = events_in(folder / 'log' / 'serial')
    tags = {tag for tag in events.Tags()['scalars'] if tag.startswith('kv_cache_iter/')}
    metrics = [metric for metric in METRICS if cache != 'old' or metric not in ('evictions', 'occupancy')]
    names = [f'{pool}_{metric}' for pool in POOLS for metric in metrics]
    assert tags >= {f'kv_cache_iter/{name}' for name in [*names, 'memory_mb', 'search_ms', 'step_ms']}
    for tag in tags:
        assert [point.step for point in events.Scalars(tag)] == list(range(ITERATIONS)), tag
    for pool in ('init', 'recur'):
        queries = events.Scalars(f'kv_cache_iter/{pool}_queries')[-1].value
        assert 0 < queries <= summary['counters'][pool]['queries']
        assert events.Scalars(f'kv_cache_iter/{pool}_hits')[-1].value <= queries
    if cache != 'old':
        assert summary['hit_rates'] == dict(init=1., recur=1., total=1.)
    return summary
