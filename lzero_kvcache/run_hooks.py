"""
Learner hooks for trainings that call LightZero's own entry: the folder is held, how far they are is logged and written
from time to time, and a summary at the end. ``train.py`` removes them, and shows more itself.
"""
import contextlib
import logging
import os
import time
from dataclasses import replace
from itertools import repeat
from typing import Any, Callable, Dict, List, Optional, Tuple

from ding.worker.learner.learner_hook import LearnerHook

from .config import ConfigError, picked_manager
from .lock_files import training_in
from .run_files import DONE, EVALUATIONS, EVENT_FILES, event_files, readable_events
from .summary import SUMMARY, Evaluation, Result, begun, number_text, rate_text, reward_text
from .telemetry import HOOK_CONFIG, HOOK_KEY, counters_of, manager_of, saved_config, summed_over_ranks

logger = logging.getLogger(__name__)

EVERY_SECONDS = 30.
LOSS = 'weighted_total_loss'
LOSS_TAG = f'learner_iter/{LOSS}_avg'
# Mean, standard deviation and number of episodes of each evaluation.
EVALUATED = tuple(EVALUATIONS[0] + name for name in ('reward_mean', 'reward_std', 'episode_count'))
EVALUATED_STEPS = EVALUATIONS[1] + 'reward_mean'


class RunHook(LearnerHook):
    """Begins a run, reports its progress or ends it, depending on its position. The hooks of a learner share the run. A
    subclass reads the values of the entry that trains."""
    entry_that_trains: Callable[[], Dict[str, Any]]  # its limits, its name, and the file that has called it
    rewards_of_entry: Callable[[], Dict[str, Any]]  # the last and the best

    def __call__(self, engine: Any) -> None:
        """``engine`` is DI-engine's learner. There is no run if the model is not the plugin's."""
        if manager_of(engine.policy) is not None:
            if not hasattr(engine, 'kv_cache_run'):
                engine.kv_cache_run = Run(engine, self)
            getattr(engine.kv_cache_run, self.position)(engine)


class Run:
    """A run of LightZero's entry: when it began, how far it is, and when it is to stop. It holds the
    run's folder, so that no second training goes on in it, until it ends, or its process does."""

    def __init__(self, engine: Any, hook: RunHook) -> None:
        self._rewards = hook.rewards_of_entry
        self._began = self._next = time.monotonic()  # when the next line is due
        self._holding = contextlib.ExitStack()
        cfg, folder = engine.policy.get_attribute('cfg'), engine.exp_name
        self._result = begun(
            saved_config(engine).get('seed', 0), device=str(cfg.device), exp_name=folder,
            event_files=os.path.join(folder, EVENT_FILES), processes=engine.world_size,
            **hook.entry_that_trains())
        self._result.cache = picked_manager(cfg.model.world_model_cfg)
        self._result.versions['LightZero'] = engine.policy.get_attribute('model').world_model.lightzero_version

    def before_run(self, engine: Any) -> None:
        """Hold the folder; the first rank does, and writes that the run has begun."""
        if engine.rank == 0:
            result, folder = self._look(engine), engine.exp_name
            self._holding.enter_context(training_in(folder, folder))
            write_progress(result, 'start')

    def after_iter(self, engine: Any) -> None:
        """Log a line from time to time, and write how far the run is: the record of one that is killed."""
        now = time.monotonic()
        if engine.rank == 0 and now >= self._next:
            self._next = now + EVERY_SECONDS
            result = replace(self._look(engine), loss=engine.log_buffer['scalar'].get(LOSS), **self._rewards())
            logger.info(result.line('train'))
            write_progress(result, 'train')

    def after_run(self, engine: Any) -> None:
        """Add up the counts of all ranks; the first one writes ``summary.json`` and logs a line."""
        result = self._look(engine)
        counters = summed_over_ranks(result.counters)
        if engine.rank != 0:
            return
        engine.tb_logger.flush()
        seen = read_events(result.event_files)
        evaluations = seen.evaluations
        rewards = [evaluation.reward for evaluation in evaluations]
        result = result.at_its_end(
            counters, outcome=DONE, exit_code=0, evaluations=evaluations, loss=seen.loss,
            last_reward=rewards[-1] if rewards else None, best_reward=max(rewards, default=None))
        result.write()
        result.write_progress('end')
        self._holding.close()
        rates = ', '.join(f'{pool} {rate_text(rate)}' for pool, rate in result.hit_rates.items())
        last = reward_text(evaluations[-1]) if evaluations else number_text(None)
        logger.info(
            f'Hit rates of the cache: {rates}; its memory: {number_text(result.cache_memory_mb)} MiB; last reward '
            f'{last}, best {number_text(result.best_reward)}. {os.path.join(engine.exp_name, SUMMARY)} has all numbers')

    def _look(self, engine: Any) -> Result:
        """The result of the run so far."""
        result = self._result
        result.env_step = result.collected_env_step = max(0, engine.collector_envstep)
        result.train_iter, result.seconds = engine.last_iter.val, time.monotonic() - self._began
        result.env_steps_per_second = result.env_step / result.seconds
        result.count(counters_of(engine.policy))
        return result


