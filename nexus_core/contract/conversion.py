"""Converted and saved checkpoints hold what they should, and come back as they were, here and in another process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import torch
from torch import nn

from nexus_core.additions import SharedExpert, additions, as_teacher
from nexus_core.checkpoint.reader import CheckpointReader
from nexus_core.contract.function import TOLERANCE
from nexus_core.contract.subject import Subject, raw, require, require_equal, stored
from nexus_core.statistics.listening import listen

FRESH_FILE = "fresh.pt"


def check_conversion(subject: Subject) -> None:
    """A zero-start conversion leaves every logit and every byte of the routed experts as they were."""
    folder = subject.converted()
    model = subject.model(folder)
    require_equal(subject.logits(model), subject.logits(subject.model()), "a zero-start conversion: logits")
    before, after = subject.checkpoint.reader, CheckpointReader(folder)
    for location in subject.hook.nexus_enumerate_experts(config=subject.checkpoint.config):
        for part in location.parts:
            same = torch.equal(stored(before, part.name), stored(after, part.name))
            require(same, f"a conversion changes '{part.name}', a routed expert's tensor")
    trainables = subject.hook.nexus_trainable_parameters(model=model)
    missing = sorted(name for name in trainables if name not in after)
    require(not missing, f"nexus_shared_expert_tensors: no tensor has the parameter's name '{(missing or [''])[0]}'")
    blank = subject.hook.nexus_read_expert(
        reader=before, config=subject.checkpoint.config, layer=subject.checkpoint.description.layers[0], expert=0,
        dtype=subject.checkpoint.dtype,
    )  # fmt: skip
    for name, tensor in subject.hook.nexus_shared_expert_tensors(
        config=subject.checkpoint.config, layer=subject.checkpoint.description.layers[0], weights=blank
    ).items():
        require(name in trainables, f"nexus_shared_expert_tensors: '{name}' is not the name of a trainable parameter")
        require(tensor.shape == trainables[name].shape, f"nexus_shared_expert_tensors: '{name}' is misshapen")


def check_full_start(subject: Subject) -> None:
    """A converted checkpoint's shared expert, as loaded, computes what the hooks say the merged expert does."""
    model = subject.model(subject.converted("full", start="full"))
    with listen(model, subject.checkpoint.family, keep_inputs=True) as listener:
        subject.logits(model)
        on = {layer: output.clone() for layer, output in listener.outputs.items()}
        first = subject.checkpoint.description.layers[0]
        inputs = listener.inputs[first]
        with as_teacher(model):
            subject.logits(model)
            off = listener.outputs[first]
    shared_expert = next(addition for addition in additions(model) if isinstance(addition, SharedExpert))
    with torch.no_grad():
        expected = shared_expert(inputs)
    error = ((on[first] - off - expected).norm() / on[first].norm()).item()
    require(error < TOLERANCE, f"layer {first}: the shared expert adds something else than its output, by {error:.2g}")
    linears = (shared_expert.gate_proj, shared_expert.up_proj, shared_expert.down_proj)
    gate, up = linears[0](inputs), linears[1](inputs)
    neurons = subject.hook.nexus_neuron_activations(config=subject.checkpoint.config, gate=gate, up=up)
    require_equal(linears[2](neurons), expected, "nexus_neuron_activations: the shared expert's activation")


def check_round_trip(subject: Subject) -> None:
    """What save_pretrained writes is read back to the bit, additions and experts, and saves the same again."""
    model = subject.extended()
    folder, again = subject.work / "saved", subject.work / "saved_again"
    model.save_pretrained(folder)
    reloaded = subject.model(folder)
    _require_same_state(reloaded, model, "save_pretrained and load")
    require_equal(subject.logits(reloaded), subject.logits(model), "save_pretrained and load: logits")
    reloaded.save_pretrained(again)
    first, second = CheckpointReader(folder), CheckpointReader(again)
    require(sorted(first) == sorted(second), "save_pretrained: the second save has other tensors than the first")
    for name in first:
        require(torch.equal(stored(first, name), stored(second, name)), f"save_pretrained: '{name}' changes on its way")
    names = set(subject.hook.nexus_trainable_parameters(model=model))
    require(
        names <= set(first), f"save_pretrained: renames {sorted(names - set(first))[:3]}, which train would not find"
    )


def _require_same_state(found: nn.Module, expected: nn.Module, what: str) -> None:
    states = [module.state_dict() for module in (found, expected)]
    require(list(states[0]) == list(states[1]), f"{what}: other tensors come back than were saved")
    for name, tensor in states[0].items():
        require(torch.equal(raw(tensor), raw(states[1][name])), f"{what}: '{name}' comes back changed")


def check_fresh_process(subject: Subject) -> None:
    """Another process that only imports nexus_core.auto loads a converted checkpoint to the same logits."""
    check_fresh_processes([subject])


def check_fresh_processes(subjects: Sequence[Subject]) -> None:
    """The same for several checkpoints in one process, whose imports take most of the time."""
    script = (
        "import sys, torch, nexus_core.auto\n"
        "from transformers import AutoModelForCausalLM\n"
        "for folder, file, dtype in zip(*[iter(sys.argv[1:])] * 3):\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()\n"
        "    with torch.no_grad(): torch.save(model(torch.load(file), use_cache=False).logits, file)\n"
    )
    arguments: list[str] = []
    for subject in subjects:
        subject.work.mkdir(parents=True, exist_ok=True)
        torch.save(subject.tokens, subject.work / FRESH_FILE)
        dtype = str(subject.dtype).removeprefix("torch.")
        arguments += [str(subject.converted()), str(subject.work / FRESH_FILE), dtype]
    run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    require(run.returncode == 0, f"a fresh process cannot load converted checkpoints: {run.stderr[-2000:]}")
    for subject in subjects:
        found, expected = torch.load(subject.work / FRESH_FILE), subject.logits(subject.model(subject.converted()))
        require_equal(found, expected, f"{subject.folder.name} in a fresh process: logits")
