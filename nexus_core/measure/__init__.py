"""Measures of a model and of what training did to it: perplexity, router health, and the verdict; pure functions."""
