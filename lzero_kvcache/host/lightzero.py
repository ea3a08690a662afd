"""Which LightZero is installed, recognised by its contents: ``lightzero`` is its adapter, with everything that differs
between versions."""
from lzero.model.unizero_world_models.transformer import Block

from ..summary import version_of
from .adapter import Adapter


def adapter_of(block: type) -> Adapter:
    """The adapter for a LightZero with such blocks. The name of their MLP tells, since the version number is the
    same."""
    names = block.__init__.__code__.co_names  # type: ignore[misc]
    if Adapter.MLP in names:
        return Adapter()
    if 'feed_forward' in names:
        from .lightzero_main import MainBranch
        return MainBranch()
    raise ImportError('this LightZero is neither its release 0.2.0 nor its main branch: its blocks have no mlp and no '
                      'feed_forward; pip install LightZero==0.2.0, or for its own caching take lzero_kvcache out of '
                      'create_config.policy.import_names')


lightzero = adapter_of(Block)
VERSION = version_of('LightZero') + lightzero.BESIDE_VERSION
"""The version of LightZero in summaries."""
