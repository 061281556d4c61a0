"""The pipeline: which stages a recipe needs, which of them are there already, and how the others come about."""
