"""Where the time of a training goes: a config is trained in each system, each time in a process of its own, by turns.

    python benchmarks/training_time.py --config config_new.py --iterations 300 --repeats 3
    python benchmarks/training_time.py --config atari_unizero_segment_config --device cuda --iterations 120

Timers stand around the host's own methods, and what one of them calls of another is the other's. Set-up is left out, an
evaluation is cut short, and neither it nor compiling is part of the total. In the same number of iterations the systems
do not collect equally much: seconds of both are for as many steps and iterations as the old one had.
"""
import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from statistics import median
from typing import Any, Callable, Dict, Iterator, List, Tuple

import usage
from rich.console import Console
from rich.table import Table

from lzero_kvcache_options import BAD_USAGE, UsageError

SYSTEMS = 'old', 'new'
SEARCH, STEP, LEARNER = 'search', 'rest of a collect step', 'learner step'
TARGETS, REANALYSIS, SAMPLING = 'target values', 'reanalysed policies', 'sampling'
COLLECTOR, LOOP = "collector's loop, environments", "rest of the loop, the learner's hooks"
EVALUATION, COMPILING = 'evaluation', 'compiling'

UNITS = {
    SEARCH: 'collect step', STEP: 'collect step', COLLECTOR: 'collect step', LEARNER: 'iteration', TARGETS: 'iteration',
    REANALYSIS: 'iteration', SAMPLING: 'iteration', LOOP: 'iteration', EVALUATION: 'evaluation step', COMPILING: 'run',
}
TOTAL = [part for part in UNITS if part not in (EVALUATION, COMPILING)]
WHOLE = EVALUATION, REANALYSIS
"""What these call of other parts is theirs, but for compiling."""


