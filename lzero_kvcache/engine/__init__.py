"""The transformer's inference over pages: where pages are stored, attention over them, how a step is launched.

Knows tensors and page ids; must not know keys, pools or LightZero. Weights come complete from the host.
"""
