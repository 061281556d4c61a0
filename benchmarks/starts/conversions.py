"""Converted checkpoints of every start, made by the stages that a recipe runs, each once."""

from __future__ import annotations

import hashlib
import shutil
from functools import cache
from pathlib import Path

from benchmarks.starts.setting import KEPT, Setting
from benchmarks.starts.subjects import Training
from nexus_core.checkpoint.source import Checkpoint, open_checkpoint
from nexus_core.recipe.schema import Collect, Convert, Sampling, Select
from nexus_core.stages.collect import collect
from nexus_core.stages.convert import convert
from nexus_core.stages.select import choose_in_every_layer
from nexus_core.statistics.kept_inputs import FILE_NAME as MOE_INPUTS_NAME
from nexus_core.statistics.saliency import FILE_NAME as SALIENCY_NAME


class Conversions:
    """Collects once per domain, and converts on demand."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self._statistics = cache(self._collect)

    def checkpoint(self, training: Training) -> Checkpoint:
        """The checkpoint that a shared expert's training begins with."""
        subject, domain, seed = training.subject, training.domain, training.seed
        both = self._statistics(domain, "both")
        chosen_by = both if subject.statistics == "both" else self._statistics(domain, "domain")
        out = self._folder(f"{subject} {domain} {seed}")
        selection = choose_in_every_layer(
            chosen_by, Select(strategy=subject.selection, top_k=subject.top_k, seed=seed), out
        )
        settings = Convert(merge=subject.merge, start=subject.start, seed=seed, **dict(subject.parameters))
        convert(
            self.setting.checkpoint,
            selection,
            settings,
            out,
            moe_inputs=both / MOE_INPUTS_NAME,
            neuron_saliency=both / SALIENCY_NAME,
            learn=[domain],
            keep=[KEPT],
        )
        return open_checkpoint(out)

    def _collect(self, domain: str, statistics: str) -> Path:
        """A folder of statistics, of the domain and the kept set in equal parts or of the domain alone."""
        names = (domain, KEPT) if statistics == "both" else (domain,)
        settings = Collect(
            data=dict.fromkeys(names, 1.0),
            tokens=self.setting.sizes.collected_tokens // (2 if statistics == "domain" else 1),
            sequence_length=self.setting.sizes.sequence_length,
            sampling=Sampling(candidates=self.setting.sizes.candidates),
            expert_norms=True,
        )
        out = self._folder(f"{domain} {statistics}")
        collect(self.setting.checkpoint, {name: self.setting.sources[name] for name in names}, settings, out)
        return out

    def _folder(self, what: str) -> Path:
        folder = self.setting.folder / hashlib.sha256(what.encode()).hexdigest()[:16]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder
