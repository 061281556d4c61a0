"""Recipes: YAML files that say which model, which data, and how each stage works."""

from nexus_core.recipe.checks import check_against_model
from nexus_core.recipe.load import load_recipe, recipe_from, resolved, section_from
from nexus_core.recipe.schema import Recipe

__all__ = ["Recipe", "check_against_model", "load_recipe", "recipe_from", "resolved", "section_from"]
