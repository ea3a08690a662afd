"""Everything that knows LightZero: its weights, world models, models, policies and trees; what is replaced, and what is
refused.

Knows LightZero, DI-engine, and all rooms above. Must not know trainings, comparisons or the command line.
"""
