"""Searching: the rates of a recipe's widths stage found by trying, from a model to a recipe that holds them."""

from .options import Options
from .outcome import RECIPE, Searched
from .run import Shared, search

__all__ = ["RECIPE", "Options", "Searched", "Shared", "search"]
