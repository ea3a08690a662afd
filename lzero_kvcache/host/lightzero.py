"""Which LightZero is installed, told by what it has: ``lightzero`` is its adapter, with everything that differs between
versions."""
from typing import Any

from lzero.model.unizero_world_models.transformer import Block

from ..summary import version_of

ADAPTERS = {'mlp': 'lightzero_release', 'feed_forward': 'lightzero_main'}
"""By what the MLP of a transformer's block is called, since the version number is the same."""


def adapter_of(block: type) -> str:
    """The adapter for a LightZero with such blocks."""
    names = block.__init__.__code__.co_names  # type: ignore[misc]
    for name, adapter in ADAPTERS.items():
        if name in names:
            return adapter
    raise ImportError(f'this LightZero is neither its release 0.2.0 nor its main branch: its blocks have no '
                      f'{" and no ".join(ADAPTERS)}; pip install LightZero==0.2.0')


lightzero: Any
if adapter_of(Block) == 'lightzero_main':
    from . import lightzero_main
    lightzero = lightzero_main
else:
    from . import lightzero_release
    lightzero = lightzero_release

VERSION: str = version_of('LightZero') + lightzero.BESIDE_VERSION
"""What runs say that they were made with."""
