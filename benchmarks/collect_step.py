"""One collect step, a whole search through the policy, old against new, interleaved in one process.

    python benchmarks/collect_step.py --device cpu --model cartpole --envs 8 64
"""
import contextlib
import io
import time
from functools import partial
from typing import Any, Dict, List

import numpy as np
import torch
from common import PRESETS, median, parser, report, spread_latents, timed, world_model_cfg
from ding.utils import deep_merge_dicts
from easydict import EasyDict

from lzero_kvcache.policies import UniZeroPolicy


def build_policies(args: Any, envs: int) -> Dict[str, Any]:
    """The same weights under both systems."""
    policies = {}
    for name, flag in (('old', False), ('new', True)):
        preset = PRESETS[args.model]
        config = deep_merge_dicts(UniZeroPolicy.default_config(), EasyDict(
            model=dict(
                model_type='mlp' if isinstance(preset['model']['observation_shape'], int) else 'conv',
                world_model_cfg=world_model_cfg(
                    args, envs, args.simulations, use_new_cache_manager=flag, game_segment_length=50),
                **preset['model'],
            ),
            num_simulations=args.simulations, collector_env_num=envs, evaluator_env_num=1, device=args.device,
            cuda=args.device == 'cuda', use_wandb=False,
        ))
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            policies[name] = UniZeroPolicy(config, enable_field=['learn', 'collect', 'eval'])
    spread_latents(policies['old']._model)
    policies['new']._model.load_state_dict(policies['old']._model.state_dict())
    if not policies['old']._cfg.model.world_model_cfg.rotary_emb:
        policies['old']._model.world_model.precompute_pos_emb_diff_kv()
    return policies


def collect(policies: Dict[str, Any], args: Any, envs: int, steps: int) -> Dict[str, List[float]]:
    """Milliseconds of each collect step under each system, in episodes that all begin together."""
    shape = PRESETS[args.model]['model']['observation_shape']
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    mask = [np.ones(PRESETS[args.model]['model']['action_space_size'])] * envs
    times: Dict[str, List[float]] = {name: [] for name in policies}
    for policy in policies.values():
        policy.collect_mode.reset()
    for step in range(steps):
        observation = torch.randn((envs,) + shape, device=args.device)
        timestep = [np.array(step)] * envs
        for name in sorted(policies, reverse=step % 2 == 0):
            np.random.seed(step)
            times[name].append(timed(partial(
                policies[name].collect_mode.forward, observation, action_mask=mask, temperature=1.0,
                to_play=[-1] * envs, epsilon=0.0, ready_env_id=np.arange(envs), timestep=timestep,
            ), args.device)[1])
    return times


def main() -> None:
    options = parser(__doc__)
    options.add_argument('--envs', type=int, nargs='+', default=[8, 64])
    options.add_argument('--simulations', type=int, default=25)
    args = options.parse_args()
    rows = []
    for envs in args.envs:
        policies = build_policies(args, envs)
        with contextlib.redirect_stdout(io.StringIO()):
            collect(policies, args, envs, 2)
            times = collect(policies, args, envs, 4 * args.repeats)
        old, new = median(times['old']), median(times['new'])
        memory = {name: policy._model.world_model.kv_cache_manager.counters()['memory_mb']
                  for name, policy in policies.items()}
        rows.append({
            'envs': envs, 'old ms': old, 'new ms': new, 'old / new': old / new,
            'old MiB': memory['old'], 'new MiB': memory['new'],
        })
    title = f'Collect step, {args.model}, {args.simulations} simulations, context {args.context}'
    report(f'{title}, {args.device} {args.backend}', rows, args)


if __name__ == '__main__':
    start = time.perf_counter()
    main()
    print(f'{time.perf_counter() - start:.0f} s')
