"""One way of training, measured alone: `python -m benchmarks.side_by_side.contestants NAME FOLDER STEPS`.

Prints {"seconds": processor time of a step, "peak_bytes": anonymous memory above that after imports, "trainable": how
many numbers learn}.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.measurement import AnonymousMemory
from benchmarks.side_by_side.text import (
    BATCH_SIZE,
    CONVERTED,
    KL_WEIGHT,
    LEARNING_RATE,
    LEARNT,
    MODEL,
    ROWS,
    SETS,
    TEACHER,
    settings,
)
from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.models import load

# The first step also pays for what is set up once.
WARM_UP = 1

# As many numbers as NEXUS's shared experts have (99,328), within 3%: 4,608 for each rank over the attention.
LORA = {"r": 22, "lora_alpha": 22, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "task_type": "CAUSAL_LM"}

# Gives the seconds of every step and how many numbers learn.
Contest = Callable[[Path, int], tuple[list[float], int]]


def nexus(**changes: Any) -> Contest:
    """The stage as a recipe runs it."""
    # Drawing is no part of training: imported before memory is measured.
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401

    from nexus_core.stages.train import train

    def contest(folder: Path, steps: int) -> tuple[list[float], int]:
        chosen = settings(steps, **changes)
        teacher = folder / TEACHER if chosen.teacher.kind == "offline" else None
        ends: list[float] = []
        with tempfile.TemporaryDirectory() as out:
            metrics = train(
                *(open_checkpoint(folder / CONVERTED), SETS, chosen, LEARNT, Path(out)),
                teacher=teacher,
                report=lambda step, values: ends.append(time.process_time()),
            )
        # The first report, of step 0, comes before anything is learnt.
        return [end - start for start, end in pairwise(ends)], int(metrics["trainable_parameters"])

    return contest


def two_copies(*, lora: bool) -> Contest:
    """A second, dequantized copy of the model as teacher, in Hugging Face's Trainer."""
    import peft
    from transformers import Trainer

    class Distillation(Trainer):
        def __init__(self, teacher: Any, **arguments: Any):
            super().__init__(**arguments)
            self.teacher = teacher

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs["labels"][:, 1:]
            counts, is_learnt = labels != -100, inputs["is_learnt"][:, None]
            logits = model(input_ids=inputs["input_ids"], use_cache=False).logits[:, :-1]
            with torch.no_grad():
                taught = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits[:, :-1]
            learnt, kept = counts & is_learnt, counts & ~is_learnt
            lm = functional.cross_entropy(logits[learnt], labels[learnt])
            ours, theirs = logits[kept].log_softmax(-1), taught[kept].log_softmax(-1)
            loss = lm + KL_WEIGHT * functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
            return (loss, logits) if return_outputs else loss

    def contest(folder: Path, steps: int) -> tuple[list[float], int]:
        student, teacher = _plain_model(), _plain_model().eval().requires_grad_(False)
        if lora:
            student = peft.get_peft_model(student, peft.LoraConfig(**LORA))
        return _fitted(lambda common: Distillation(teacher, model=student, **common), folder, steps)

    return contest


def trl() -> Contest:
    """TRL's generalized knowledge distillation: forward KL on the given text, no text of the student's own."""
    import peft
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def contest(folder: Path, steps: int) -> tuple[list[float], int]:
        student, teacher = _plain_model(), _plain_model().eval()
        tokenizer = _tokenizer()

        def made(common: dict[str, Any]) -> Any:
            return GKDTrainer(
                model=student,
                teacher_model=teacher,
                processing_class=tokenizer,
                peft_config=peft.LoraConfig(**LORA),
                **common,
            )

        return _fitted(made, folder, steps, GKDConfig, lmbda=0.0, beta=0.0)

    return contest


def lora() -> Contest:
    """LoRA on the attention with the language-model loss on all text, and no teacher."""
    import peft
    from transformers import Trainer

    def contest(folder: Path, steps: int) -> tuple[list[float], int]:
        model = peft.get_peft_model(_plain_model(), peft.LoraConfig(**LORA))
        return _fitted(lambda common: Trainer(model=model, **common), folder, steps)

    return contest


CONTESTS: dict[str, Callable[[], Contest]] = {
    "nexus": nexus,
    "nexus_offline": lambda: nexus(teacher={"kind": "offline"}),
    "nexus_routers": lambda: nexus(losses={"lm": 1.0, "logits_kl": KL_WEIGHT, "router_kl": 1.0}),
    "two_copies": lambda: two_copies(lora=True),
    "two_copies_full": lambda: two_copies(lora=False),
    "trl": trl,
    "peft": lora,
}


def _plain_model() -> Any:
    """The base as transformers has it on a CPU: MXFP4 turned into dense weights."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(open_checkpoint(MODEL).folder, dtype=torch.float32)


def _tokenizer() -> Any:
    from nexus_core.data.tokenizers import load_tokenizer

    return load_tokenizer(open_checkpoint(MODEL).folder)


def _fitted(
    make: Callable[[dict[str, Any]], Any], folder: Path, steps: int, kind: Any = None, **settings_of_kind: Any
) -> tuple[list[float], int]:
    """Train with a Trainer over the rows, in their order, and time its steps."""
    from datasets import Dataset
    from safetensors.torch import load_file
    from transformers import TrainerCallback, TrainingArguments

    tensors = load_file(folder / ROWS)
    rows = Dataset.from_dict({name: tensor.tolist() for name, tensor in tensors.items()}).with_format("torch")

    class Times(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.process_time() - self.started)

    times = Times()
    with tempfile.TemporaryDirectory() as out:
        arguments = (kind or TrainingArguments)(
            output_dir=out,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            **settings_of_kind,
        )
        trainer = make({"args": arguments, "train_dataset": rows, "data_collator": _collated, "callbacks": [times]})
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
        trainer.train()
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    return times.seconds, trainable


def _collated(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def _import_what_is_imported_late(name: str, folder: Path) -> None:
    """Libraries import much of themselves when the first model is made; that one's memory is given back."""
    if name.startswith("nexus"):
        load(open_checkpoint(folder / CONVERTED), dtype=torch.float32)
    else:
        _plain_model()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    name, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    contest = CONTESTS[name]()
    _import_what_is_imported_late(name, folder)
    with AnonymousMemory(interval_seconds=0.01) as memory:
        seconds, trainable = contest(folder, steps)
    answer = {
        "seconds": statistics.median(seconds[WARM_UP:]),
        "peak_bytes": memory.peak_bytes,
        "trainable": trainable,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
