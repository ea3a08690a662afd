"""
The code behind ``train.py``: config files, overrides, one watched run of a LightZero entry, and what the terminal
shows. Nothing here knows how the cache works; ``lightzero.py`` is the one file that reaches into LightZero and
DI-engine.
"""
from .config_file import LoadedConfig, capture_entry_call, find_config, load_config

__all__ = ['LoadedConfig', 'capture_entry_call', 'find_config', 'load_config']
