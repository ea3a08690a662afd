"""Roots and nodes of a search: looked up, stepped and stored; trees in arrays, and searches of them in one call.

Knows the cache and the engine, which it joins. Must not know which LightZero it serves.
"""
