"""Resident memory of a training over its environment steps: train.py in a process of its own, watched from outside.

    python benchmarks/training_memory.py --config cartpole_unizero_config --max-env-step 2000 --exp-name watched

All options are those of train.py; --exp-name is needed to find what was written.
"""
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Dict, List, Sequence, Tuple

from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SECONDS = 0.5
ROWS = 10
CACHE = 'kv_cache_step/memory_mb'
BUFFER = 'Buffer/memory_usage/game_segment_buffer'  # LightZero's own, MiB


def resident_mb(root: int) -> float:
    """MiB of a process and of all that it has started; pages that several share are counted once for each."""
    parents: Dict[int, int] = {}
    for name in filter(str.isdigit, os.listdir('/proc')):
        try:
            parents[int(name)] = int(Path('/proc', name, 'stat').read_text().rsplit(')', 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    family = [root]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    pages = 0
    for member in family:
        try:
            pages += int(Path('/proc', str(member), 'statm').read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError, IndexError):
            continue
    return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


def watch(arguments: Sequence[str]) -> List[Tuple[float, float]]:
    """Train, and sample (wall time, MiB)."""
    process = subprocess.Popen([sys.executable, '-m', 'lzero_kvcache_options', 'train', *arguments])
    samples = []
    while process.poll() is None:
        samples.append((time.time(), resident_mb(process.pid)))
        time.sleep(SECONDS)
    if process.returncode:
        sys.exit(process.returncode)
    return samples


def report(samples: List[Tuple[float, float]], folder: str) -> None:
    """What was resident in each tenth of the environment steps, and what of it the replay buffer and the cache had."""
    events = EventAccumulator(os.path.join(folder, 'log', 'serial'), size_guidance={'scalars': 0})
    events.Reload()
    points = events.Scalars(CACHE)
    last = points[-1].step
    columns = 'environment steps', 'resident MiB, median', 'most', 'replay buffer', 'median without it', 'the cache'
    table = Table(*columns, title='Memory of a training')
    for row in range(ROWS):
        low, high = last * row // ROWS, last * (row + 1) // ROWS
        here = [point for point in points if low < point.step <= high]
        if not here:
            continue
        begin, end = here[0].wall_time - SECONDS, here[-1].wall_time + SECONDS
        resident = [mb for moment, mb in samples if begin <= moment <= end]
        buffer = [point.value for point in events.Scalars(BUFFER) if point.wall_time <= end]
        if resident:
            numbers = median(resident), max(resident), buffer[-1], median(resident) - buffer[-1]
            table.add_row(f'{here[0].step} to {here[-1].step}', *(f'{number:.0f}' for number in numbers),
                          f'{here[-1].value:.1f}')
    Console(width=110).print(table)


def main() -> None:
    arguments = sys.argv[1:]
    if '--exp-name' not in arguments or '--config' not in arguments:
        sys.exit(__doc__)
    folder = arguments[arguments.index('--exp-name') + 1]
    if os.path.exists(folder):
        sys.exit(f'--exp-name {folder}: there is one already')
    report(watch(arguments), folder)


if __name__ == '__main__':
    main()
