"""The cache's numbers in tensorboard (and wandb) at every training iteration, and its options, once."""
import importlib
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.distributed as dist
from ding.worker.learner.learner_hook import LearnerHook, register_learner_hook

from .cache.stats import Timing

HOOK_KEY = 'kv_cache_stats'
HOOK_CONFIG = {'type': HOOK_KEY, 'name': HOOK_KEY, 'priority': 30, 'position': 'after_iter'}
POOLS = ('init', 'recur', 'total')
VALIDATION = 'kv_cache_validation'
METRICS = ('hit_rate', 'queries', 'hits', 'misses', 'evictions', 'occupancy')

_SHOWN_TOGETHER = {
    'hit_rate': ('hit_rate',), 'hits and misses': ('hits', 'misses'), 'evictions': ('evictions',),
    'occupancy': ('occupancy',)
}
LAYOUT = {
    'kv_cache': {
        **{
            title: ['Multiline', [f'kv_cache_iter/{pool}_{metric}' for pool in POOLS for metric in metrics]]
            for title, metrics in _SHOWN_TOGETHER.items()
        },
        'memory': ['Multiline', ['kv_cache_iter/memory_mb']],
        'time': ['Multiline', ['kv_cache_iter/search_ms', 'kv_cache_iter/step_ms']],
    }
}
# What tensorboard's page of hyperparameters shows of a run, each with a value of its type. The page takes the list from
# one of the runs, so each run names all of it, one of the old system too.
HYPERPARAMETERS: Dict[str, Any] = {
    **dict.fromkeys(('cache_system', 'cache_manager', 'eviction', 'dtype', 'backend'), ''),
    **dict.fromkeys(('init_pool_size', 'recurrent_pool_size', 'env_num', 'num_simulations', 'context_length'), 0),
}
# The metrics on that page.
COMPARED = (
    'kv_cache_iter/total_hit_rate', 'kv_cache_iter/search_ms', 'kv_cache_iter/memory_mb', 'evaluator_iter/reward_mean'
)


class Point(NamedTuple):
    """What was counted up to a training iteration."""
    counters: Dict[str, Any]
    timings: Dict[str, Timing]
    iteration: int
    env_step: int


class RankSums:
    """Sums the numbers of all ranks while they go on training. Every rank must ask equally often."""

    def __init__(self) -> None:
        self._pending: Optional[Tuple[Any, torch.Tensor, Point]] = None

    def exchange(self, point: Point) -> Optional[Point]:
        """Send this rank's numbers off, and return the sums of what all ranks sent at the iteration before; None at the
        first. By now all of them have exchanged the gradients of a later iteration, so that none waits for another."""
        numbers = _numbers(point.counters, point.timings)
        work = dist.all_reduce(numbers, async_op=True)
        sums = self.last()
        self._pending = work, numbers, point
        return sums

    def last(self) -> Optional[Point]:
        """The sums that are still to come, once."""
        if self._pending is None:
            return None
        work, numbers, point = self._pending
        self._pending = None
        work.wait()
        return _with_numbers(point, numbers)


def several_ranks() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_counters(counters: Dict[str, Any]) -> Dict[str, Any]:
    """The sums of all ranks' counters, in which occupancies are means; all ranks must ask."""
    if not several_ranks():
        return counters
    numbers = _numbers(counters, {})
    dist.all_reduce(numbers)
    return _with_numbers(Point(counters, {}, 0, 0), numbers).counters


def _numbers(counters: Dict[str, Any], timings: Dict[str, Timing]) -> torch.Tensor:
    """In an order that is the same on all ranks, since they have the same config."""
    numbers: List[float] = [counters.get('memory_mb', 0.), counters.get('skipped', 0)]
    for pool in POOLS:
        numbers += [float(value) for _, value in sorted(counters.get(pool, {}).items())]
    for _, timing in sorted(timings.items()):
        numbers += [timing.count, timing.seconds]
    device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _with_numbers(point: Point, numbers: torch.Tensor) -> Point:
    values = iter(numbers.tolist())
    counters: Dict[str, Any] = {'memory_mb': next(values)}
    skipped = int(next(values))
    if 'skipped' in point.counters:
        counters['skipped'] = skipped
    for pool in POOLS:
        if pool in point.counters:
            counters[pool] = {name: type(value)(next(values)) for name, value in sorted(point.counters[pool].items())}
            if 'occupancy' in counters[pool]:
                counters[pool]['occupancy'] /= dist.get_world_size()
    timings = {name: Timing(int(next(values)), next(values)) for name in sorted(point.timings)}
    return Point(counters, timings, point.iteration, point.env_step)


