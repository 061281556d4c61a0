"""Recipes: YAML files that say which model, which data, and how each stage works."""
