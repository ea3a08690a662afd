"""
Memory over a long run: look-ups by hand in pools under pressure, and whole searches with episodes that end. Prints the
curve as a table, and how fast memory grows.

    python benchmarks/soak.py --json soak.json
"""
import argparse
import contextlib
import gc
import io
import logging
import statistics
import sys
from typing import Any, Dict, Iterator, List

import numpy as np
import psutil
import torch
import usage
from common import PRESETS, build_models, parser, report

from lzero_kvcache import KVCacheManager
from lzero_kvcache.cache.base import COLLECT, EVAL
from lzero_kvcache.cache.pages import extend

MIB = 1024 * 1024


def sample(work: str, done: int, device: str, manager: Any) -> Dict[str, Any]:
    """Memory now."""
    gc.collect()
    return {
        'work': work, 'done': done, 'host RSS, MiB': psutil.Process().memory_info().rss / MIB,
        'python, 1,000 blocks': sys.getallocatedblocks() / 1000,
        'device, MiB': torch.cuda.memory_allocated() / MIB if device == 'cuda' else 0.0,
        'pages in use': manager.pages_used, 'cache, MiB': manager.memory_mb,
    }


def look_ups(manager: KVCacheManager, count: int, batch: int = 8) -> Iterator[int]:
    """Root steps of random environments and keys, look-ups counted, with an end of an episode now and then."""
    random = np.random.default_rng(0)
    done = 0
    while done < count:
        env_ids = random.permutation(manager.env_num)[:batch].tolist()
        mode = COLLECT if random.random() < 0.9 else EVAL
        last, keys = random.integers(0, 200, (2, len(env_ids))).tolist()
        with manager.lease() as lease:
            pages = lease.allocate(len(env_ids))
            roots = manager.find_init(mode, env_ids, last)
            manager.store_init(mode, env_ids, keys, extend(roots, pages))
            nodes = manager.find_recur(mode, env_ids, keys)
            manager.store_recur(env_ids, last, extend(nodes, lease.allocate(len(env_ids))))
        done += 2 * len(env_ids)
        if random.random() < 0.02:
            manager.clear_init_caches(mode, env_ids[0])
        yield done


def searches(world_model: Any, observation_shape: Any, count: int, rows: int, simulations: int,
             device: str) -> Iterator[int]:
    """Searches by node of environments whose episodes end at different times; weights change now and then."""
    random = np.random.default_rng(0)
    shape = (rows, *((observation_shape, ) if isinstance(observation_shape, int) else observation_shape))
    timesteps = np.zeros(rows, dtype=np.int64)
    last = torch.zeros(shape, device=device)
    actions = [-1] * rows
    for done in range(1, count + 1):
        current = torch.randn(shape, device=device)
        mode = EVAL if done % 10 == 0 else COLLECT
        with torch.no_grad(), world_model.open_step(mode, range(rows)) as step:
            world_model.forward_initial_inference(
                {'obs': last, 'action': actions, 'current_obs': current}, timesteps.tolist()
            )
            with world_model.inference.search_by_node(step, simulations) as expand:
                for simulation in range(simulations):
                    path = random.integers(0, simulation + 1, rows)
                    expand(simulation, path, np.arange(rows), random.integers(0, 2, rows), [1] * rows)
        timesteps += 1
        last, actions = current, random.integers(0, 2, rows).tolist()
        for row in np.flatnonzero(random.random(rows) < 0.02).tolist():
            actions[row], timesteps[row] = -1, 0
            world_model.forget(COLLECT, row)
        if done % 70 == 0:
            world_model.weights_changed('soak')
        yield done


def curve(work: str, progress: Iterator[int], total: int, samples: int, device: str,
          manager: Any) -> List[Dict[str, Any]]:
    """Memory at equal distances."""
    rows: List[Dict[str, Any]] = []
    for done in progress:
        if done >= total * (len(rows) + 1) / samples:
            rows.append(sample(work, done, device, manager))
    return rows


def growth(rows: List[Dict[str, Any]], column: str) -> float:
    """How much a column grows over the second half: the median of its end less the median of its middle."""
    values = [row[column] for row in rows]
    half, part = len(values) // 2, max(1, len(values) // 5)
    return statistics.median(values[-part:]) - statistics.median(values[half:half + part])


def soak(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Both curves."""
    logging.getLogger('lzero_kvcache').setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        world_model = build_models(args, args.envs, args.simulations)['new'].world_model
    manager = KVCacheManager(dict(
        num_layers=args.layers, num_heads=2, embed_dim=64, context_length=args.context, env_num=args.envs,
        num_simulations=args.simulations, kv_cache_cfg=dict(init_pool_size=50, eviction=args.eviction),
    ))
    rows = curve('look-ups', look_ups(manager, args.look_ups), args.look_ups, args.samples, args.device, manager)
    shape = PRESETS[args.model]['model']['observation_shape']
    running = searches(world_model, shape, args.searches, args.envs, args.simulations, args.device)
    rows += curve('searches', running, args.searches, args.samples, args.device, world_model.kv_cache_manager)
    return rows


def options() -> argparse.ArgumentParser:
    """What a soak can be told."""
    options = parser(__doc__)
    options.add_argument('--envs', type=int, default=8)
    options.add_argument('--simulations', type=int, default=10)
    options.add_argument('--look-ups', type=int, default=200_000)
    options.add_argument('--searches', type=int, default=2_000)
    options.add_argument('--samples', type=int, default=20)
    options.add_argument('--eviction', choices=('fifo', 'lru', 'priority'), default='fifo')
    return options


def main() -> None:
    args = options().parse_args()
    rows = soak(args)
    report('Memory over a long run', rows, args)
    for work in ('look-ups', 'searches'):
        part = [row for row in rows if row['work'] == work]
        columns = [column for column in part[0] if column.endswith(('MiB', 'blocks'))]
        numbers = '; '.join(f'{column}: {growth(part, column):+.2f}' for column in columns)
        print(f'growth over the second half of the {work}: {numbers}')


if __name__ == '__main__':
    usage.run(main)
