"""A reanalysis of a replay buffer, old against new, interleaved in one process: one recurrent inference, and a search.

'tree' is the new system with LightZero's C++ tree; 'new' searches in arrays where that is served.

    python benchmarks/reanalyze_step.py --device cpu --model cartpole --rows 176
"""
from functools import partial
from typing import Any, Dict, List

import numpy as np
import torch
import usage
from common import PRESETS, allocated_mb, build_models, median, parser, report, timed
from easydict import EasyDict
from lzero.mcts.tree_search.mcts_ctree import UniZeroMCTSCtree

from lzero_kvcache.host.buffers import ReanalysisSearch

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
        new = models['new'].world_model
        actions, width = PRESETS[args.model]['model']['action_space_size'], new.embed_dim
        in_arrays = ReanalysisSearch if new.searches_in_arrays('Reanalyzing') else UniZeroMCTSCtree
        searches = {'old': [('old', UniZeroMCTSCtree)], 'new': [('tree', UniZeroMCTSCtree), ('new', in_arrays)]}
        latent = np.random.default_rng(0).random((rows, 1, width), dtype=np.float32)
        action = torch.randint(actions, (rows,), device=args.device)
        start = np.arange(UNROLL)[None].repeat(rows // (UNROLL + 1), axis=0)
        steps: Dict[str, List[float]] = {'old': [], 'new': []}
        whole: Dict[str, List[float]] = {'old': [], 'tree': [], 'new': []}
        for repeat in range(args.repeats + 1):
            for name, model in models.items():
                model.world_model.reanalyze_phase = True
                for simulation in range(args.simulations):
                    model.world_model.latent_state = torch.zeros(1)  # LightZero deletes it at each step
                    step = partial(model.recurrent_inference, [(latent, action)], simulation, [1] * rows, start)
                    milliseconds = timed(step, args.device)[1]
                    steps[name] += [milliseconds] if repeat else []  # the first search warms up
                for way, search in searches[name]:
                    model.world_model.latent_state = torch.zeros(1)
                    found = partial(reanalyze, search, args, actions, model, latent, start)
                    milliseconds = timed(found, args.device)[1]
                    whole[way] += [milliseconds] if repeat else []
        memory = allocated_mb(models)
        row: Dict[str, Any] = {'rows': rows}
        for title, times in (('step', steps), ('search', whole)):
            row.update({f'{title}, {way} ms': median(times[way]) for way in times})
            row[f'{title}, old / new'] = median(times['old']) / median(times['new'])
        table.append({**row, 'old MiB': memory['old'], 'new MiB': memory['new']})
    report(f'Reanalysis, {args.model}, context {args.context}, {args.simulations} simulations, {args.device} '
           f'{args.backend}', table, args)


def reanalyze(search: Any, args: Any, actions: int, model: Any, latent: np.ndarray, start: np.ndarray) -> None:
    """A search from given states, as LightZero's buffer does it."""
    rows = len(latent)
    cfg = EasyDict(
        num_simulations=args.simulations, discount_factor=0.997, device=args.device,
        model=dict(support_scale=50, categorical_distribution=True, action_space_size=actions)
    )
    roots = search.roots(rows, [list(range(actions))] * rows)
    noises = np.random.dirichlet([0.3] * actions, rows).tolist()
    roots.prepare(0.25, noises, [0.] * rows, np.zeros((rows, actions)).tolist(), [-1] * rows)
    search(cfg).search(roots, model, latent, [-1] * rows, start)


if __name__ == '__main__':
    usage.run(main)
