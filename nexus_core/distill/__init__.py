"""Terms of the training loss, one per file, weighted by name in `train.losses`.

A loss is a pure function `(signals: Signals, parameters) -> scalar tensor`: what one micro-batch adds to the step's
loss, its sum over tokens divided by the step's count of such tokens (`signals.step_tokens`), float32. `Strategy.needs`
names the signals it reads (`nexus_core.distill.signals`).
"""

from nexus_core.distill import hidden_match, lm, logits_kl, router_kl
from nexus_core.distill.signals import Signals, TokenCounts

STRATEGIES = [lm.STRATEGY, router_kl.STRATEGY, logits_kl.STRATEGY, hidden_match.STRATEGY]

__all__ = ["STRATEGIES", "Signals", "TokenCounts"]
