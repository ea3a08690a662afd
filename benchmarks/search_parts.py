"""Each part of a collect step, and of a simulation of a search in arrays, beside its floor, on a CPU.

A floor is what the part's products take at ``--gflops``. Parts of a simulation are run by themselves, in one thread, on
as many rows and the same memory; the rest of it moves rows about and finds their contexts.

    python benchmarks/search_parts.py --model cartpole --envs 8 64 256
"""
import contextlib
import io
import time
from functools import partial
from typing import Any, Callable, Dict, List, Tuple
from unittest import mock

import numba
import numpy as np
import torch
import usage
from collect_step import build_policies, collect, fill, preset_configs
from common import parser, report

from lzero_kvcache.engine import compiled_step, layers, program
from lzero_kvcache.engine.compiling import ZERO
from lzero_kvcache.engine.lanes import NUMBER, WIDTH
from lzero_kvcache.host.row_loops import Selection
from lzero_kvcache.host.tree_search import KeylessSearch
from lzero_kvcache.search import tree
from lzero_kvcache.search.cpu_search import CpuSearch
from lzero_kvcache.search.roots import RootInference

LINEAR, ATTENTION, NORM, GELU = range(4)

AT_ONCE = 20
"""Times that a part is run in one call."""


@numba.njit(nogil=True, error_model='numpy')
def layers_often(part: int, times: int, network: Any, shift: int, step: int, scratch: Any, rows: int, weight: int,
                 bias: int, inputs: int, outputs: int, source: int, target: int) -> None:
    """A part of a layer, as often as it takes for the call not to count."""
    tiles = (rows + WIDTH - 1) // WIDTH
    for _ in range(times):
        if part == LINEAR:
            layers.linear(weight, bias, source, target, outputs * WIDTH, inputs, outputs, tiles, ZERO,
                          scratch.team)
        elif part == NORM:
            layers.norm(weight, bias, source, target, inputs, tiles, network.eps)
        elif part == GELU:
            layers.elementwise(program.GELU, source, inputs * tiles)
        else:
            for tile in range(tiles):
                compiled_step._attend(network, ZERO, shift, step, scratch, tile, min(WIDTH, rows - tile * WIDTH))


@numba.njit(nogil=True, error_model='numpy')
def trees_alone(found: Any, rules: Any, key: Any, pages: np.ndarray, numbers: np.ndarray, logits: np.ndarray,
                rows: int) -> None:
    """What a search does to its trees, whose new nodes all predict the same."""
    for simulation in range(len(pages)):
        tree.select_rows(found, rules, key, simulation, ZERO, rows)
        tree.extend_rows(found, pages[simulation], simulation, ZERO, rows)
        tree.backup_rows(found, rules, key, simulation, numbers[0], numbers[1], logits, ZERO, rows)


def main() -> None:
    options = parser(__doc__)
    options.add_argument('--envs', type=int, nargs='+', default=[8, 64, 256])
    options.add_argument('--simulations', type=int, default=25)
    options.add_argument('--gflops', type=float, default=100.)
    args = options.parse_args()
    for envs in args.envs:
        policy = build_policies(preset_configs(args, envs), 'cpu')['new']
        with contextlib.redirect_stdout(io.StringIO()):
            fill({'new': policy}, envs, args.context // 2 + 1)
            step, search = parts_of_a_step(policy, envs, 8 * args.repeats)
        assert search, 'searches are not in arrays: the log says why'
        network, _ = policy._model.world_model.inference._cpu_search._model._network[0]
        weights = sum(times * inputs * outputs for times, _, _, inputs, outputs in products(network))
        floor = 2e-6 * envs * weights / args.gflops
        simulation = parts_of_a_simulation(policy, network, search[-1], envs, 20 * args.repeats)
        simulation['rest'] = step.pop('compiled') / args.simulations - sum(simulation.values())
        title = f'{args.model}, {envs} environments, {torch.get_num_threads()} threads'
        floors = {'search': floor * args.simulations, 'root inference': floor, 'products': floor}
        report(f'A collect step, {title}, {args.simulations} simulations', rows_of(step, floors), args)
        report(f'A simulation, {title}', rows_of(simulation, floors), args)


def rows_of(parts: Dict[str, float], floors: Dict[str, float]) -> List[Dict[str, Any]]:
    parts = {**parts, 'whole': sum(parts.values())}
    return [{'part': name, 'ms': ms, 'floor, ms': floors.get(name, '-')} for name, ms in parts.items()]


def parts_of_a_step(policy: Any, envs: int, steps: int) -> Tuple[Dict[str, float], List[Any]]:
    """Milliseconds of parts of a collect step, the least of each, and what searches were given."""
    times: Dict[str, List[float]] = {}
    given: List[Any] = []

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            output = function(*args, **kwargs)
            times[name][-1] += 1e3 * (time.perf_counter() - start)
            return output
        return run

    def noted(self: Any, problem: Any, memory: Any, *rest: Any) -> Any:
        given.append((problem, memory, *rest))
        return search(self, problem, memory, *rest)

    search = timed(CpuSearch._search, 'compiled')
    places = [
        (RootInference, 'infer', 'root inference'), (KeylessSearch, 'search', 'search'),
        (type(policy._collect_model), 'eval', 'eval()'), (np.random, 'dirichlet', 'noise'),
        (Selection, '__call__', 'action selection'),
    ]
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(CpuSearch, '_search', noted))
        for owner, name, part in places:
            times[part] = []
            patches.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), part)))
        times.update({'compiled': [], 'collect step': []})
        for step in range(steps):
            for part in times:
                times[part].append(0.)
            [times['collect step'][-1]] = collect({'new': policy}, envs, 1, first=100 + step)['new']
    whole, compiled_call = times.pop('collect step'), times.pop('compiled')
    times['rest'] = [all_of_it - sum(parts) for all_of_it, *parts in zip(whole, *times.values())]
    times['compiled'] = compiled_call
    return {part: min(values) for part, values in times.items()}, given


