"""Recipes of fp8, which nobody here asks for."""

from transformer_engine.common import recipe

__all__ = ["recipe"]
