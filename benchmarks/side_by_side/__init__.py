"""NEXUS training beside what one would use otherwise, on the embedded model: processor time of a step, peak memory.

Every contestant trains on the same rows in a process of its own, one after the other, round after round. Processor time
rather than the clock's: on a busy machine the clock tells how busy it was. With one thread they are the same. trl and
peft are needed by this benchmark only (`pip install -c constraints.txt trl peft`).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.measurement import Measurement
from benchmarks.side_by_side.text import TOKENS_PER_STEP, prepare

ROUNDS = 3
STEPS = 5

# The reference first. The losses of the others: nothing but NEXUS compares routers.
CONTESTANTS = {
    "nexus": "NEXUS, running teacher: lm + KL",
    "nexus_offline": "NEXUS, stored teacher: lm + KL",
    "nexus_routers": "NEXUS, running teacher: lm + KL + router KL",
    "two_copies": "HF Trainer, LoRA, second copy as teacher: lm + KL",
    "two_copies_full": "HF Trainer, all weights, second copy: lm + KL",
    "trl": "TRL GKDTrainer, LoRA, second copy: KL only",
    "peft": "peft LoRA, HF Trainer: lm only, no teacher",
}
NEEDS = {"two_copies": "peft", "trl": "trl", "peft": "peft"}


def run() -> list[Measurement]:
    """Median seconds of a step over the rounds, with memory and how many numbers learn. Says what is not installed."""
    names = []
    for name in CONTESTANTS:
        if name in NEEDS and find_spec(NEEDS[name]) is None:
            print(f"side_by_side: {name} is left out, {NEEDS[name]} is not installed")
        else:
            names.append(name)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), STEPS)
        rounds = [{name: _train(name, Path(folder)) for name in names} for _ in range(ROUNDS)]
    found = {
        name: {key: statistics.median(answers[name][key] for answers in rounds) for key in rounds[0][name]}
        for name in names
    }
    reference = found[names[0]]
    return [
        Measurement(
            "side_by_side",
            CONTESTANTS[name],
            answer["seconds"],
            answer["seconds"] / reference["seconds"],
            CONTESTANTS[names[0]],
            f"{TOKENS_PER_STEP / answer['seconds']:,.0f} tokens/CPU s, {answer['peak_bytes'] / 1e6:,.0f} MB "
            f"({answer['peak_bytes'] / reference['peak_bytes']:.2f} x), {answer['trainable']:,.0f} numbers learn",
        )
        for name, answer in found.items()
    ]


def _train(name: str, folder: Path) -> dict[str, Any]:
    """What one contestant measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.side_by_side.contestants", name, str(folder), str(STEPS)]
    threads = str(torch.get_num_threads())
    environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