class Clock:
    """
    Overview:
        Seconds of each part of a training. One part runs at a time: what begins inside another stops the other's time
        until it ends.
    Arguments:
        - now (:obj:`Callable`): Tells the time.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.seconds = dict.fromkeys(UNITS, 0.0)
        self.counts = dict.fromkeys(UNITS.values(), 0)
        self._open: List[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside as a part's."""
        outer = self._open[-1] if self._open else None
        self._switch()
        self._open.append(outer if outer in WHOLE and name != COMPILING else name)  # type: ignore[arg-type]
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def start_loop(self) -> None:
        """From here on, what is of no part is the loop's."""
        self._open, self._since = [LOOP], self._now()

    @property
    def started(self) -> bool:
        """Whether the loop has begun."""
        return bool(self._open)

    def _switch(self) -> None:
        now = self._now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def around(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A function whose time is a part's."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return run


class _EvaluatedEnough(BaseException):
    """Ends an evaluation."""


class Worker:
    """One training with timers, in a process of its own."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.clock = Clock(time.process_time if args.cpu_time else time.perf_counter)
        self._args = args
        self._written = open(os.dup(1), 'w', buffering=1)  # the process's own output goes to a file
        self._finished: Dict[str, Any] = {}

    def run(self) -> None:
        """Train, and write seconds and counts as JSON."""
        args = self._args
        import torch

        from lzero_kvcache.host import entries
        from lzero_kvcache.training.plan import make_plan
        plan = make_plan(
            args.config, cache=args.worker, device=args.device, seed=args.seed, threads=args.threads, overrides=args.set
        )
        plan.main_config.exp_name = os.path.relpath(os.path.join(args.folder, 'run'))
        if plan.threads:
            torch.set_num_threads(plan.threads)
        self._place_timers()
        entries.run_entry(
            plan.entry, (plan.main_config, plan.create_config), seed=plan.seed, max_train_iter=args.iterations,
            model_path=plan.main_config.policy.get('model_path'), max_env_step=int(1e10),
        )
        with open(os.path.join(args.folder, 'times.json'), 'w') as file:
            json.dump(self._finished, file)

    def _place_timers(self) -> None:
        from ding.worker import BaseLearner
        from lzero.mcts.tree_search.mcts_ctree import UniZeroMCTSCtree
        from lzero.mcts.tree_search.mcts_ctree_sampled import SampledUniZeroMCTSCtree
        from lzero.worker import MuZeroCollector, MuZeroEvaluator, MuZeroSegmentCollector

        from lzero_kvcache.host.policies import KVCachePolicy
        from lzero_kvcache.host.tree_search import KeylessSearch
        searches = UniZeroMCTSCtree, SampledUniZeroMCTSCtree, *KeylessSearch.__bases__
        self._time(searches, 'search', SEARCH)
        self._time([KVCachePolicy], '_forward_collect', STEP)
        self._time([KVCachePolicy], '_forward_learn', LEARNER)
        self._time([MuZeroCollector, MuZeroSegmentCollector], 'collect', COLLECTOR)
        self._time([MuZeroEvaluator], 'eval', EVALUATION)
        self._wrap([MuZeroCollector, MuZeroSegmentCollector], 'collect', self._from_first_collection)
        self._wrap([MuZeroEvaluator], 'eval', self._cut)
        self._wrap([BaseLearner], 'call_hook', self._before_last_hook)
        for name, unit in (('collect', 'collect step'), ('learn', 'iteration'), ('eval', 'evaluation step')):
            self._wrap([KVCachePolicy], f'_forward_{name}', functools.partial(self._counted, unit=unit))
        if self._args.worker == 'new':  # LightZero alone runs without numba
            self._time_compiling()

    def _place_timers_in_buffers(self) -> None:
        """Around what a run has put into them."""
        from lzero.mcts import SampledUniZeroGameBuffer, UniZeroGameBuffer
        buffers = UniZeroGameBuffer, SampledUniZeroGameBuffer
        self._time(buffers, 'sample', SAMPLING)
        self._time(buffers, 'reanalyze_buffer', SAMPLING)
        self._time(buffers, '_compute_target_reward_value', TARGETS)
        self._time(buffers, '_compute_target_policy_reanalyzed', REANALYSIS)

    def _time(self, owners: Any, name: str, part: str) -> None:
        self._wrap(owners, name, functools.partial(self.clock.around, name=part))

    @staticmethod
    def _wrap(owners: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        for owner in owners:
            if name in vars(owner):
                setattr(owner, name, wrap(vars(owner)[name]))

    def _time_compiling(self) -> None:
        """Compile with numba and Triton, load what was compiled before, and capture CUDA graphs."""
        from lzero_kvcache.engine import encoder_graph, graphs
        from lzero_kvcache.search import gpu_memory
        self._time([graphs, encoder_graph, gpu_memory], 'capture', COMPILING)
        with contextlib.suppress(ImportError):
            from triton.compiler.compiler import CompiledKernel
            from triton.runtime.jit import JITFunction
            self._time([JITFunction], '_do_compile', COMPILING)
            self._time([CompiledKernel], '_init_handles', COMPILING)
        with contextlib.suppress(ImportError):
            from numba.core.dispatcher import Dispatcher
            self._time([Dispatcher], 'compile', COMPILING)

    def _from_first_collection(self, collect: Any) -> Any:
        @functools.wraps(collect)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self.clock.started:
                self._place_timers_in_buffers()
                self.clock.start_loop()
            counts, spent = self.clock.counts, [(part, self.clock.seconds[part]) for part in TOTAL]
            print(f"{self._args.worker}: {counts['iteration']} iterations, {counts['collect step']} collect steps, "
                  f"{sum(seconds for _, seconds in spent):.1f} s: "
                  + ', '.join(f'{part} {seconds:.2f}' for part, seconds in spent if seconds > 0.01), file=self._written)
            return collect(*args, **kwargs)

        return run

    def _cut(self, evaluate: Any) -> Any:
        @functools.wraps(evaluate)
        def run(evaluator: Any, *args: Any, **kwargs: Any) -> Any:
            self._evaluation_ends = self.clock.counts['evaluation step'] + self._args.evaluation_steps
            try:
                return evaluate(evaluator, *args, **kwargs)
            except _EvaluatedEnough:
                evaluator._policy.reset(list(range(evaluator._env_num)))  # as if the episodes had ended
                return False, {}

        return run

    def _counted(self, forward: Any, unit: str) -> Any:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            counts = self.clock.counts
            if unit == 'evaluation step' and counts[unit] == self._evaluation_ends:
                raise _EvaluatedEnough
            counts[unit] += 1
            return forward(*args, **kwargs)

        return run

    def _before_last_hook(self, call_hook: Any) -> Any:
        @functools.wraps(call_hook)
        def run(learner: Any, name: str) -> Any:
            if name == 'after_run':  # the loop is over, and a checkpoint is saved
                with self.clock.part(LOOP):
                    self._finished = dict(seconds=dict(self.clock.seconds), counts=dict(self.clock.counts, run=1))
            return call_hook(learner, name)

        return run


def train(system: str, args: argparse.Namespace) -> Dict[str, Any]:
    """Train once in a process of its own; returns seconds and counts."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], '--worker', system, '--folder', folder]
        log = os.path.join(folder, 'log')
        code = subprocess.call(command)
        if code:
            with open(log) as file:
                said = file.readlines()
            if code == BAD_USAGE and said and 'error: ' in said[-1]:
                raise UsageError(said[-1].partition('error: ')[2].strip())
            sys.exit(f'{system}: exit code {code}\n' + ''.join(said[-30:]))
        with open(os.path.join(folder, 'times.json')) as file:
            return json.load(file)


def milliseconds(run: Dict[str, Any], part: str) -> float:
    """Of a part, for each of its units."""
    return 1e3 * run['seconds'][part] / max(1, run['counts'][UNITS[part]])


def compared(runs: List[Tuple[Dict[str, Any], Dict[str, Any]]]) -> Tuple[List[Dict[str, Any]], Dict[str, Any]]:
    """Rows of the table, and for each part and the total the seconds of both systems and their ratio; medians over the
    runs."""
    seconds: Dict[str, List[Tuple[float, float]]] = {}
    for old, new in runs:
        for part, unit in UNITS.items():
            pair = tuple(milliseconds(run, part) * old['counts'][unit] / 1e3 for run in (old, new))
            seconds.setdefault(part, []).append(pair)  # type: ignore[arg-type]
        pairs = [seconds[part][-1] for part in TOTAL]
        seconds.setdefault('total', []).append((sum(old for old, _ in pairs), sum(new for _, new in pairs)))
    numbers: Dict[str, Any] = {}
    for part, pairs in seconds.items():
        ratios = [old / new for old, new in pairs if new > 0]
        numbers[part] = dict(old=median(old for old, _ in pairs), new=median(new for _, new in pairs),
                             ratio=median(ratios) if ratios else None)
    rows = []
    for part in (*TOTAL, 'total', EVALUATION, COMPILING):
        row: Dict[str, Any] = {'part': part, 'for each': UNITS.get(part, '')}
        for index, system in enumerate(SYSTEMS):
            row[f'{system} s'] = numbers[part][system]
            row[f'{system} ms'] = median(milliseconds(run[index], part) for run in runs) if part in UNITS else ''
            row[f'{system} %'] = 100 * numbers[part][system] / numbers['total'][system] if part in TOTAL else ''
        rows.append({**row, 'old / new': numbers[part]['ratio'] or ''})
    return rows, numbers


def main() -> None:
    options = usage.parser(__doc__)
    options.add_argument('--config', required=True, help='as for train.py')
    options.add_argument('--iterations', type=int, default=300, help='trained at least; a collection ends with them')
    options.add_argument('--repeats', type=int, default=1, help='trainings in each system')
    options.add_argument('--evaluation-steps', type=int, default=20, help='after which an evaluation is cut short')
    options.add_argument('--cpu-time', action='store_true',
                         help='of all threads of the process, in place of wall time: for a machine that has other work')
    options.add_argument('--seed', type=int)
    options.add_argument('--threads', type=int)
    options.add_argument('--set', nargs='+', default=[], metavar='KEY=VALUE', help='as for train.py')
    options.add_argument('--json', metavar='FILE', help='also write the numbers there')
    options.add_argument('--worker', choices=SYSTEMS, help=argparse.SUPPRESS)
    options.add_argument('--folder', help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.worker:
        worker = Worker(args)
        log = os.open(os.path.join(args.folder, 'log'), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        worker.run()
        return
    runs = [(train('old', args), train('new', args)) for _ in range(args.repeats)]
    rows, numbers = compared(runs)
    counts = [f"{name} {run['counts']['iteration']} iterations and {run['counts']['collect step']} collect steps"
              for name, run in zip(SYSTEMS, runs[-1])]
    table = Table(title=f"{os.path.basename(args.config)}, {args.device}: {', '.join(counts)}")
    for column in rows[0]:
        table.add_column(column, justify='left' if column in ('part', 'for each') else 'right')
    for row in rows:
        table.add_row(*(f'{value:.3g}' if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=140).print(table)
    if args.json:
        with open(args.json, 'w') as file:
            json.dump(dict(numbers, runs=runs, options=vars(args)), file, indent=2)


if __name__ == '__main__':
    usage.run(main)
