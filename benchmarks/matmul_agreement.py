"""What ``kv_cache_cfg.matmul`` costs in agreement and brings in time: each search of collect steps again with the other
products, from the same roots and contexts, with the same noise and draws. Weights and observations are random.

    python benchmarks/matmul_agreement.py --device cuda --model atari --envs 8 64 256 --simulations 50
"""
import contextlib
import io
from functools import partial
from typing import Any, Dict, List
from unittest import mock

import numpy as np
import usage
from collect_step import build_policies, collect, fill, preset_configs
from common import median, parser, report, timed

from lzero_kvcache.config import KV_CACHE_CFG
from lzero_kvcache.search.array_search import Found
from lzero_kvcache.search.gpu_search import GpuSearch
from lzero_kvcache_options import UsageError

EXACT, *OTHERS = KV_CACHE_CFG['matmul'].choices


def main() -> None:
    options = parser(__doc__)
    options.add_argument('--envs', type=int, nargs='+', default=[8, 64])
    options.add_argument('--simulations', type=int, default=50)
    args = options.parse_args()
    if args.device == 'cpu':
        raise UsageError('--device cpu: a CPU multiplies in float32 alone; use cuda')
    rows: List[Dict[str, Any]] = []
    for envs in args.envs:
        configs = preset_configs(args, envs)
        policy = build_policies({name: configs[name] for name in ('old', 'new')}, args.device)['new']
        rows += compare(policy, envs, args)
    report(f'{args.model}, {args.simulations} simulations, {args.device}', rows, args)


def compare(policy: Any, envs: int, args: Any) -> List[Dict[str, Any]]:
    """A row for each way to multiply."""
    world_model = policy._model.world_model
    inference = world_model.inference
    searches = {matmul: GpuSearch(inference.shared, matmul) for matmul in (EXACT, *OTHERS)}
    found: Dict[str, List[Any]] = {matmul: [] for matmul in searches}
    times: Dict[str, List[float]] = {matmul: [] for matmul in searches}

    def search_all(step: Any, problem: Any) -> Any:
        for matmul, search in searches.items():
            result, milliseconds = timed(partial(search.search, step, problem), args.device)
            found[matmul].append(result[:2])
            times[matmul].append(milliseconds)
        return Found(*found[EXACT][-1])

    with contextlib.redirect_stdout(io.StringIO()):
        fill({'new': policy}, envs, world_model.context_length // 2)
        with mock.patch.object(inference.in_arrays, 'search', search_all):
            collect({'new': policy}, envs, 1 + 4 * args.repeats, first=world_model.context_length // 2)
    return [{'envs': envs, 'matmul': matmul, 'search ms': median(times[matmul][1:]),
             **agreement(found[EXACT][1:], found[matmul][1:])} for matmul in searches]


def agreement(exact: List[Any], other: List[Any]) -> Dict[str, float]:
    """How much of the visits is the same, how often the most visited action, and how far values are apart."""
    visits, values = (np.array(part, np.float64) for part in zip(*exact))
    others, other_values = (np.array(part, np.float64) for part in zip(*other))
    apart = np.abs(values - other_values)
    return {
        'same visits %': 100 * (1 - np.abs(visits - others).sum() / (2 * visits.sum())),
        'same best action %': 100 * float((visits.argmax(-1) == others.argmax(-1)).mean()),
        'value apart, median': float(np.median(apart)), 'value apart, most': float(apart.max()),
        'spread of values': float(values.std()),
    }


if __name__ == '__main__':
    usage.run(main)
