"""Everything that knows LightZero: its weights, world models, models, policies and trees, and what is refused.

Must not know tensorboard or how a page is laid out.
"""
