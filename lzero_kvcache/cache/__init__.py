"""Bookkeeping of contexts: keys, page ids, reference counts, evictions, statistics.

Knows numpy and the configuration; must not know tensors, LightZero or the transformer.
"""
