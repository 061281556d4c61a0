"""A training step on a stored teacher against one beside the running teacher; what storing loses, in how many bytes;
and where a whole run ends, offline and online.

Processor time of one thread, so that other work on the machine does not count.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

import nexus_core
from benchmarks.measurement import Measurement, interleaved
from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.data.isolation import isolates_documents
from nexus_core.data.mixture import TrainingBatches
from nexus_core.distill import stored_logits
from nexus_core.pipeline.run import run_recipe
from nexus_core.recipe.load import load_recipe
from nexus_core.recipe.schema import Source
from nexus_core.recipe.training import Train
from nexus_core.stages.capture import capture
from nexus_core.stages.train import training_objective
from nexus_core.stages.training_text import shares_of, training_sequences
from nexus_core.statistics.listening import listen
from nexus_core.train.engines.plain import PlainEngine
from nexus_core.train.gradients import Gradients
from nexus_core.train.passes import OnlineTeacher, TeacherSource, output_head
from nexus_core.train.schedule import Schedule
from nexus_core.train.setup import ready_parameters
from nexus_core.train.stored_teacher import OfflineTeacher
from nexus_core.train.teacher_store import TeacherStore

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny_offline.yaml"
MODEL = "embedded:tiny-gpt-oss"
SETS = {"domain": "embedded:arithmetic", "general": "embedded:prose"}
ROUNDS = 7
ZIPF_TOKENS, ZIPF_VOCABULARY = 128, 201_088


def run() -> list[Measurement]:
    """Seconds of a step of 8 x 256 tokens, half of them kept, beside the bound: online without its teacher's pass."""
    sets = {name: [Source(path=path)] for name, path in SETS.items()}
    settings = Train.model_validate(
        {
            "teacher": {"kind": "offline"},
            "max_steps": 4,
            "batch_size": 8,
            "gradient_accumulation": 1,
            "sequence_length": 256,
        }
    )
    checkpoint = open_checkpoint(MODEL)
    with tempfile.TemporaryDirectory() as name:
        metrics = capture(checkpoint, sets, settings, ["domain"], Path(name))
        model = nexus_core.load(checkpoint, dtype=torch.float32)
        checkpoint.family.hook.nexus_attach_shared_expert(model=model, width=64)
        objective = training_objective(settings)
        trainables = ready_parameters(model, checkpoint.family, objective, 1.0)
        engine = PlainEngine(model, trainables, weight_decay=0.0)
        sequences = training_sequences(checkpoint.folder, sets, settings)
        batches = TrainingBatches(sequences, shares_of(sets, settings), 8, 0)
        head, isolates = output_head(model), isolates_documents(model)
        with listen(model, checkpoint.family) as listener:

            def steps(teacher: TeacherSource) -> Gradients:
                return Gradients(engine, head, listener, teacher, objective, batches, {"domain"}, 1, isolates, None)

            online = steps(OnlineTeacher(model, listener, head))
            offline = steps(OfflineTeacher(TeacherStore(Path(name)), {"domain"}, "cpu"))
            data, step = online.data(1), Schedule.of(settings).at(1)
            seconds = interleaved(
                {
                    "online": lambda: online.add(data, step),
                    "its teacher's pass": lambda: online.teacher.teach(data.micro_batches[0], objective.needs),
                    "offline": lambda: offline.add(data, step),
                },
                rounds=ROUNDS,
                clock=time.process_time,
            )
    bound = seconds["online"] - seconds["its teacher's pass"]
    stored = (
        f"{metrics['vocabulary_bytes_per_token']:.1f} B/token, KL {metrics['vocabulary_kl_nats']:.1e}; "
        f"routers {metrics['router_bytes_per_token']:.0f} B, KL {metrics['stored_router_kl_nats']:.1e}"
    )
    rows = {"online": "", "online without its teacher's pass": "", "offline": stored}
    times = {**seconds, "online without its teacher's pass": bound}
    reference = "online without its teacher's pass"
    found = [
        Measurement("stored_teacher", name, times[name], times[name] / bound, reference, note)
        for name, note in rows.items()
    ]
    return [*found, _zipf(reference, bound), _whole_runs(reference, bound / seconds["online"])]


def _whole_runs(reference: str, bound_share: float) -> Measurement:
    """The `train` stage of the shipped recipe with a stored teacher and with the running one: where both end.

    bound_share: of a step's time, without the teacher's pass.
    """
    ended: dict[str, dict[str, float]] = {}
    spent: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as store:
        for kind in ("online", "offline"):
            overrides = [f"train.teacher.kind={kind}", f"run.store={store}", "run.tracking.enabled=false"]
            times = {"": time.process_time()}
            result = run_recipe(
                load_recipe(RECIPE, [*overrides, "run.device=cpu"]),
                until="train",
                on_outcome=lambda outcome, times=times: times.update({outcome.name: time.process_time()}),
            )
            before, after = list(times.values())[-2:]
            spent[kind] = after - before
            outcome = result.outcome("train")
            assert outcome is not None
            metrics = outcome.metrics
            ended[kind] = {name: float(metrics[f"held_out/{name}"]) for name in ("domain", "general")}
    note = "; ".join(
        f"held-out {name} {loss:.4f}, online {ended['online'][name]:.4f} ({loss / ended['online'][name] - 1:+.2%})"
        for name, loss in ended["offline"].items()
    )
    bound = spent["online"] * bound_share
    return Measurement(
        "stored_teacher",
        "whole tiny_offline.yaml, offline",
        spent["offline"],
        spent["offline"] / bound,
        reference,
        note,
    )


def _zipf(reference: str, bound: float) -> Measurement:
    """Distributions like a large model's: mass falls with a power of the rank, some tokens sure and some wide open."""
    generator = torch.Generator().manual_seed(0)
    log_ranks = torch.arange(1, ZIPF_VOCABULARY + 1).float().log()
    rows = []
    for _ in range(ZIPF_TOKENS):
        slope = torch.empty(()).uniform_(1.0, 2.6, generator=generator)
        noise = torch.randn(ZIPF_VOCABULARY, generator=generator) / 2
        rows.append((noise - slope * log_ranks)[torch.randperm(ZIPF_VOCABULARY, generator=generator)])
    logs = torch.log_softmax(torch.stack(rows), dim=-1)
    top = stored_logits.fitted(stored_logits.choose(logs, limit=128, tail=0.005), ZIPF_VOCABULARY, 120.0)
    stored = stored_logits.encode(top, ZIPF_VOCABULARY)
    error = stored_logits.storage_error(top, stored_logits.decode([stored], ZIPF_VOCABULARY))
    seconds = interleaved(
        {"decode": lambda: stored_logits.decode([stored], ZIPF_VOCABULARY)}, rounds=ROUNDS, clock=time.process_time
    )["decode"]
    note = f"{stored.stored_bytes / len(stored):.1f} B/token, KL {error.kl_nats:.1e}, {error.ids:.0f} ids"
    return Measurement(
        "stored_teacher", f"reading {ZIPF_TOKENS} tokens of 201,088", seconds, seconds / bound, reference, note
    )
