"""One collect step, a whole search through the policy, old against new, interleaved in one process.

'tree' is the new system with LightZero's C++ tree, node by node; 'new' takes the search that ``search='auto'`` takes;
'lightzero' is the manager that LightZero's main branch has of its own, where that is installed.
Searches alone, without their root inference, stand beside it, and mctx's where jax and mctx are installed.

    python benchmarks/collect_step.py --device cpu --model cartpole --envs 8 64
    python benchmarks/collect_step.py --device cpu --config memory_unizero_config

The second form takes models, searches and numbers of environments as large as the zoo's configs have them; observations
are random. What is measured begins when contexts are full, so that a window slides at every step.
"""
import copy
import time
from functools import partial
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
import usage
from common import (
    PRESETS,
    StepTimes,
    allocated_mb,
    median,
    parser,
    report,
    silent,
    spread_latents,
    timed,
    world_model_cfg,
)
from ding.utils import POLICY_REGISTRY, deep_merge_dicts
from easydict import EasyDict
from mctx_search import mctx_search_ms

from lzero_kvcache import KV_CACHE_REGISTRY
from lzero_kvcache.training import load_config

SYSTEMS = (  # name, flag, kv_cache_cfg.search and type
    ('old', False, 'tree', 'new'), ('tree', True, 'tree', 'new'), ('new', True, 'auto', 'new'),
    *((('lightzero', True, 'tree', 'lightzero'),) if 'lightzero' in KV_CACHE_REGISTRY else ()),
)
Configs = Dict[str, Tuple[str, EasyDict]]  # by system: the policy's name in the registry, and its config


def cache_options(args: Any, search: str, manager: str) -> Dict[str, str]:
    """The ``kv_cache_cfg`` of one system."""
    return dict(
        backend=args.backend, search=search, type=manager, matmul='float32' if search == 'tree' else args.matmul
    )


def preset_configs(args: Any, envs: int) -> Configs:
    """The sizes that ``--model`` names."""
    preset = PRESETS[args.model]
    vector = isinstance(preset['model']['observation_shape'], int)
    model = dict(model_type='mlp' if vector else 'conv', **preset['model'])
    return {name: ('unizero', EasyDict(
        model=dict(model, world_model_cfg=world_model_cfg(
            args, envs, args.simulations, use_new_cache_manager=flag, game_segment_length=50,
            kv_cache_cfg=cache_options(args, search, manager))),
        num_simulations=args.simulations, collect_num_simulations=args.simulations,
        eval_num_simulations=args.simulations, collector_env_num=envs, evaluator_env_num=1,
    )) for name, flag, search, manager in SYSTEMS}


def zoo_configs(config: str, args: Any, envs: Optional[int] = None, **changes: Any) -> Configs:
    """Those of a file in ``zoo_configs/``; ``changes`` are made to its ``world_model_cfg``."""
    loaded = load_config(config)
    policy = loaded.main_config.policy
    policy.multi_gpu = False
    if envs is not None:
        policy.update(collector_env_num=envs, evaluator_env_num=min(envs, policy.evaluator_env_num))
        changes.update(env_num=envs)
    if args.simulations is not None:
        policy.num_simulations = args.simulations
        changes.update(num_simulations=args.simulations)
    configs = {}
    for name, flag, search, manager in SYSTEMS:
        policy.model.world_model_cfg.update(
            changes, device=args.device, use_new_cache_manager=flag,
            kv_cache_cfg=EasyDict(cache_options(args, search, manager)))
        configs[name] = loaded.create_config.policy.type, copy.deepcopy(policy)
    return configs


def build_policies(configs: Configs, device: str) -> Dict[str, Any]:
    """The same weights under both systems."""
    policies = {}
    for name, (kind, changes) in configs.items():
        policy = POLICY_REGISTRY.get(kind)
        config = deep_merge_dicts(policy.default_config(), changes)
        config.update(device=device, cuda=device == 'cuda', use_wandb=False)
        torch.manual_seed(0)
        with silent():
            policies[name] = policy(config, enable_field=['learn', 'collect', 'eval'])
    spread_latents(policies['old']._model)
    for name in configs.keys() - {'old'}:
        policies[name]._model.load_state_dict(policies['old']._model.state_dict())
    if not policies['old']._cfg.model.world_model_cfg.rotary_emb:
        policies['old']._model.world_model.precompute_pos_emb_diff_kv()
    return policies


def collect(policies: Dict[str, Any], envs: int, steps: int, first: int = 0) -> Dict[str, List[float]]:
    """Milliseconds of each collect step under each system, in episodes that all began together at step 0."""
    cfg = next(iter(policies.values()))._cfg
    shape = cfg.model.observation_shape
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    mask = [None if cfg.model.world_model_cfg.continuous_action_space else np.ones(cfg.model.action_space_size)] * envs
    times: Dict[str, List[float]] = {name: [] for name in policies}
    for policy in policies.values():
        if first == 0:
            policy.collect_mode.reset()
    for step in range(first, first + steps):
        observation = torch.randn((envs,) + shape, device=cfg.device)
        timestep = [np.array(step)] * envs
        for name in sorted(policies, reverse=step % 2 == 0):
            np.random.seed(step)
            times[name].append(timed(partial(
                policies[name].collect_mode.forward, observation, action_mask=mask, temperature=1.0,
                to_play=[-1] * envs, epsilon=0.0, ready_env_id=np.arange(envs), timestep=timestep,
            ), cfg.device)[1])
    return times


