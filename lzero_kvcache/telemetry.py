"""The cache's numbers in tensorboard (and wandb) at every training iteration."""
from typing import Any, Dict, Tuple

from ding.worker.learner.learner_hook import LearnerHook, register_learner_hook

from .stats import Timing

HOOK_KEY = 'kv_cache_stats'
HOOK_CONFIG = {'type': HOOK_KEY, 'name': HOOK_KEY, 'priority': 30, 'position': 'after_iter'}
POOLS = ('init', 'recur', 'total')
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


class KVCacheStatsHook(LearnerHook):
    """
    Overview:
        After each training iteration, write ``kv_cache_iter/POOL_METRIC`` against iterations and
        ``kv_cache_step/POOL_METRIC`` against environment steps. Counters are cumulative; a rate covers the searches
        since the training phase before, and holds until there are newer ones.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.pop('ext_args', None)
        super().__init__(*args, **kwargs)
        self._seen: Dict[str, Tuple[int, int]] = {}
        self._rates: Dict[str, float] = {}
        self._timed: Dict[str, Timing] = {}
        self._means: Dict[str, float] = {}
        self._laid_out = False

    def __call__(self, engine: Any) -> None:
        """
        Overview:
            Write one point under every tag. Ranks without a logger do nothing.
        Arguments:
            - engine (:obj:`Any`): DI-engine's learner.
        """
        world_model = engine.policy.get_attribute('model').world_model
        manager = getattr(world_model, 'kv_cache_manager', None)
        if manager is None or engine.tb_logger is None:
            return
        if not self._laid_out:
            engine.tb_logger.add_custom_scalars(LAYOUT)
            self._laid_out = True
        values = {**self.values(manager.counters()), **self.times(world_model.timings)}
        iteration, step = engine.last_iter.val, engine.collector_envstep
        for name, value in values.items():
            engine.tb_logger.add_scalar(f'kv_cache_iter/{name}', value, iteration)
            engine.tb_logger.add_scalar(f'kv_cache_step/{name}', value, step)
        if engine.policy.get_attribute('cfg').get('use_wandb', False):
            import wandb
            wandb.log({f'kv_cache_step/{name}': value for name, value in values.items()}, step=step)

    def values(self, counters: Dict[str, Any]) -> Dict[str, float]:
        """
        Overview:
            One point of every tag.
        Arguments:
            - counters (:obj:`Dict[str, Any]`): What a manager's ``counters()`` returns.
        Returns:
            - values (:obj:`Dict[str, float]`): By ``POOL_METRIC``, and ``memory_mb``. A rate is left out before the \
                first query.
        """
        values = {'memory_mb': counters['memory_mb']}
        for pool in POOLS:
            counts = counters.get(pool)
            if counts is None:
                continue
            values.update({f'{pool}_{metric}': counts[metric] for metric in METRICS if metric in counts})
            queries, hits = self._seen.get(pool, (0, 0))
            if counts['queries'] < queries:  # somebody reset the statistics
                queries, hits = 0, 0
            if counts['queries'] > queries:
                self._rates[pool] = (counts['hits'] - hits) / (counts['queries'] - queries)
            self._seen[pool] = (counts['queries'], counts['hits'])
            if pool in self._rates:
                values[f'{pool}_hit_rate'] = self._rates[pool]
        return values

    def times(self, timings: Dict[str, Timing]) -> Dict[str, float]:
        """
        Overview:
            Mean milliseconds of a search and of a recurrent step since there were last new ones.
        Arguments:
            - timings (:obj:`Dict[str, Timing]`): What a world model recorded, cumulative.
        Returns:
            - values (:obj:`Dict[str, float]`): ``search_ms`` and ``step_ms``; left out before the first.
        """
        for name, timing in timings.items():
            before = self._timed.get(name, Timing())
            if timing.count > before.count:
                self._means[f'{name}_ms'] = 1e3 * (timing.seconds - before.seconds) / (timing.count - before.count)
                self._timed[name] = Timing(timing.count, timing.seconds)
        return self._means


register_learner_hook(HOOK_KEY, KVCacheStatsHook)
