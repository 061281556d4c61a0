"""The stages of the pipeline: thin glue between files, models and the pure functions that do the work."""
