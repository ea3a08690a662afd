"""What both caches hold for the configs of the zoo, MiB: the old system's slots, all used, against everything that the
new one holds after a collect step of every environment (pages, gathered windows, buffers of graphs, trees' arrays).

    python benchmarks/zoo_memory.py
"""
from typing import Any, Dict, List

import usage
from collect_step import build_policies, collect, zoo_configs
from common import parser, report, silent

from lzero_kvcache_options import our_configs

CONFIGS = sorted(name for name in our_configs() if name.endswith('_config'))


def memory(config: str, args: Any) -> Dict[str, Any]:
    configs = {name: part for name, part in zoo_configs(config, args).items() if name != 'tree'}
    policies = build_policies(configs, args.device)
    envs, context = policies['new']._cfg.collector_env_num, policies['new']._model.world_model.context_length
    with silent():
        collect({'new': policies['new']}, envs, 2)
    held = policies['new']._model.world_model.kv_cache_manager.counters()['memory_mb']
    slots = policies['old']._model.world_model.kv_cache_manager.full_memory_mb
    return {'config': config, 'envs': envs, 'simulations': policies['new']._cfg.num_simulations, 'context': context,
            'old MiB': slots, 'new MiB': held, 'old / new': slots / held}


def main() -> None:
    options = parser(__doc__)
    options.add_argument('--config', nargs='+', default=CONFIGS, help='default: the whole zoo')
    options.add_argument('--simulations', type=int, help="default: the config's")
    args = options.parse_args()
    rows: List[Dict[str, Any]] = []
    for config in args.config:
        rows.append(memory(config, args))
        print(rows[-1], flush=True)
    report(f'What the caches hold, {args.device}', rows, args)


if __name__ == '__main__':
    usage.run(main)
