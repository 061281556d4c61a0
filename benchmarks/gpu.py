"""The whole journey at gpt-oss's shapes on one GPU, without weights, in a given time; saved as it goes.

    python -m benchmarks.gpu --shape 20b --shape 120b --time-limit 540 --out report
    python -m benchmarks.gpu --shape tiny                 # the same on a CPU, in seconds: nothing here is untried

Writes report.json after every step, and report.md beside it. What fails, or does not fit the memory or the time, is in
the report as that; each of several shapes runs in a process of its own. Needs no weights and no network: the models are
random (`nexus_gpt_oss.synthetic`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nexus_gpt_oss import execution, mxfp4, synthetic
from nexus_gpt_oss.experts import PackedExperts
from torch.nn import functional

from benchmarks.journey import Journey, run_tests
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.errors import is_out_of_memory
from nexus_core.estimate import Workload, estimate_stages
from nexus_core.estimate.workload import Passes
from nexus_core.pipeline.machine import found_device
from nexus_core.pipeline.preflight import model_size
from nexus_core.pipeline.rehearsal import Pace, Rehearsal, random_sequences
from nexus_core.plugins import installed
from nexus_core.recipe.schema import Convert, Recipe
from nexus_core.select.selection import LayerSelection, Selection
from nexus_core.stages.convert import convert

# Tokens of a micro-step, and of one sequence, where the shape is a real one.
MICRO_STEPS = (1_024, 4_096, 8_192, 16_384)
LENGTH = 1_024
TINY_STEPS, TINY_LENGTH = (64, 128), 64

BACKENDS = ("loop", "grouped", "fused")
ROUNDS = 5
CHOSEN_EXPERTS = 24


def seconds_of(run: Callable[[], Any], device: str, rounds: int = ROUNDS) -> float:
    """Median seconds of a call, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


@contextmanager
def forced_backend(name: str) -> Iterator[None]:
    """Inside this context packed experts use one backend."""
    variable = execution.variable("experts")
    before = os.environ.get(variable)
    os.environ[variable] = name
    execution.forget()
    try:
        yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before
        execution.forget()


def bare_device(device: str, rows: int) -> dict[str, Any]:
    """What the device itself does: a copy, and a bfloat16 product of large matrices."""
    matrix = torch.randn(rows, rows, device=device).to(torch.bfloat16)
    copied, product = torch.empty_like(matrix), torch.empty_like(matrix)
    copy_seconds = seconds_of(lambda: copied.copy_(matrix), device)
    product_seconds = seconds_of(lambda: torch.mm(matrix, matrix, out=product), device)
    return {
        "copy_gb_per_second": 2 * matrix.nbytes / copy_seconds / 1e9,
        "bf16_tflops": 2 * rows**3 / product_seconds / 1e12,
    }


def decoding(model: Any, device: str) -> dict[str, Any]:
    """All experts of a layer as bfloat16, against copying the result, as far as a few experts tell."""
    experts = model.model.layers[0].mlp.experts
    count = min(8, experts.expert_count)
    blocks, scales = experts.gate_up_proj_blocks[:count], experts.gate_up_proj_scales[:count]
    out = mxfp4.decode(blocks, scales, torch.bfloat16)
    source = torch.empty_like(out)
    decode = seconds_of(lambda: mxfp4.decode(blocks, scales, torch.bfloat16, out=out), device)
    copy = seconds_of(lambda: source.copy_(out), device)
    return {"of_copy_speed": copy / decode, "gb_per_second_written": out.nbytes / decode / 1e9}


