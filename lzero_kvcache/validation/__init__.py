"""Validation while training: the new system's searches, replayed by LightZero's own code on a shadow of its own.

Knows LightZero's world model and what goes in and out of an inference; nothing of pages, pools or the engine.
"""
from .validator import ValidationError, Validator

__all__ = ['ValidationError', 'Validator']