def write_progress(result: Result, phase: str) -> None:
    """How far a run is. Its evaluations would have to be looked for in its event files, which grow."""
    result.write_progress(phase, evaluations=None)


class Seen:
    """The evaluations in event files, and the last loss, as far as events were added. LightZero's evaluator writes each
    number twice, against iterations and against steps."""

    def __init__(self) -> None:
        self.loss: Optional[float] = None
        self._found: Dict[str, Dict[str, List[Tuple[int, float]]]] = {}  # of each file, since each may break off

    def add(self, path: str, event: Any) -> None:
        """An event of a file."""
        found = self._found.setdefault(path, {tag: [] for tag in (*EVALUATED, EVALUATED_STEPS)})
        for value in event.summary.value:
            if value.tag == LOSS_TAG:
                self.loss = value.simple_value
            elif value.tag in found:
                found[value.tag].append((event.step, value.simple_value))

    @property
    def evaluations(self) -> List[Evaluation]:
        """All of them, as they stand in the files."""
        found_in = [([found[tag] for tag in EVALUATED], found[EVALUATED_STEPS]) for found in self._found.values()]
        return [
            Evaluation(step, iteration, reward, deviation, None if episodes is None else int(episodes))
            for (means, deviations, counts), steps in found_in
            for (step, _), (iteration, reward), (_, deviation), (_, episodes)
            in zip(steps, means, deviations or repeat((0, None)), counts or repeat((0, None)))
        ]


def read_events(folder: str) -> Seen:
    """The events in the files of a folder, with a warning for an unreadable file; a script may log elsewhere."""
    seen = Seen()
    for path in event_files(folder):
        try:
            for _, event in readable_events(path):
                seen.add(path, event)
        except ConfigError as error:
            logger.warning(str(error))
    return seen


BEGIN_HOOK, PROGRESS_HOOK, SUMMARY_HOOK = 'kv_cache_folder', 'kv_cache_progress', 'kv_cache_summary'
# By the key under which they stand in a policy's default config. DI-engine's own are at 20: one clears the losses, one
# saves the last checkpoint.
HOOKS = {
    HOOK_KEY: HOOK_CONFIG,
    BEGIN_HOOK: dict(type=BEGIN_HOOK, name=BEGIN_HOOK, priority=15, position='before_run'),
    PROGRESS_HOOK: dict(type=PROGRESS_HOOK, name=PROGRESS_HOOK, priority=15, position='after_iter'),
    SUMMARY_HOOK: dict(type=SUMMARY_HOOK, name=SUMMARY_HOOK, priority=30, position='after_run'),
}
