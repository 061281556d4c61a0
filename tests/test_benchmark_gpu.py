"""The benchmark for a GPU runs where there is none, at a tiny shape, so that nothing in it is tried out too late."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.journey import Journey


def steps(out: Path) -> dict[str, dict[str, Any]]:
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["machine"]["torch"]
    return {row["step"]: row for row in report["steps"]}


def test_the_whole_journey_at_a_tiny_shape(tmp_path: Path) -> None:
    gpu.main(["--shape", "tiny", "--layers", "1", "--device", "cpu", "--out", str(tmp_path / "report")])
    found = steps(tmp_path / "report")
    assert [name for name, row in found.items() if "failed" in row or "not_reached" in row] == []
    assert found["tiny: collect, 128 tokens a batch"]["tokens_per_second"] > 0
    assert found["tiny: train, 128 tokens a micro-step"]["tokens_per_second"] > 0
    assert found["tiny: packed experts, 64 tokens"]["grouped_error"] < 0.02
    assert "| tiny: capture, 128 tokens a batch |" in (tmp_path / "report.md").read_text()


def test_what_goes_wrong_or_comes_too_late_is_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> dict[str, Any]:
        raise RuntimeError("no such kernel")

    journey = Journey("cpu", tmp_path / "report", time_limit=60.0)
    journey.step("breaks", fails)
    journey.step("goes on", lambda: {"seconds": 1.5})
    journey.time_limit = 0.0
    journey.step("too late", lambda: {"seconds": 1.5})
    found = steps(tmp_path / "report")
    assert found["breaks"]["failed"] == "RuntimeError: no such kernel"
    assert found["goes on"]["seconds"] == 1.5
    assert found["too late"]["not_reached"] == "0 s were left"
    assert "too late" in capsys.readouterr().out
