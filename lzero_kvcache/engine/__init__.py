"""The transformer's inference over pages: where pages are, attention over them, how a step is launched or compiled.

Knows tensors, page ids, and weights as the host hands them over. Must not know keys, pools or LightZero.
"""
