"""What `nexus check` says a stage will take beside what it took: memory and time, each stage in a process of its own.

    python -m benchmarks preflight
    python -m benchmarks.preflight --model DIR --set train.batch_size=2 RECIPE

Measured is peak anonymous memory above what a warm-up takes, and the weights that are mapped from their files: of
those a process has only the pages that it has touched, and the estimate counts them whole.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measurement import AnonymousMemory, Measurement

STAGES = ("generate", "collect", "convert", "capture", "train", "validate")
ROOT = Path(__file__).parents[1]

# glibc keeps freed blocks below a size for the next request, a size it raises as it goes to 32 MB: tensors of a small
# model then hold up to twice what they need, of a large one nothing more. So that tensors are measured and not that,
# blocks of 256 KB and more go back as they are freed.
RETURNED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}

# The second step has every buffer: what the optimizer keeps is made in the first.
RECIPE = """
schema: 1
model: {{path: "{model}", dtype: {dtype}}}
data:
  domain: [{{path: embedded:arithmetic}}]
  general: [{{path: embedded:prose}}]
collect: {{tokens: {collect}, sequence_length: {length}, batch_size: {batch}}}
select: {{strategy: pca, top_k: 8}}
train:
  teacher: {{kind: {teacher}}}
  learn: [domain]
  max_steps: 2
  batch_size: {batch}
  sequence_length: {length}
  gradient_accumulation: 1
  gradient_checkpointing: {recomputes}
validate: {{samples: {samples}, sequence_length: {length}, batch_size: {batch}}}
run: {{device: cpu, tracking: {{enabled: false}}}}
"""

# Put behind it for the stage that writes text; a model that was never trained ends nothing.
WRITES = """
generate:
  text: {{prompts: [{{path: embedded:prose, max_records: {prompts}}}], max_new_tokens: {new}, batch_size: {prompts}}}
"""
READS_WHAT_IT_WRITES = "data.general=[{path: generated:text}]"

# The least of everything.
SMALLEST = (
    "collect.tokens=64",
    "collect.sequence_length=16",
    "collect.batch_size=1",
    "train.max_steps=1",
    "train.sequence_length=16",
    "train.batch_size=1",
    "train.gradient_accumulation=1",
    "validate.samples=1",
    "validate.sequence_length=16",
    "validate.batch_size=1",
)
LEAST_TEXT = ("generate.text.max_new_tokens=2", "generate.text.batch_size=1", "generate.text.prompts.0.max_records=1")


def run() -> list[Measurement]:
    """The embedded model at the demo's sizes, plain and recomputing, and two layers of gpt-oss-120b in bfloat16."""
    from nexus_gpt_oss import synthetic

    found = []
    small = {"dtype": "auto", "collect": 8_192, "length": 256, "batch": 8, "samples": 8, "prompts": 32, "new": 64}
    large = {"dtype": "bfloat16", "collect": 1_024, "length": 128, "batch": 4, "samples": 4, "prompts": 4, "new": 16}
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "two-layers"
        synthetic.write(base, synthetic.config("120b", 2), tokenizer=True)
        for title, model, sizes, recomputes in (
            ("embedded model", "embedded:tiny-gpt-oss", small, False),
            ("embedded model, recomputing", "embedded:tiny-gpt-oss", small, True),
            ("two layers of 120b, recomputing", str(base), large, True),
        ):
            folder = Path(name) / title.replace(" ", "-")
            folder.mkdir()
            recipe = folder / "recipe.yaml"
            settings = {"model": model, "teacher": "offline", "recomputes": str(recomputes).lower(), **sizes}
            recipe.write_text(RECIPE.format(**settings))
            found += [_measurement(title, row) for row in compare(recipe, folder / "runs", STAGES[1:])]
            for row in compare(recipe, folder / "runs", ["train"], ["train.teacher.kind=online"]):
                found.append(_measurement(title, row | {"stage": "train, online teacher"}))
            writes = folder / "writes.yaml"
            writes.write_text((RECIPE + WRITES).format(**settings))
            for row in compare(writes, folder / "runs", ["generate"], [READS_WHAT_IT_WRITES]):
                found.append(_measurement(title, row))
    return found


