"""
Runs one training from a plan to a result: claims the experiment's folder, routes output, ends cleanly when interrupted, and
writes ``summary.json`` next to the event files.
"""
import contextlib
import datetime
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from easydict import EasyDict

from . import lightzero
from .output import Output
from .status import Result, Status
from .terminal import Terminal, number_text, rate_text

UNBOUNDED = int(1e10)
SUMMARY = 'summary.json'
LOG_FILE = os.path.join('log', 'train.log')
POOLS = ('total', 'init', 'recur')
# The bar is redrawn four times a second; asking for counters more often than that is for nothing.
REFRESH_SECONDS = 0.25


@dataclass
class Plan:
    """
    Overview:
        All that a run needs to know, checked and complete.
    """
    main_config: EasyDict
    create_config: EasyDict
    entry: str
    config: str
    seed: int = 0
    max_env_step: Optional[int] = None
    max_train_iter: Optional[int] = None


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to end. LightZero's ``except Exception`` does not catch it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def run(plan: Plan, output: Output, terminal: Terminal) -> Result:
    """
    Overview:
        Train.
    Arguments:
        - plan (:obj:`Plan`): What to run.
        - output (:obj:`Output`): Where LightZero's output goes.
        - terminal (:obj:`Terminal`): Where progress and the summary go.
    Returns:
        - result (:obj:`Result`): How it ended; an error of the training itself is raised.
    """
    return _Run(plan, output, terminal).run()


def claim_folder(exp_name: str) -> str:
    """
    Overview:
        Make the experiment's folder, and no one else's: a name that is taken gets the time appended.
    Arguments:
        - exp_name (:obj:`str`): A path, absolute or not.
    Returns:
        - exp_name (:obj:`str`): The folder that was made, relative, since DI-engine puts './' before it.
    """
    exp_name = os.path.relpath(os.path.expanduser(exp_name))
    stamp = datetime.datetime.now().strftime('_%y%m%d_%H%M%S')
    attempt = 0
    name = exp_name
    while True:
        try:
            os.makedirs(name)
            return name
        except FileExistsError:
            name = exp_name + stamp + ('_{}'.format(attempt) if attempt else '')
            attempt += 1


class _Run:

    def __init__(self, plan: Plan, output: Output, terminal: Terminal) -> None:
        self.plan = plan
        self.output = output
        self.terminal = terminal
        self.status = Status()
        self.watch = lightzero.Watch(self._refresh, self._stop_if_asked)
        self._asked: Optional[int] = None
        self._saving = False
        self._pid = os.getpid()
        self._started = time.monotonic()
        self._next_refresh = 0.0

    def run(self) -> Result:
        plan = self.plan
        lightzero.try_environment(plan.main_config, plan.create_config)
        exp_name = claim_folder(plan.main_config.exp_name)
        plan.main_config.exp_name = exp_name
        self.output.attach(os.path.join(exp_name, LOG_FILE))
        self.terminal.line('Training {} with {} into {}'.format(plan.config, plan.entry, exp_name))
        if plan.max_env_step is None and plan.max_train_iter is None:
            self.terminal.line('No max_env_step in the config and none given: it trains until interrupted (Ctrl-C)')
        checkpoint = None
        with self._signals():
            self.terminal.start(plan.max_env_step)
            try:
                lightzero.run_entry(
                    plan.entry, (plan.main_config, plan.create_config), self.watch, seed=plan.seed,
                    model_path=plan.main_config.policy.get('model_path'),
                    max_train_iter=plan.max_train_iter or UNBOUNDED, max_env_step=plan.max_env_step or UNBOUNDED,
                )
                outcome, code = ('reward reached env.stop_value' if self.watch.stopped else 'done'), 0
                checkpoint = self.watch.latest_checkpoint()
            except Interrupted as interrupt:
                outcome, code = 'interrupted by {}'.format(interrupt), 128 + interrupt.signum
                self._saving = True
                checkpoint = self.watch.save_checkpoint()
            except BaseException:
                self.output.write_log(traceback.format_exc())
                raise
            finally:
                self._refresh(now=True)
                self.terminal.finish(self.status)
                self.watch.close()
        result = self._result(outcome, code, checkpoint)
        _write_json(os.path.join(exp_name, SUMMARY), asdict(result))
        self.terminal.table('Training {}'.format(outcome), summary_rows(result))
        return result

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, signum: int, _: Any) -> None:
        # Ctrl-C goes to the environments' processes as well, which inherit this handler; their parent ends them.
        if os.getpid() != self._pid and signum == signal.SIGTERM:
            os._exit(128 + signum)
        if os.getpid() != self._pid or self._saving:
            return
        first = self._asked is None
        self._asked = signum
        if not (self.watch.updating and first):
            raise Interrupted(signum)

    def _stop_if_asked(self) -> None:
        if self._asked is not None:
            raise Interrupted(self._asked)

    def _refresh(self, now: bool = False) -> None:
        moment = time.monotonic()
        if not now and moment < self._next_refresh:
            return
        self._next_refresh = moment + REFRESH_SECONDS
        watch, status = self.watch, self.status
        status.phase, status.env_step, status.train_iter = watch.phase, watch.env_step, watch.train_iter
        status.seconds = moment - self._started
        status.hit_rate = hit_rate(lightzero.cache_counters(watch.cache), 'total')
        fresh = watch.evaluations[len(status.evaluations):]
        status.evaluations = list(watch.evaluations)
        for evaluation in fresh:
            self.terminal.line('Evaluation after {:,} env steps, iteration {:,}: reward {}'.format(
                evaluation.env_step, evaluation.train_iter, number_text(evaluation.reward)))
        self.terminal.update(status)

    def _result(self, outcome: str, code: int, checkpoint: Optional[str]) -> Result:
        plan, status = self.plan, self.status
        world_model = plan.main_config.policy.model.world_model_cfg
        counters = lightzero.cache_counters(self.watch.cache)
        exp_name = plan.main_config.exp_name
        return Result(
            outcome=outcome, exit_code=code, exp_name=exp_name, config=plan.config, entry=plan.entry,
            cache=cache_type(world_model), seed=plan.seed, device=str(world_model.device),
            env_step=status.env_step, train_iter=status.train_iter, seconds=status.seconds,
            env_steps_per_second=status.speed, host_memory_mb=peak_host_memory_mb(),
            device_memory_mb=peak_device_memory_mb(), cache_memory_mb=counters.get('memory_mb'),
            hit_rates={pool: hit_rate(counters, pool) for pool in POOLS}, counters=counters,
            last_reward=status.last_reward, best_reward=status.best_reward, evaluations=status.evaluations,
            event_files=os.path.join(exp_name, 'log', 'serial'), checkpoint=checkpoint, log_file=self.output.path,
        )