class KVCacheStatsHook(LearnerHook):
    """
    After each training iteration, writes ``kv_cache_iter/POOL_METRIC`` against iterations and
    ``kv_cache_step/POOL_METRIC`` against environment steps. Counters are cumulative; a rate covers the searches since
    the training phase before, and holds until there are newer ones. In data-parallel training the first rank writes
    what all ranks counted, one iteration late.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.pop('ext_args', None)
        super().__init__(*args, **kwargs)
        self._seen: Dict[str, Tuple[int, int]] = {}
        self._rates: Dict[str, float] = {}
        self._timed: Dict[str, Timing] = {}
        self._means: Dict[str, float] = {}
        self._introduced = False
        self._sums: Optional[RankSums] = None

    def __call__(self, engine: Any) -> None:
        """Write one point under every tag; ``engine`` is DI-engine's learner. Ranks without a logger write nothing."""
        world_model = engine.policy.get_attribute('model').world_model
        manager = getattr(world_model, 'kv_cache_manager', None)
        if manager is None:
            return
        point: Optional[Point] = Point(
            manager.counters(), world_model.timings, engine.last_iter.val, engine.collector_envstep
        )
        if several_ranks():
            if self._sums is None:
                self._sums = RankSums()
                engine.register_hook(_LastPoint(self))
            point = self._sums.exchange(point)  # type: ignore[arg-type]
        self.write(engine, point)

    def write_last(self, engine: Any) -> None:
        """Write the point of the last iteration, which is late."""
        if self._sums is not None:
            self.write(engine, self._sums.last())

    def write(self, engine: Any, point: Optional[Point]) -> None:
        """Write one point under every tag, if there is one."""
        if point is None or engine.tb_logger is None:
            return
        if not self._introduced:
            self._introduced = True
            engine.tb_logger.add_custom_scalars(LAYOUT)
            policy = engine.policy
            world_model = policy.get_attribute('model').world_model
            write_hyperparameters(engine.tb_logger, {
                **world_model.hyperparameters, 'num_simulations': policy.get_attribute('cfg').num_simulations
            })
        values = {**self.values(point.counters), **self.times(point.timings)}
        for name, value in values.items():
            engine.tb_logger.add_scalar(f'kv_cache_iter/{name}', value, point.iteration)
            engine.tb_logger.add_scalar(f'kv_cache_step/{name}', value, point.env_step)
        validator = getattr(engine.policy.get_attribute('model').world_model, 'validator', None)
        validated = {} if validator is None else validator.tally.read()
        for name, value in validated.items():
            engine.tb_logger.add_scalar(f'{VALIDATION}/{name}', value, point.iteration)
        if engine.policy.get_attribute('cfg').get('use_wandb', False):
            import wandb
            logged = {f'kv_cache_step/{name}': value for name, value in values.items()}
            logged.update({f'{VALIDATION}/{name}': value for name, value in validated.items()})
            wandb.log(logged, step=point.env_step)

    def values(self, counters: Dict[str, Any]) -> Dict[str, float]:
        """The values of a manager's ``counters()`` by tag; a rate is left out before the first query."""
        values: Dict[str, float] = {name: counters[name] for name in ('memory_mb', 'skipped') if name in counters}
        for pool in POOLS:
            counts = counters.get(pool)
            if counts is None:
                continue
            values.update({f'{pool}_{metric}': counts[metric] for metric in METRICS if metric in counts})
            queries, hits = self._seen.get(pool, (0, 0))
            if counts['hits'] < hits or counts['queries'] - counts['hits'] < queries - hits:
                queries, hits = 0, 0  # somebody reset the statistics
            if counts['queries'] > queries:
                self._rates[pool] = (counts['hits'] - hits) / (counts['queries'] - queries)
            self._seen[pool] = (counts['queries'], counts['hits'])
            if pool in self._rates:
                values[f'{pool}_hit_rate'] = self._rates[pool]
        return values

    def times(self, timings: Dict[str, Timing]) -> Dict[str, float]:
        """Mean milliseconds of a search and of a recurrent step since there were last new ones; left out before the
        first. ``timings`` are a world model's, cumulative."""
        for name, timing in timings.items():
            before = self._timed.get(name, Timing())
            if timing.count > before.count:
                self._means[f'{name}_ms'] = 1e3 * (timing.seconds - before.seconds) / (timing.count - before.count)
                self._timed[name] = Timing(timing.count, timing.seconds)
        return self._means


def write_hyperparameters(tb_logger: Any, values: Dict[str, Any]) -> None:
    """Write the ``HYPERPARAMETERS`` that a run has into its own event file. The ``add_hparams`` of torch's and of
    tensorboardX's writers would begin another file, and say that the run has ended."""
    writer = tb_logger._get_file_writer()
    # Both have the same function for this beside their writer, each for messages of its own kind.
    summary = importlib.import_module(type(writer).__module__.rpartition('.')[0] + '.summary')
    writer.add_summary(summary.hparams(HYPERPARAMETERS, dict.fromkeys(COMPARED, 0.))[0])
    writer.add_summary(summary.hparams(values, {})[1])


class _LastPoint(LearnerHook):
    """At the end of a data-parallel training."""

    def __init__(self, hook: KVCacheStatsHook) -> None:
        super().__init__(name=f'{HOOK_KEY}_last', priority=hook.priority, position='after_run')
        self._hook = hook

    def __call__(self, engine: Any) -> None:
        self._hook.write_last(engine)


register_learner_hook(HOOK_KEY, KVCacheStatsHook)
