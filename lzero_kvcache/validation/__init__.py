"""Replays a search on a reference that the host hands over, and judges how the answers differ.

Knows what goes into an inference and what comes out. Must not know LightZero, pages, pools or the engine.
"""
from .validator import ValidationError, Validator

__all__ = ['ValidationError', 'Validator']
