"""
Runs one plan to its result: claims the experiment's folder, routes output, ends cleanly when interrupted, and leaves a
summary next to the event files.
"""
import contextlib
import datetime
import os
import signal
import time
import traceback
from dataclasses import dataclass
from typing import Any, Dict, Iterator, Optional

import torch
from easydict import EasyDict

from lzero_kvcache.config import ConfigError
from lzero_kvcache.telemetry import sum_counters

from . import lightzero
from .checkpoints import read_checkpoint
from .data_parallel import DataParallel, Interrupted
from .output import Output
from .status import Result, Status
from .summary import (
    POOLS,
    add_up,
    cache_type,
    hit_rate,
    machine,
    peak_device_memory_mb,
    peak_host_memory_mb,
    read_summary,
    summary_rows,
    write_summary,
)
from .terminal import Terminal, number_text

UNBOUNDED = int(1e10)
LOG_FILE = os.path.join('log', 'train.log')
LOG_FILE_OF_RANK = os.path.join('log', 'train_rank{}.log')
TRAIN, EVALUATE = 'train', 'evaluate'
# The bar is redrawn four times a second; asking for counters more often than that is for nothing.
REFRESH_SECONDS = 0.25


@dataclass
class Plan:
    """
    Overview:
        All that a run needs to know, checked and complete. ``checkpoint`` is what a training goes on from, or what is
        evaluated; ``in_place`` training goes on in the checkpoint's own folder.
    """
    main_config: EasyDict
    create_config: EasyDict
    entry: str
    config: str
    seed: int = 0
    max_env_step: Optional[int] = None
    max_train_iter: Optional[int] = None
    threads: Optional[int] = None
    task: str = TRAIN
    checkpoint: Optional[str] = None
    in_place: bool = False


def run(plan: Plan, output: Output, terminal: Terminal, ranks: Optional[DataParallel] = None) -> Result:
    """
    Overview:
        Train or evaluate.
    Arguments:
        - plan (:obj:`Plan`): What to run.
        - output (:obj:`Output`): Where LightZero's output goes.
        - terminal (:obj:`Terminal`): Where progress and the summary go.
        - ranks (:obj:`Optional[DataParallel]`): The processes of the training; None for this one alone.
    Returns:
        - result (:obj:`Result`): How it ended; an error of the training itself is raised.
    """
    return _Run(plan, output, terminal, ranks or DataParallel()).run()


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
            name = exp_name + stamp + (f'_{attempt}' if attempt else '')
            attempt += 1
        except OSError as error:
            raise ConfigError(
                f'{exp_name}: the folder of the experiment cannot be made ({error.strerror}); give another --exp-name'
            ) from error