def cache_type(world_model_cfg: EasyDict) -> str:
    """
    Overview:
        Which cache a config picks.
    Arguments:
        - world_model_cfg (:obj:`EasyDict`): The world model's config.
    Returns:
        - name (:obj:`str`): 'old', 'new', or the name of a registered manager.
    """
    if not world_model_cfg.get('use_new_cache_manager', False):
        return 'old'
    return (world_model_cfg.get('kv_cache_cfg') or {}).get('type') or 'new'


def hit_rate(counters: Dict[str, Any], pool: str) -> Optional[float]:
    """
    Overview:
        The share of look-ups that found something.
    Arguments:
        - counters (:obj:`Dict[str, Any]`): As from ``lightzero.cache_counters``.
        - pool (:obj:`str`): 'init', 'recur' or 'total'.
    Returns:
        - rate (:obj:`Optional[float]`): None before the first look-up.
    """
    pool_counters = counters.get(pool) or {}
    queries = pool_counters.get('queries')
    return pool_counters.get('hits', 0) / queries if queries else None


def peak_host_memory_mb() -> Optional[float]:
    """
    Overview:
        The most memory that this process has held.
    Returns:
        - megabytes (:obj:`Optional[float]`): None where the system does not tell.
    """
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024. ** 2 if sys.platform == 'darwin' else 1024.)


def peak_device_memory_mb() -> Optional[float]:
    """
    Overview:
        The most memory that torch has held on the GPU.
    Returns:
        - megabytes (:obj:`Optional[float]`): None if no GPU was used.
    """
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return torch.cuda.max_memory_allocated() / 1024. ** 2


def summary_rows(result: Result) -> List[Tuple[str, str]]:
    """
    Overview:
        The table at the end of a run.
    Arguments:
        - result (:obj:`Result`): The run.
    Returns:
        - rows (:obj:`List[Tuple[str, str]]`): Names and values.
    """
    def megabytes(value: Optional[float]) -> str:
        return '-' if value is None else '{} MB'.format(number_text(value))

    last = result.evaluations[-1] if result.evaluations else None
    reward = '- (no evaluation yet; policy.eval_freq says how often)' if last is None else '{} after {:,} steps'.format(
        number_text(last.reward), last.env_step)
    rates = '  '.join('{} {}'.format(pool, rate_text(result.hit_rates[pool])) for pool in POOLS)
    return [
        ('cache system', result.cache),
        ('time', str(datetime.timedelta(seconds=round(result.seconds)))),
        ('environment steps', '{:,}'.format(result.env_step)),
        ('training iterations', '{:,}'.format(result.train_iter)),
        ('steps per second', number_text(result.env_steps_per_second)),
        ('peak memory, host', megabytes(result.host_memory_mb)),
        ('peak memory, device', megabytes(result.device_memory_mb)),
        ('cache memory', megabytes(result.cache_memory_mb)),
        ('hit rates', rates),
        ('last reward', reward),
        ('best reward', number_text(result.best_reward)),
        ('event files', result.event_files),
        ('checkpoint', result.checkpoint or '-'),
        ('log', result.log_file or '-'),
    ]


def _write_json(path: str, content: Dict[str, Any]) -> None:
    temporary = path + '.tmp'
    with open(temporary, 'w', encoding='utf-8') as file:
        json.dump(content, file, indent=2, default=str)
    os.replace(temporary, path)
