"""One recurrent inference of a reanalysis batch, old against new, interleaved search by search in one process.

    python benchmarks/reanalyze_step.py --device cpu --model cartpole --rows 176
"""
from functools import partial
from typing import Any, Dict, List

import numpy as np
import torch
from common import PRESETS, allocated_mb, build_models, median, parser, report, timed

UNROLL = 10  # rows are sequences x (unroll steps + 1), as in LightZero's buffer


def main() -> None:
    options = parser(__doc__)
    options.add_argument('--rows', type=int, nargs='+', default=[176])
    options.add_argument('--simulations', type=int, default=10)
    args = options.parse_args()
    table: List[Dict[str, Any]] = []
    for rows in args.rows:
        if rows % (UNROLL + 1):
            options.error(f'--rows {rows} must be a multiple of {UNROLL + 1}')
        models = build_models(args, 8, 50)
        width = models['new'].world_model.embed_dim
        latent = np.random.default_rng(0).random((rows, 1, width), dtype=np.float32)
        action = torch.randint(PRESETS[args.model]['model']['action_space_size'], (rows,), device=args.device)
        start = np.arange(UNROLL)[None].repeat(rows // (UNROLL + 1), axis=0)
        times: Dict[str, List[float]] = {'old': [], 'new': []}
        for repeat in range(args.repeats + 1):
            for name, model in models.items():
                model.world_model.reanalyze_phase = True
                for simulation in range(args.simulations):
                    model.world_model.latent_state = torch.zeros(1)  # LightZero deletes it at each step
                    step = partial(model.recurrent_inference, [(latent, action)], simulation, [1] * rows, start)
                    milliseconds = timed(step, args.device)[1]
                    times[name] += [milliseconds] if repeat else []  # the first search warms up
        old, new = median(times['old']), median(times['new'])
        memory = allocated_mb(models)
        table.append({'rows': rows, 'old ms': old, 'new ms': new, 'old / new': old / new, 'old MiB': memory['old'],
                      'new MiB': memory['new']})
    report(f'Reanalysis step, {args.model}, context {args.context}, {args.device} {args.backend}', table, args)


if __name__ == '__main__':
    main()
