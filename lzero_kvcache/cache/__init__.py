"""Bookkeeping of contexts: keys, page ids, reference counts, leases, evictions, statistics.

Knows keys, environments and numbers. Must not know tensors, LightZero or the transformer.
"""