def compare(
    recipe: Path, store: Path, stages: Sequence[str], overrides: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Run a recipe stage by stage, each in a process of its own, and set its memory and time beside the estimate."""
    for stage in stages:
        command = [sys.executable, "-m", "benchmarks.preflight", str(recipe), "--stage", stage, "--store", str(store)]
        for override in overrides:
            command += ["--set", override]
        answer = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **RETURNED_AT_ONCE}
        )
        yield json.loads(answer.stdout.splitlines()[-1])


def measure_stage(recipe_file: Path, stage: str, store: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """In this process: run the recipe up to `stage`, all before it being there, and say what it took."""
    from nexus_core.checkpoint.source import open_checkpoint
    from nexus_core.pipeline.preflight import look_ahead
    from nexus_core.pipeline.run import run_recipe
    from nexus_core.recipe.load import load_recipe

    recipe = load_recipe(recipe_file, (f"run.store={store}", *overrides))
    # Whatever is imported, cached or compiled at first use is not the stage's.
    with tempfile.TemporaryDirectory() as scratch:
        least = (*SMALLEST, *(LEAST_TEXT if stage == "generate" else ()))
        warm_up = (f"run.store={scratch}", "model.path=embedded:tiny-gpt-oss", *overrides, *least)
        run_recipe(load_recipe(recipe_file, warm_up), until=stage)
    _decode_as_of_large_matrices()
    checkpoint = open_checkpoint(recipe.model.path)
    ahead = look_ahead(recipe, checkpoint)
    estimate = ahead.stages[stage]
    parts = {name: count for name, count in estimate.memory.host.items() if name != "program and libraries"}
    # Numbers of the type that they are stored in are not copied out of their files either.
    is_as_stored = ahead.work.number_bytes == checkpoint.dtype.itemsize
    mapped = parts.get("packed experts", 0) + (parts.get("other weights", 0) if is_as_stored else 0)
    began, began_processor = time.perf_counter(), time.process_time()
    # The smallest run has left freed blocks below 256 KB to the allocator. They are counted as the program's.
    with AnonymousMemory(reuses_freed=True) as memory:
        run_recipe(recipe, until=stage)
    return {
        "stage": stage,
        "estimated_bytes": sum(parts.values()),
        "measured_bytes": memory.peak_bytes + mapped,
        "mapped_bytes": mapped,
        "estimated_seconds": estimate.work.seconds,
        "measured_seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - began_processor,
        "parts": parts,
    }


def _decode_as_of_large_matrices() -> None:
    """The embedded model's are so small that the library which decodes others is not imported."""
    import torch
    from nexus_gpt_oss.mxfp4 import decode

    decode(torch.zeros(1, 4096, 64, 16, dtype=torch.uint8), torch.ones(1, 4096, 64, dtype=torch.uint8), torch.float32)


def wanted_stages(recipe_file: Path, overrides: Sequence[str]) -> list[str]:
    """Those of `STAGES` that the recipe has."""
    from nexus_core.pipeline.order import all_stages
    from nexus_core.recipe.load import load_recipe

    recipe = load_recipe(recipe_file, tuple(overrides))
    return [stage.name for stage in all_stages() if stage.name in STAGES and stage.wanted(recipe)]


def _measurement(title: str, row: dict[str, Any]) -> Measurement:
    estimated, measured, mapped = row["estimated_bytes"], row["measured_bytes"], row["mapped_bytes"]
    return Measurement(
        "preflight",
        f"{title}: {row['stage']}",
        row["measured_seconds"],
        estimated / measured,
        "measured memory",
        f"{estimated / 1e6:,.0f} MB estimated, {measured / 1e6:,.0f} MB measured, {mapped / 1e6:,.0f} of both mapped; "
        f"{row['estimated_seconds']:.1f} s estimated, {row['processor_seconds']:.1f} s of all processors' time",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--stage", choices=STAGES, help="only this one, in this process; JSON on stdout")
    parser.add_argument("--store", type=Path, required=True, help="a run store; stages that lie there are reused")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(measure_stage(arguments.recipe, arguments.stage, arguments.store, arguments.overrides)))
        return
    stages = wanted_stages(arguments.recipe, arguments.overrides)
    for row in compare(arguments.recipe, arguments.store, stages, arguments.overrides):
        estimated, measured = row["estimated_bytes"], row["measured_bytes"]
        print(
            f"{row['stage']:<9} {estimated / 1e6:>10,.0f} MB estimated {measured / 1e6:>10,.0f} MB measured "
            f"{estimated / measured:>6.2f} x   {row['estimated_seconds']:.1f} s and {row['measured_seconds']:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
