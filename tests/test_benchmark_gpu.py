"""The benchmark for a GPU runs where there is none, at a tiny shape, so that nothing in it is tried out too late."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.journey import ROOT, Journey, run_tests
from nexus_core.pipeline.rehearsal import Pace


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


@pytest.mark.slow
def test_shapes_in_processes_of_their_own_fill_one_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    out = tmp_path / "report"
    out.with_suffix(".json").write_text("of an earlier run")
    gpu.main(["--shape", "tiny", "--shape", "tiny", "--device", "cpu", "--time-limit", "1", "--out", str(out)])
    report = json.loads(out.with_suffix(".json").read_text())
    names = [row["step"] for row in report["steps"]]
    assert names == ["the device itself", *2 * ["tiny: convert one layer", "tiny: build"]]
    gpu._in_a_process(Journey.going_on("cpu", out, 1.0), "unknown", None)
    assert steps(out)["unknown: its process"]["failed"] == "it ended with exit code 2"
    assert len(json.loads(out.with_suffix(".json").read_text())["steps"]) == 6


def test_a_failing_estimate_does_not_cost_the_measurement() -> None:
    def fails() -> dict[str, Any]:
        raise KeyError("no such device")

    found = gpu.paced(Pace(tokens_per_second=7.0, seconds=1.0, peak_bytes=10**9), fails)
    assert found == {"tokens_per_second": 7.0, "peak_gb": 1.0, "estimate_failed": "KeyError: 'no such device'"}


def test_failed_tests_are_told_by_name(tmp_path: Path) -> None:
    file = tmp_path / "test_example.py"
    file.write_text("def test_right(): pass\n\ndef test_wrong(): raise ValueError\n")
    found = run_tests(60.0, (str(file),))
    assert (found["exit_code"], found["passed"]) == (1, 1)
    assert [name.split("::")[1] for name in found["failed_tests"]] == ["test_wrong"]
    assert run_tests(0.01, (str(file),))["stopped_after"] == 0.01


def test_a_device_that_does_nothing_more_does_not_end_the_journey(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_dead() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", is_dead)
    journey = Journey("cpu", tmp_path / "report", time_limit=60.0)
    monkeypatch.setattr(journey, "device", "cuda")
    journey.free_memory()


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