def products(network: Any) -> List[Tuple[int, int, int, int, int]]:
    """The products of a simulation: how often, weight, bias, inputs and outputs."""
    embed, mlp_width, layers, block = network.embed, network.mlp_width, len(network.blocks), network.blocks[0]
    found = [
        (8 * layers, block[program.QUERY_WEIGHT], block[program.QUERY_BIAS], embed, embed),
        (2 * layers, block[program.WIDEN_WEIGHT], block[program.WIDEN_BIAS], embed, mlp_width),
        (2 * layers, block[program.NARROW_WEIGHT], block[program.NARROW_BIAS], mlp_width, embed),
    ]
    columns = program.WEIGHT, program.BIAS, program.INPUTS, program.OUTPUTS
    for name in ('continuous', 'rewards', 'observations', 'value', 'trunk', 'first', 'second'):
        found += [(1, *(operation[column] for column in columns)) for operation in getattr(network, name)
                  if operation[program.KIND] == program.LINEAR]
    return found


def parts_of_a_simulation(policy: Any, network: Any, given: Any, envs: int, repeats: int) -> Dict[str, float]:
    """Milliseconds of parts of a simulation, each by itself."""
    problem, memory, paged, tables, pages = *given[:4], given[6]
    shift = paged.shift.ctypes.data
    embed, mlp_width, depth, block = network.embed, network.mlp_width, len(network.blocks), network.blocks[0]
    rules, key = problem.rules, tree.make_key(problem.seed, problem.number)
    side, model = layers.ROWS, policy._model.world_model.inference._cpu_search._model
    with model.scratches(network, tables.shape[1], 1) as [scratch]:
        pass  # which has the contexts of the last search
    source, target = np.zeros((2, (max(embed, mlp_width, network.widest) + WIDTH) * side), np.float32)
    step = 0 if network.rotary else depth * 2 * embed * NUMBER
    sums: Dict[str, float] = {'products': 0., 'attention': 0., 'norms': 0., 'GELU': 0.}

    def add(name: str, part: int, times: int, rows: int, weight: int, bias: int, inputs: int, outputs: int) -> None:
        sums[name] += times / AT_ONCE * best(partial(
            layers_often, part, AT_ONCE, network, shift, step, scratch, rows, weight, bias, inputs, outputs,
            source.ctypes.data, target.ctypes.data
        ), repeats)

    for start in range(0, envs, side):
        rows = min(side, envs - start)
        for times, *product in products(network):
            add('products', LINEAR, times, rows, *product)
        add('attention', ATTENTION, 2 * depth, rows, 0, 0, embed, embed)
        add('norms', NORM, 2 * (2 * depth + 1), rows, block[program.NORM1_WEIGHT], block[program.NORM1_BIAS], embed,
            embed)
        add('GELU', GELU, 2 * depth, rows, 0, 0, mlp_width, mlp_width)
    numbers, logits = np.zeros((2, envs), np.float32), np.zeros((envs, network.policy), np.float32)
    walk = partial(trees_alone, memory.tree, rules, key, pages, numbers, logits, envs)
    sums['trees'] = best(walk, repeats) / problem.simulations
    return sums


def best(function: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of the quickest of some calls."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:])


if __name__ == '__main__':
    usage.run(main)