def fill(policies: Dict[str, Any], envs: int, steps: int) -> None:
    """Begin episodes, and go some steps with searches of a single simulation."""
    kept = {name: policy._cfg.num_simulations for name, policy in policies.items()}
    for policy in policies.values():
        policy._cfg.num_simulations = 1
    collect(policies, envs, steps)
    for name, policy in policies.items():
        policy._cfg.num_simulations = kept[name]


def measure(policies: Dict[str, Any], envs: int, steps: int, filled: float = 1.0) -> Dict[str, Any]:
    """Medians of collect steps with contexts filled to a share, what each cache has allocated, and what share
    of the time caching takes."""
    full = int(filled * next(iter(policies.values()))._model.world_model.context_length) // 2
    with silent():  # LightZero's new manager logs every look-up, which takes longer than the look-up
        fill(policies, envs, full)
        collect(policies, envs, 1, first=full)
        searches = {name: copy.copy(policies[name]._model.world_model.timings['search']) for name in ('tree', 'new')}
        times = collect(policies, envs, steps, first=full + 1)
        caching, alone = {}, {}
        for name, before in searches.items():
            after = policies[name]._model.world_model.timings['search']
            alone[f'{name} search ms'] = 1e3 * (after.seconds - before.seconds) / (after.count - before.count)
        for name, policy in policies.items():
            if name == 'lightzero' or name == 'new' and policy._model.world_model.searches_in_arrays('Searching'):
                continue  # whose parts are not told apart, or are one call
            steps_of = StepTimes(policy._model, policy._cfg.device)
            with steps_of.measured():
                [whole] = collect({name: policy}, envs, 1, first=full + 1 + steps)[name]
            caching[f'{name} caching %'] = steps_of.caching_percent(whole)
    old, tree, new = (median(times[name]) for name in ('old', 'tree', 'new'))
    beside = {f'{name} ms': median(times[name]) for name in times.keys() - {'old', 'tree', 'new'}}
    memory = allocated_mb({name: policy._model for name, policy in policies.items()})
    return {'old ms': old, 'tree ms': tree, 'new ms': new, 'old / tree': old / tree, 'old / new': old / new, **beside,
            **alone, **mctx_beside(policies['new'], envs, steps, alone['new search ms']), **caching,
            'old MiB': memory['old'], 'new MiB': memory['new']}


def mctx_beside(policy: Any, envs: int, steps: int, search_ms: float) -> Dict[str, float]:
    """mctx's search with the same products, and how many times its time ours takes; nothing where it cannot be had."""
    cfg, world_model = policy._cfg, policy._model.world_model
    if world_model.continuous_action_space:
        return {}
    mctx_ms = mctx_search_ms(
        cfg.device, cfg.model.world_model_cfg.kv_cache_cfg.matmul, envs, cfg.num_simulations,
        world_model.config.embed_dim, world_model.config.num_layers, cfg.model.action_space_size,
        world_model.support_size, steps
    )
    if mctx_ms is None:
        return {}
    return {'mctx search ms': mctx_ms, 'new / mctx': search_ms / mctx_ms}


def main() -> None:
    options = parser(__doc__)
    options.add_argument('--config', nargs='+', default=[], help='files of zoo_configs/, in place of --model')
    options.add_argument('--envs', type=int, nargs='+', help="default: 8 and 64, or the config's")
    options.add_argument('--simulations', type=int, help="default: 25, or the config's")
    args = options.parse_args()
    rows = []
    for config in args.config:
        for envs in args.envs or [None]:
            configs = zoo_configs(config, args, envs)
            policy = configs['new'][1]
            rows.append({
                'config': config, 'envs': policy.collector_env_num, 'simulations': policy.num_simulations,
                **measure(build_policies(configs, args.device), policy.collector_env_num, 4 * args.repeats),
            })
            print(rows[-1], flush=True)
    title = f'Collect step, {args.device} {args.backend}'
    if not args.config:
        args.simulations = args.simulations or 25
        for envs in args.envs or [8, 64]:
            policies = build_policies(preset_configs(args, envs), args.device)
            rows.append({'envs': envs, **measure(policies, envs, 4 * args.repeats)})
        title += f', {args.model}, {args.simulations} simulations, context {args.context}'
    report(title, rows, args)


if __name__ == '__main__':
    start = time.perf_counter()
    usage.run(main)
    print(f'{time.perf_counter() - start:.0f} s')
