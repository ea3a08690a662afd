"""LightZero's training entries as they are run, its evaluator alone, and what they need of the process."""
import functools
import os
from typing import Any, Callable, Tuple

from easydict import EasyDict

from ..config import ConfigError
from .patches import applied

Configs = Tuple[EasyDict, EasyDict]
"""``main_config`` and ``create_config``."""


def run_entry(entry: str, configs: Configs, **arguments: Any) -> Any:
    """Run an entry; returns the trained policy."""
    import lzero.entry

    from .buffers import reanalyzed_in_arrays, targets_of_engine
    with applied(reanalysis=reanalyzed_in_arrays, targets=targets_of_engine):
        return getattr(lzero.entry, entry)(list(configs), **arguments)


def make_evaluator(configs: Configs, seed: int, derive: Callable[[type], type], load: Callable[[Any], None]) -> Any:
    """
    LightZero's evaluator alone, of a class that ``derive`` makes of LightZero's, with a policy that ``load`` has
    filled: LightZero's own entry for this refuses sampled UniZero.
    """
    from ding.config import compile_config
    from ding.envs import create_env_manager, get_vec_env_setting
    from ding.policy import create_policy
    from ding.utils import set_pkg_seed
    from lzero.worker import MuZeroEvaluator
    from torch.utils.tensorboard import SummaryWriter
    cfg = compile_config(
        configs[0], seed=seed, env=None, auto=True, create_cfg=configs[1], save_cfg=True, renew_dir=False
    )
    env_fn, _, env_configs = get_vec_env_setting(cfg.env, collect=False)
    env = create_env_manager(cfg.env.manager, [functools.partial(env_fn, cfg=config) for config in env_configs])
    env.seed(seed, dynamic_seed=False)
    set_pkg_seed(seed, use_cuda=cfg.policy.cuda)
    policy = create_policy(cfg.policy, enable_field=['learn', 'collect', 'eval'])
    load(policy.learn_mode)
    return derive(MuZeroEvaluator)(
        eval_freq=cfg.policy.eval_freq, n_evaluator_episode=cfg.env.n_evaluator_episode, stop_value=cfg.env.stop_value,
        env=env, policy=policy.eval_mode, tb_logger=SummaryWriter(os.path.join(cfg.exp_name, 'log', 'serial')),
        exp_name=cfg.exp_name, policy_config=cfg.policy,
    )


def join_gpus() -> None:
    """Meet the other processes of a multi-GPU training, one on each GPU."""
    from ding.utils import dist_init
    dist_init()


def set_steps(collector: Any, env_step: int) -> None:
    """Have a collector count from so many environment steps on."""
    collector._total_envstep_count = env_step


def set_best_reward(evaluator: Any, reward: float) -> None:
    """Have an evaluator save a model only if it is better than this."""
    evaluator._max_episode_return = reward


def sums_steps(collector: type) -> bool:
    """Whether LightZero's collector adds up the environment steps of all processes."""
    return 'allreduce_data' in collector.collect.__code__.co_names  # type: ignore[attr-defined]


def divide_among_ranks(main_config: EasyDict) -> None:
    """Divide batch, episodes and segments by the number of processes, in place."""
    from lzero.config.utils import lz_to_ddp_config
    lz_to_ddp_config(main_config)


def check_wandb_login() -> None:
    """Refuse a training that would be asked for a login, where nobody can answer."""
    import wandb
    try:
        mode = wandb.setup().settings.mode  # type: ignore[union-attr]
    except ValueError as error:
        raise ConfigError(
            f"policy.use_wandb=True, and wandb refuses its settings (WANDB_MODE={os.environ.get('WANDB_MODE')!r}): set "
            'WANDB_MODE=online or offline') from error
    if mode == 'online' and not wandb.api.api_key:
        raise ConfigError('policy.use_wandb=True, and there is no login: run wandb login, or set WANDB_MODE=offline')
