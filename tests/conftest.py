"""What every test runs under: no network, no tracking server, no user's settings, few threads."""

from __future__ import annotations

import os

# Before any library reads them.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", MLFLOW_DISABLE_TELEMETRY="true", TOKENIZERS_PARALLELISM="false"
)
# Without it torch refuses products on a GPU where deterministic algorithms are asked for; it looks once, at the first.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Threads that spin at barriers stand in each other's way; see nexus_core/cli/output.py.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.pop("MLFLOW_TRACKING_URI", None)

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` run where there is one."""
    if not any("gpu" in item.keywords for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