def packed_experts(experts: PackedExperts, tokens: int, experts_per_token: int, device: str) -> dict[str, Any]:
    """Forward and input gradient of every backend against the same experts held dense; and how far they differ."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, experts.hidden_size, device=device, generator=generator).to(torch.bfloat16)
    scores = torch.rand(tokens, experts.expert_count, device=device, generator=generator)
    weights, indices = scores.topk(experts_per_token, dim=-1)
    weights = (weights / weights.sum(dim=-1, keepdim=True)).to(torch.bfloat16)
    dense = [experts.dense(expert, torch.bfloat16) for expert in range(experts.expert_count)]

    def by_dense(x: torch.Tensor) -> torch.Tensor:
        summed = torch.zeros_like(x)
        for expert, held in enumerate(dense):
            rows, place = (indices == expert).nonzero(as_tuple=True)
            gate = functional.linear(x[rows], held.gate, held.gate_bias)
            up = functional.linear(x[rows], held.up, held.up_bias)
            output = functional.linear(experts.activation(gate, up), held.down, held.down_bias)
            summed = summed.index_add(0, rows, (output * weights[rows, place, None]).to(x.dtype))
        return summed

    def both_ways(run: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x = hidden.clone().requires_grad_()
        output = run(x)
        output.backward(hidden)
        assert x.grad is not None
        return output.detach(), x.grad

    expected = both_ways(by_dense)
    found: dict[str, Any] = {"dense_seconds": seconds_of(lambda: both_ways(by_dense), device)}
    for backend in BACKENDS:
        with forced_backend(backend):
            try:
                got = both_ways(lambda x: experts(x, indices, weights))
                spent = seconds_of(lambda: both_ways(lambda x: experts(x, indices, weights)), device)
            except Exception as error:  # not every backend works everywhere; the others still count
                found[backend] = "out of memory" if is_out_of_memory(error) else str(error).split("\n")[0][:200]
                continue
        errors = [float((a - b).float().norm() / b.float().norm()) for a, b in zip(got, expected, strict=True)]
        found |= {f"{backend}_x_dense": spent / found["dense_seconds"], f"{backend}_error": max(errors)}
    return found


def paced(pace: Pace, estimate: Callable[[], dict[str, Any]] = dict) -> dict[str, Any]:
    """What was measured, and beside it what was estimated, if that can be."""
    found: dict[str, Any] = {"tokens_per_second": pace.tokens_per_second, "peak_gb": pace.peak_bytes / 1e9}
    try:
        return found | estimate()
    except Exception as error:  # an estimate must not cost a measurement
        return found | {"estimate_failed": f"{type(error).__name__}: {error}"}


def estimated(checkpoint: Checkpoint, device: str, stage: str, batch: int, length: int) -> dict[str, Any]:
    """What `nexus check` would have said of such a stage."""
    kind, passes = torch.device(device).type, Passes(batch * length, batch, length)
    sets = {name: [{"path": name}] for name in ("learnt", "kept")}
    recipe = Recipe.model_validate({"schema": 1, "model": {"path": checkpoint.name}, "data": sets})
    usual = Workload.of(recipe, kind, gathers_neurons=False, router_learns=False, capture_tokens=0)
    number = torch.bfloat16.itemsize
    work = replace(usual, collect=passes, train=passes, accumulation=1, recomputes=True, number_bytes=number)
    estimate = estimate_stages(model_size(checkpoint, kind), work, found_device(device, "bfloat16"))[stage]
    return {
        "estimated_tokens_per_second": estimate.work.tokens_per_second,
        "estimated_gb": (estimate.memory.device_bytes or estimate.memory.host_bytes) / 1e9,
    }


def converting(shape: str) -> dict[str, Any]:
    """One layer from disk to disk: the processor's and the disk's work."""
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        # Embeddings play no part in it.
        synthetic.write(base, synthetic.config(shape, 1) | {"vocab_size": 1024})
        checkpoint = open_checkpoint(base)
        chosen = tuple(range(min(CHOSEN_EXPERTS, checkpoint.description.experts)))
        selection = Selection(strategy="random", top_k=len(chosen), layers=(LayerSelection(layer=0, experts=chosen),))
        out = Path(name) / "converted"
        out.mkdir()
        started = time.perf_counter()
        convert(checkpoint, selection, Convert(), out)
        seconds = time.perf_counter() - started
    return {"seconds_per_layer": seconds, "experts": len(chosen)}


def travel(journey: Journey, shape: str, layers: int | None) -> None:
    """All steps of one shape."""
    device, is_tiny = journey.device, shape == "tiny"
    sizes, length = (TINY_STEPS, TINY_LENGTH) if is_tiny else (MICRO_STEPS, LENGTH)
    config = synthetic.config(shape, layers)
    checkpoint = Checkpoint(f"random {shape}", Path(), config, installed().family(config, shape))
    journey.step(f"{shape}: convert one layer", lambda: converting(shape), least_seconds=20.0)
    models: list[Any] = []

    def building() -> dict[str, Any]:
        started = time.perf_counter()
        models.append(synthetic.build(shape, layers, device))
        _wait(device)
        held = sum(tensor.nbytes for tensor in models[0].state_dict().values())
        return {"seconds": time.perf_counter() - started, "gb": held / 1e9}

    journey.step(f"{shape}: build", building, least_seconds=20.0)
    if not models:
        return
    model = models[0]
    journey.step(f"{shape}: decode", lambda: decoding(model, device))
    for tokens in sizes[::2] if len(sizes) > 2 else sizes[:1]:
        journey.step(
            f"{shape}: packed experts, {tokens:,} tokens",
            lambda tokens=tokens: packed_experts(
                model.model.layers[0].mlp.experts, tokens, checkpoint.description.experts_per_token, device
            ),
        )

    def rehearsal(tokens: int) -> Rehearsal:
        batch, steps = tokens // length, 2
        packed = random_sequences(checkpoint.description.vocabulary_size, batch * (steps + 1), length)
        return Rehearsal(checkpoint, model, packed, batch, steps)

    # The middle size first: if the time ends here, the most telling number is there.
    ordered = sorted(sizes, key=lambda tokens: (tokens != sizes[len(sizes) // 2], tokens))

    def estimate(stage: str, tokens: int) -> Callable[[], dict[str, Any]]:
        return lambda: estimated(checkpoint, device, stage, tokens // length, length)

    for tokens in ordered:
        journey.step(
            f"{shape}: collect, {tokens:,} tokens a batch",
            lambda tokens=tokens: paced(rehearsal(tokens).collect(), estimate("collect", tokens)),
            least_seconds=15.0,
        )
    for tokens in ordered:
        journey.step(
            f"{shape}: train, {tokens:,} tokens a micro-step",
            lambda tokens=tokens: paced(rehearsal(tokens).train(recomputes=True), estimate("train", tokens)),
            least_seconds=20.0,
        )
    tokens = sizes[len(sizes) // 2]
    journey.step(f"{shape}: capture, {tokens:,} tokens a batch", lambda: paced(rehearsal(tokens).capture()))
    journey.step(f"{shape}: backends", lambda: dict(execution.in_use()), least_seconds=0.0)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=sorted(synthetic.SHAPES), help="may be given again")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--time-limit", type=float, default=1800.0, metavar="SECONDS")
    parser.add_argument("--tests", action="store_true", help="the tests marked gpu too, in the time that is left")
    parser.add_argument("--out", type=Path, default=Path("gpu_report"), help="name of the report, without its ending")
    parser.add_argument("--append", action="store_true", help="go on with the report that is there")
    arguments = parser.parse_args(given)

    out, device = arguments.out, arguments.device
    if not arguments.append:
        out.with_suffix(".json").unlink(missing_ok=True)
    journey = Journey.going_on(device, out, arguments.time_limit)
    shapes = arguments.shape or ["20b", "120b"]
    if not journey.rows:
        rows = 8192 if device.startswith("cuda") else 512
        journey.step("the device itself", lambda: bare_device(device, rows))
    if len(shapes) == 1:
        travel(journey, shapes[0], arguments.layers)
    else:
        for shape in shapes:
            journey = _in_a_process(journey, shape, arguments.layers)
    if arguments.tests:
        journey.step("tests marked gpu", lambda: run_tests(journey.left), least_seconds=30.0)
    print(f"\n{out.with_suffix('.json')}, {out.with_suffix('.md')}")


def _in_a_process(journey: Journey, shape: str, layers: int | None) -> Journey:
    """All steps of one shape in a process of its own: after some errors a GPU does nothing more for the one that made
    them. Returns the journey from there on.
    """
    command = [sys.executable, "-m", "benchmarks.gpu", "--append", "--shape", shape, "--device", journey.device]
    command += ["--time-limit", str(journey.left), "--out", str(journey.out)]
    code = subprocess.run(command + (["--layers", str(layers)] if layers else [])).returncode
    after = Journey.going_on(journey.device, journey.out, journey.time_limit)
    after.began = journey.began
    after.save()  # what it was measured by is the whole command
    if code:
        after.add({"step": f"{shape}: its process", "failed": f"it ended with exit code {code}"})
    return after


if __name__ == "__main__":
    main()