class _Run:

    def __init__(self, plan: Plan, output: Output, terminal: Terminal, ranks: Optional[DataParallel] = None) -> None:
        self.plan = plan
        self.ranks = ranks or DataParallel()
        self.output = output
        self.terminal = terminal
        self.status = Status()
        self.watch = lightzero.Watch(self._refresh, self._stop_if_asked, self.ranks)
        self._pid = os.getpid()
        self._asked: Optional[int] = None
        self._saving = False
        self._started = time.monotonic()
        self._next_refresh = 0.0
        self._before: Optional[Result] = None  # what a training in place goes on from

    def run(self) -> Result:
        plan = self.plan
        self._prepare()
        with self._signals():
            self.terminal.start(plan.max_env_step if plan.task == TRAIN else None, self.status.first_env_step)
            together = True
            try:
                outcome, code = self._work(), 0
                self._saving = True
                checkpoint = self.watch.latest_checkpoint()
            except BaseException as error:
                interrupt = self._interrupt(error)
                if interrupt is None:
                    self.output.write_log(traceback.format_exc())
                    raise
                outcome, code = f'interrupted by {interrupt}', 128 + interrupt.signum
                self._saving = True
                together = interrupt.agreed
                checkpoint = self.watch.save_checkpoint() if plan.task == TRAIN and self.ranks.main else None
            finally:
                self._refresh(now=True)
                self.terminal.finish(self.status)
                self.watch.close()
            # With ranks that have not agreed on ending, there is nothing to share.
            counters = lightzero.cache_counters(self.watch.cache)
            result = self._result(outcome, code, checkpoint, sum_counters(counters) if together else counters)
            if self.ranks.main:
                write_summary(result)
            if together:
                self.ranks.part()
        self.terminal.table('Training: ' + outcome if plan.task == TRAIN else 'Evaluation: ' + outcome,
                            summary_rows(result))
        return result

    def _prepare(self) -> None:
        """All that may turn out to be impossible comes before the folder; the folder comes before the work."""
        plan = self.plan
        if plan.threads:
            torch.set_num_threads(plan.threads)
        policy = plan.main_config.policy
        hooks = policy.get('learn', {}).get('learner', {}).get('hook', {})
        for path in (policy.get('model_path'), hooks.get('load_ckpt_before_run')):
            if path:
                read_checkpoint(path)  # LightZero and DI-engine load it without looking at what it holds
        if plan.checkpoint is not None:
            self.watch.checkpoint = read_checkpoint(plan.checkpoint)
            self.status.first_env_step = self.status.env_step = self.watch.checkpoint.env_step
            self.status.first_train_iter = self.status.train_iter = self.watch.checkpoint.train_iter
        done = self.status.first_env_step
        if plan.task == TRAIN and done >= (plan.max_env_step or UNBOUNDED):
            raise ConfigError(
                f'--resume {plan.checkpoint}: it stands at {done} environment steps, and max_env_step is '
                f'{plan.max_env_step}; give a higher --max-env-step'
            )
        lightzero.try_environment(plan.main_config, plan.create_config)
        self._join()
        place = os.path.relpath if plan.in_place else claim_folder
        exp_name = plan.main_config.exp_name = self.ranks.from_main(lambda: place(plan.main_config.exp_name))
        self._before = read_summary(exp_name) if plan.in_place else None
        self.watch.best_reward = None if self._before is None else self._before.best_reward
        log_file = LOG_FILE if self.ranks.main else LOG_FILE_OF_RANK.format(self.ranks.rank)
        self.output.attach(os.path.join(exp_name, log_file))
        if plan.task == EVALUATE:
            self.terminal.line(f'Evaluating {plan.checkpoint} into {exp_name}')
            return
        self.terminal.line(f'Training {plan.config} with {plan.entry} into {exp_name}')
        if plan.checkpoint is not None:
            self.terminal.line(
                f'Going on from {plan.checkpoint}: {done:,} env steps, {self.status.first_train_iter:,} iterations. '
                'A checkpoint holds no replay buffer, so collection begins with an empty one'
            )
        if plan.max_env_step is None and plan.max_train_iter is None:
            self.terminal.line('No max_env_step in the config and none given: it trains until interrupted (Ctrl-C)')

    def _join(self) -> None:
        plan, ranks = self.plan, self.ranks
        if ranks.several and plan.task == EVALUATE:
            raise ConfigError('--eval evaluates in one process; run it without torchrun')
        ranks.join(str(plan.main_config.policy.model.world_model_cfg.device))
        ranks.share_out(plan.main_config, lightzero.default_tree(plan.main_config, plan.create_config), plan.entry)

    def _work(self) -> str:
        plan = self.plan
        configs = (plan.main_config, plan.create_config)
        if plan.task == EVALUATE:
            lightzero.evaluate(configs, self.watch, plan.seed)
            return 'done'
        seed = self.ranks.seed(plan.seed, plan.main_config.env.collector_env_num) if self.ranks.several else plan.seed
        lightzero.run_entry(
            plan.entry, configs, self.watch, seed=seed, model_path=plan.main_config.policy.get('model_path'),
            max_train_iter=plan.max_train_iter or UNBOUNDED, max_env_step=plan.max_env_step or UNBOUNDED,
        )
        return 'reward reached env.stop_value' if self.watch.stopped else 'done'

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        previous: Dict[int, Any] = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)
        }
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
        self._asked = self.ranks.asked = signum
        wait = self.watch.updating if not self.ranks.several else self.watch.phase != 'start'
        if not (wait and first):
            raise Interrupted(signum)

    def _interrupt(self, error: BaseException) -> Optional[Interrupted]:
        """The interrupt that an error is: DI-engine's environments make their own of what is raised in a step."""
        if isinstance(error, Interrupted):
            return error
        return None if self._asked is None else Interrupted(self._asked)

    def _stop_if_asked(self) -> None:
        self.ranks.after_update()
        if self._asked is not None and not self.ranks.several:
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
            self.terminal.line(
                f'Evaluation after {evaluation.env_step:,} env steps, iteration {evaluation.train_iter:,}: '
                f'reward {number_text(evaluation.reward)}'
            )
        self.terminal.update(status)

    def _result(self, outcome: str, code: int, checkpoint: Optional[str], counters: Dict[str, Any]) -> Result:
        plan, status = self.plan, self.status
        world_model = plan.main_config.policy.model.world_model_cfg
        exp_name = plan.main_config.exp_name
        result = Result(
            outcome=outcome, exit_code=code, exp_name=exp_name, config=plan.config, entry=plan.entry, task=plan.task,
            cache=cache_type(world_model), seed=plan.seed, device=str(world_model.device),
            max_env_step=plan.max_env_step, max_train_iter=plan.max_train_iter,
            env_step=status.env_step, train_iter=status.train_iter, seconds=status.seconds,
            env_steps_per_second=status.speed, host_memory_mb=peak_host_memory_mb(),
            device_memory_mb=peak_device_memory_mb(), cache_memory_mb=counters.get('memory_mb'),
            hit_rates={pool: hit_rate(counters, pool) for pool in POOLS}, counters=counters,
            last_reward=status.last_reward, best_reward=status.best_reward, evaluations=status.evaluations,
            event_files=os.path.join(exp_name, 'log', 'serial'), checkpoint=checkpoint or plan.checkpoint,
            log_file=self.output.path, processes=self.ranks.size, machine=machine(),
        )
        return result if self._before is None else add_up(self._before, result)
