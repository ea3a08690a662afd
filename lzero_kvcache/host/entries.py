"""LightZero's training entries as they are run, and what they need of the process."""
import os
from typing import Any, Tuple

from easydict import EasyDict

from ..config import ConfigError
from .buffers import reanalyzed_in_arrays, targets_of_engine
from .patches import applied

Configs = Tuple[EasyDict, EasyDict]
"""``main_config`` and ``create_config``."""


def run_entry(entry: str, configs: Configs, **arguments: Any) -> Any:
    """Run an entry; returns the trained policy."""
    import lzero.entry
    with applied(reanalysis=reanalyzed_in_arrays, targets=targets_of_engine):
        return getattr(lzero.entry, entry)(list(configs), **arguments)


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
