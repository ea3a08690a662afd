"""
One training: its config file, its plan, the run and what that leaves behind; and experiments of several.

Knows the host's entries and patches. Must not know LightZero's modules or how the cache works. From a notebook:

    from lzero_kvcache.training import make_plan, run
    result = run(make_plan('config_new', cache='old', max_env_step=300, overrides=['policy.num_simulations=10']))
"""
from ..summary import Result
from .config_file import Plan, capture_entry_call, find_config, load_config
from .plan import make_plan
from .runner import run

__all__ = ['Plan', 'Result', 'capture_entry_call', 'find_config', 'load_config', 'make_plan', 'run']
