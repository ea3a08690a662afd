"""Roots and nodes of a search: looked up, stepped and stored.

Joins the cache and the engine; must not know which LightZero it serves.
"""
