"""Runs recorded in MLflow and read back: the only package that imports mlflow."""
