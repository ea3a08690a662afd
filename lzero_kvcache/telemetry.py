"""The cache's numbers in tensorboard (and wandb) at every training iteration, and its options, once."""
import contextlib
import importlib
from typing import Any, Dict, List, Tuple

import torch.distributed as dist
from ding.worker.learner.learner_hook import LearnerHook, register_learner_hook

from .run_files import POOLS, Record

HOOK_KEY = 'kv_cache_stats'
HOOK_CONFIG = {'type': HOOK_KEY, 'name': HOOK_KEY, 'priority': 30, 'position': 'after_iter'}
VALIDATION = 'kv_cache_validation'
METRICS = ('hit_rate', 'queries', 'hits', 'misses', 'evictions', 'occupancy')

# One chart for each number, the most important first; tensorboard gives each run a colour.
LAYOUT = {
    'reward': {'evaluation': ['Multiline', ['evaluator_iter/reward_mean']]},
    'kv_cache': {
        name: ['Multiline', [f'kv_cache_iter/{name}']]
        for name in ('total_hit_rate', 'search_ms', 'init_hit_rate', 'step_ms', 'recur_hit_rate', 'memory_mb',
                     *(f'{pool}_{metric}' for metric in METRICS[1:] for pool in POOLS))
    },
}
# The columns of tensorboard's page of hyperparameters, each with a value of its type. The page takes them from one of
# the runs, so every run declares all of them, in the old system too. It sorts them, and shows the first five.
HYPERPARAMETERS: Dict[str, Any] = {
    'cache_system': '', 'environment': '', 'seed': 0,
    **{f'sizes.{name}': 0 for name in ('context_length', 'env_num', 'init_pool_size', 'num_simulations',
                                       'recurrent_pool_size')},
    **{f'storage.{name}': '' for name in ('backend', 'dtype', 'eviction')},
}
# The metrics on that page.
COMPARED = (
    'evaluator_iter/reward_mean', 'kv_cache_iter/total_hit_rate', 'kv_cache_iter/search_ms', 'kv_cache_iter/memory_mb'
)


def manager_of(policy: Any) -> Any:
    """The cache manager of the model in DI-engine's view on a policy; None if the model is not the plugin's."""
    return getattr(policy.get_attribute('model').world_model, 'kv_cache_manager', None)


def counters_of(policy: Any) -> Dict[str, Any]:
    """The counters of a policy's model; their memory includes the cache of the target model, which answers for target
    values and reanalyses; nothing if the model is not the plugin's."""
    manager = manager_of(policy)
    if manager is None:
        return {}
    counters = manager.counters()
    with contextlib.suppress(NotImplementedError):  # of a policy that does not learn
        of_target = policy.get_attribute('target_model').world_model.kv_cache_manager.counters()
        if 'memory_mb' in counters and 'memory_mb' in of_target:
            return {**counters, 'memory_mb': counters['memory_mb'] + of_target['memory_mb']}
    return counters


def saved_config(engine: Any) -> Dict[str, Any]:
    """The config that was saved in the folder of DI-engine's learner, which itself has that of its policy alone; parsed
    once."""
    if not hasattr(engine, 'kv_cache_config'):
        engine.kv_cache_config = Record(engine.exp_name).read().config
    return engine.kv_cache_config


