"""Long contexts: collect steps of LightZero's Memory config at several context lengths, old against new.

    python benchmarks/long_context.py --contexts 8 20 64 128 512

Contexts are full when the measurement begins, or filled to the shares that --filled names. A second table says where
the time of a collect step goes, by the operations that torch ran; the rest is Python, in the old system mostly copies
of containers, and smaller operations.
"""
import contextlib
import io
import time
from typing import Any, Dict, List

import usage
from collect_step import build_policies, collect, measure, zoo_configs
from common import report
from torch.profiler import ProfilerActivity, profile

from lzero_kvcache.config import KV_CACHE_CFG
from lzero_kvcache.engine.slab import MIB

CONFIG = 'memory_unizero_config'
# Of torch's operations: which belong together. Names are those of a profile on a CPU.
KINDS = {
    'copies': ('index_select', 'index', 'copy_', 'cat', 'clone', 'stack', 'index_put_', 'zero_', 'fill_'),
    'sums': ('add', 'add_', 'sub', 'sub_'),
    'attention': ('_scaled_dot_product_flash_attention_for_cpu', 'scaled_dot_product_attention', 'bmm', 'baddbmm',
                  '_softmax', 'masked_fill', 'masked_fill_', 'mul'),
    'products': ('addmm', 'mm', 'linear', 'matmul'),
}


def where(policy: Any, envs: int, first: int) -> Dict[str, float]:
    """Shares of one collect step in percent, by kind of operation."""
    with contextlib.redirect_stdout(io.StringIO()), profile(activities=[ProfilerActivity.CPU]) as record:
        begin = time.perf_counter()
        collect({'one': policy}, envs, 1, first=first)
        whole = 1e6 * (time.perf_counter() - begin)
    spent = {event.key.replace('aten::', ''): event.self_cpu_time_total for event in record.key_averages()}
    shares = {kind: 100 * sum(spent.get(name, 0.0) for name in names) / whole for kind, names in KINDS.items()}
    return {**shares, 'rest': 100 - sum(shares.values())}


def used_mb(policy: Any) -> float:
    """MiB of the pages that hold contexts; the others wait for root contexts to come."""
    manager = policy._model.world_model.kv_cache_manager
    return manager.pages_used * manager.store.slab.page_bytes / MIB


def main() -> None:
    options = usage.parser(__doc__)
    options.add_argument('--contexts', type=int, nargs='+', default=[8, 20, 64, 128, 512], help='context_length')
    options.add_argument('--filled', type=float, nargs='+', default=[1.0], help='shares of the contexts in use')
    options.add_argument('--envs', type=int, default=8)
    options.add_argument('--simulations', type=int, default=25)
    options.add_argument('--repeats', type=int, default=1, help='four collect steps each')
    options.add_argument('--backend', choices=KV_CACHE_CFG['backend'].choices, default='auto', help='of the new system')
    options.add_argument(
        '--matmul', choices=KV_CACHE_CFG['matmul'].choices, default='float32', help='of the new system, on a GPU')
    options.add_argument('--json', metavar='FILE', help='also write the numbers there')
    args = options.parse_args()
    rows: List[Dict[str, Any]] = []
    shares: List[Dict[str, Any]] = []
    for context in args.contexts:
        blocks = max(context // 2, 2)
        policies = build_policies(zoo_configs(
            CONFIG, args, args.envs, context_length=context, max_blocks=blocks, max_tokens=2 * blocks), args.device)
        for filled in args.filled:
            row = measure(policies, args.envs, 4 * args.repeats, filled)
            tokens = int(filled * context)
            rows.append({'context': context, 'tokens': tokens, **row, 'of it used': used_mb(policies['new'])})
            print(rows[-1], flush=True)
            first = tokens // 2 + 1 + 4 * args.repeats
            for name, policy in policies.items():
                share = where(policy, args.envs, first)
                shares.append({'context': context, 'tokens': tokens, 'system': name, **share})
    title = f'{CONFIG}, {args.envs} environments, {args.simulations} simulations, {args.device}'
    report(f'Collect step, {title}', rows, args)
    args.json = None
    report(f'Where it goes, percent, {title}', shares, args)


if __name__ == '__main__':
    usage.run(main)
