"""One recurrent inference of a search, old against new, interleaved search by search in one process.

The new system is measured both ways: contexts found by key, as any caller of ``recurrent_inference`` has them, and by
node, as its policies search; the latter includes the way of the actions there and of the predictions back. Contexts
are full when the measurement begins, and so are the pools of root contexts.

    python benchmarks/recurrent_step.py --device cpu --model cartpole --envs 8 64 256
"""
from contextlib import ExitStack
from functools import partial
from typing import Any, Dict, List, Union

import numpy as np
import torch
import usage
from common import PRESETS, StepTimes, allocated_mb, build_models, median, memory_of_contexts, parser, report, timed


class Search:
    """
    Overview:
        Searches that follow on each other, as sequences of recurrent inferences without the tree: in each simulation
        every environment expands a random node that it already has, so that depths are unequal as in a real search;
        the same ones in each system.
    """

    def __init__(self, models: Dict[str, Any], rows: int, args: Any) -> None:
        self.models, self.rows, self.device = models, rows, args.device
        shape = PRESETS[args.model]['model']['observation_shape']
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.actions = PRESETS[args.model]['model']['action_space_size']
        self.searches = dict.fromkeys(models, 0)
        self.last_obs: Dict[str, torch.Tensor] = {}

    def fill(self, name: str) -> None:
        """Go on until contexts and the pools of root contexts are full, in searches of a single simulation."""
        world_model = self.models['by key'].world_model
        for _ in range(world_model.context_length // 2 + world_model.kv_cache_manager.init_pools[0].pool_size):
            self.run(name, 1)

    def run(self, name: str, simulations: int) -> List[float]:
        """Milliseconds of each simulation of the next search under one system."""
        model, step = self.models[name], self.searches[name]
        self.searches[name] += 1
        torch.manual_seed(step)
        obs = torch.randn((self.rows,) + self.shape, device=self.device)
        last_obs = self.last_obs.get(name, obs)
        self.last_obs[name] = obs
        actions = [np.int64(0) if step else -1] * self.rows
        with ExitStack() as search:
            if name != 'old':  # as the policy does for the length of a search
                opened = search.enter_context(model.world_model.open_step('collect', range(self.rows)))
            output = model.initial_inference(last_obs, actions, obs, [np.array(step)] * self.rows)
            expand = None
            if name == 'by node':
                expand = search.enter_context(model.world_model.inference.search_by_node(opened, simulations))
            return self.simulate(model, simulations, [output.latent_state.cpu().numpy()], expand, step)

    def caching_percent(self, name: str, simulations: int) -> Union[float, str]:
        """The share of a recurrent step that is not its forward."""
        times = StepTimes(self.models[name], self.device)
        with times.measured():
            self.run(name, simulations)
        return times.caching_percent(times.milliseconds['step'])

    def simulate(self, model: Any, simulations: int, latents: List[np.ndarray], expand: Any,
                 timestep: int) -> List[float]:
        """The simulations of one search whose roots are there."""
        rng = np.random.default_rng(timestep)
        times = []
        depths = [np.zeros(self.rows, dtype=int)]
        columns = np.arange(self.rows)
        unexpanded = [[(0, move) for move in range(self.actions)] for _ in range(self.rows)]
        for simulation in range(simulations):
            chosen = [leaves.pop(rng.integers(len(leaves))) for leaves in unexpanded]
            parents, moves = (np.array(column) for column in zip(*chosen))
            depth = np.stack(depths)[parents, columns]
            if expand is not None:
                step = partial(expand, simulation, parents, columns, moves, depth.tolist())
            else:
                latent = np.stack([latents[parent][row] for row, parent in enumerate(parents)])
                action = torch.from_numpy(moves).to(self.device)
                step = partial(model.recurrent_inference, [(latent, action)], simulation, depth.tolist(),
                               [np.array(timestep)] * self.rows)
            result, milliseconds = timed(step, self.device)
            times.append(milliseconds)
            if expand is None:
                latents.append(result.latent_state.cpu().numpy())
            depths.append(depth + 1)
            for leaves in unexpanded:
                leaves += [(simulation + 1, move) for move in range(self.actions)]
        return times


def main() -> None:
    options = parser(__doc__)
    options.add_argument('--envs', type=int, nargs='+', default=[8, 64, 256])
    options.add_argument('--simulations', type=int, default=25)
    args = options.parse_args()
    rows = []
    for envs in args.envs:
        models = build_models(args, envs, args.simulations, ('old', 'by key', 'by node'))
        search = Search(models, envs, args)
        times: Dict[str, List[float]] = {name: [] for name in models}
        for name in models:
            search.fill(name)
        for repeat in range(args.repeats + 1):
            for name in sorted(models, key=lambda name: (repeat + list(models).index(name)) % len(models)):
                values = search.run(name, args.simulations)
                times[name] += values if repeat else []  # the first one warms up
        milliseconds = {name: median(values) for name, values in times.items()}
        old = milliseconds['old']
        caching = {name: search.caching_percent(name, args.simulations) for name in models}
        memory = allocated_mb(models)
        rows.append({
            'envs': envs, **{f'{name} ms': value for name, value in milliseconds.items()},
            'old / key': old / milliseconds['by key'], 'old / node': old / milliseconds['by node'],
            **{f'{name} caching %': share for name, share in caching.items()},
            'old MiB': memory['old'], 'new MiB': memory['by key'], **memory_of_contexts(models['by key'].world_model),
        })
    title = f'Recurrent step, {args.model}, context {args.context}, {args.layers} layers'
    report(f'{title}, {args.device} {args.backend}', rows, args)


if __name__ == '__main__':
    usage.run(main)