def summed_over_ranks(numbers: Dict[str, Any]) -> Dict[str, Any]:
    """Nested dicts with the sums of all ranks' numbers, and means of occupancies; all ranks must ask."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return numbers
    of_ranks: List[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, numbers)
    return _summed(of_ranks)


def _summed(parts: List[Dict[str, Any]]) -> Dict[str, Any]:
    summed: Dict[str, Any] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        summed[name] = _summed(values) if isinstance(values[0], dict) else sum(values)
        if name == 'occupancy':
            summed[name] /= len(parts)
    return summed


class KVCacheStatsHook(LearnerHook):
    """
    After each training iteration, writes ``kv_cache_iter/POOL_METRIC`` against iterations and
    ``kv_cache_step/POOL_METRIC`` against environment steps. Counters are cumulative; a rate or a mean time covers what
    was new since the training phase before, and holds until there is more. In data-parallel training the first rank
    writes what all ranks counted.
    """

    def __init__(self, *args: Any, ext_args: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._seen: Dict[str, Tuple[float, ...]] = {}
        self._means: Dict[str, float] = {}
        self._introduced = False

    def __call__(self, engine: Any) -> None:
        """Write one point under every tag; ``engine`` is DI-engine's learner. Ranks without a logger write nothing."""
        policy, writer = engine.policy, engine.tb_logger
        counters, world_model = counters_of(policy), policy.get_attribute('model').world_model
        if not counters:
            return
        timings = {name: vars(timing) for name, timing in world_model.timings.items()}
        counted = summed_over_ranks(dict(counters=counters, timings=timings))
        if writer is None:
            return
        if not self._introduced:
            self._introduced = True
            writer.add_custom_scalars(LAYOUT)
            saved = saved_config(engine)
            known = dict(
                world_model.hyperparameters, num_simulations=policy.get_attribute('cfg').num_simulations,
                environment=saved.get('env.env_id', saved.get('env.type')), seed=saved.get('seed'))
            shown = {name: known.get(name.rpartition('.')[2]) for name in HYPERPARAMETERS}
            write_hyperparameters(writer, {name: value for name, value in shown.items() if value is not None})
        values = self.values(**counted)
        validator = getattr(world_model, 'validator', None)
        validated = {} if validator is None else validator.tally.read()
        validated = {f'{VALIDATION}/{name}': value for name, value in validated.items()}
        by_step = {f'kv_cache_step/{name}': value for name, value in values.items()}
        by_iteration = {f'kv_cache_iter/{name}': value for name, value in values.items()}
        write_scalars(writer, engine.last_iter.val, {**by_iteration, **validated})
        write_scalars(writer, engine.collector_envstep, by_step)
        if policy.get_attribute('cfg').get('use_wandb', False):
            import wandb
            wandb.log({**by_step, **validated}, step=engine.collector_envstep)

    def values(self, counters: Dict[str, Any], timings: Dict[str, Dict[str, Any]]) -> Dict[str, float]:
        """The values of a manager's ``counters()`` and a world model's times by tag; means are left out before the
        first query, search or step."""
        values: Dict[str, float] = {
            name: counters[name] for name in ('memory_mb', 'captures', 'skipped') if name in counters
        }
        for pool in POOLS:
            counts = counters.get(pool)
            if counts is not None:
                values.update({f'{pool}_{metric}': counts[metric] for metric in METRICS if metric in counts})
                queries, hits = counts['queries'], counts['hits']
                self._renew(f'{pool}_hit_rate', queries, hits, queries - hits)
        for name, timing in timings.items():
            self._renew(f'{name}_ms', timing['count'], 1e3 * timing['seconds'])
        return {**values, **self._means}

    def _renew(self, name: str, count: int, *amounts: float) -> None:
        """Keep the mean of the first amount since the call before, if anything was counted since then."""
        now = (count, *amounts)
        before = self._seen.get(name, now)
        if name not in self._seen or any(new < old for new, old in zip(now, before)):
            before = (0, ) * len(now)  # nothing was counted before, or the statistics were reset
        if count > before[0]:
            self._means[name] = (amounts[0] - before[1]) / (count - before[0])
        self._seen[name] = now


def write_scalars(tb_logger: Any, step: int, values: Dict[str, float]) -> None:
    """Write points of one step as one event: an event for each would take a fifth of a small training's iteration."""
    scalar = _summaries(tb_logger).scalar
    together, *others = [scalar(name, value) for name, value in values.items()]
    for other in others:
        together.MergeFrom(other)
    tb_logger._get_file_writer().add_summary(together, step)


def write_hyperparameters(tb_logger: Any, values: Dict[str, Any]) -> None:
    """Write the ``HYPERPARAMETERS`` that a run has into its own event file. The ``add_hparams`` of torch's and of
    tensorboardX's writers would begin another file, and say that the run has ended."""
    writer, summary = tb_logger._get_file_writer(), _summaries(tb_logger)
    writer.add_summary(summary.hparams(HYPERPARAMETERS, dict.fromkeys(COMPARED, 0.))[0])
    writer.add_summary(summary.hparams(values, {})[1])


def _summaries(tb_logger: Any) -> Any:
    """The module beside torch's or tensorboardX's writer, with functions that make messages of the writer's kind."""
    return importlib.import_module(type(tb_logger._get_file_writer()).__module__.rpartition('.')[0] + '.summary')


register_learner_hook(HOOK_KEY, KVCacheStatsHook)
