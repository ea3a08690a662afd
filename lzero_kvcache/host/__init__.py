"""Everything that knows LightZero: its weights, world models, models, policies and trees; replacements in it, and
refusals.

Knows LightZero, DI-engine, and all rooms above. Must not know trainings, comparisons or the command line.
"""
