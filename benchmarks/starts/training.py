"""One short training, the same for every subject but for what learns."""

from __future__ import annotations

import time

import torch

from benchmarks.starts.conversions import Conversions
from benchmarks.starts.setting import Recorded, Setting
from benchmarks.starts.subjects import Result, Training
from benchmarks.starts.trainees import ready
from nexus_core.stages.train import training_objective
from nexus_core.statistics.listening import listen
from nexus_core.train.evaluation import HELD_OUT, HELD_OUT_BASE
from nexus_core.train.passes import count_tokens, output_head, read_signals
from nexus_core.train.schedule import Schedule


def train(training: Training, setting: Setting, conversions: Conversions) -> Result:
    """Train a subject on its lesson and measure it on held-out text."""
    started = time.perf_counter()
    lesson = setting.lesson(training.domain, training.seed, training.length)
    model, learning = ready(training, conversions)
    settings = lesson.settings.model_copy(update={"learning_rate": training.learning_rate})
    objective, schedule, head = training_objective(settings), Schedule.of(settings), output_head(model)
    optimizer = torch.optim.AdamW(learning.values(), weight_decay=0.0, fused=True)
    with listen(model, setting.checkpoint.family) as listener:
        for step, (batch, taught) in enumerate(zip(lesson.micro_batches, lesson.taught, strict=True), start=1):
            now = schedule.at(step)
            signals = read_signals(
                model,
                head,
                listener,
                Recorded(taught),
                batch,
                objective.needs,
                count_tokens([batch]),
                now.temperature,
            )
            torch.stack([loss.weight * loss(signals) for loss in objective.losses]).sum().backward()
            torch.nn.utils.clip_grad_norm_(learning.values(), settings.max_gradient_norm)
            for group in optimizer.param_groups:
                group["lr"] = now.learning_rate
            optimizer.step()
            optimizer.zero_grad()
    values = setting.held_out(training.domain).measure(model, head, isolates=lesson.isolates)

    def by_set(prefix: str) -> dict[str, float]:
        return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}

    parameters = sum(parameter.numel() for parameter in learning.values())
    return Result(training, parameters, time.perf_counter() - started, by_set(HELD_OUT_BASE), by_set(HELD_OUT))
