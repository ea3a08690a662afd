"""Which LightZero is installed, told by what it has: ``lightzero`` is its adapter, where everything that it does
otherwise than another stands."""
import importlib
from typing import Any

from lzero.model.unizero_world_models.transformer import Block

# Its version number is the same for the released package and for the main branch.
_NAME = 'main' if 'feed_forward' in Block.__init__.__code__.co_names else 'release'

lightzero: Any = importlib.import_module(f'.lightzero_{_NAME}', __package__)
