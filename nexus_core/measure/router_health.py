"""How far a student's routers are from the base's: entropy and L1 distance, per layer, over any number of tokens.

# L layers, E experts, T tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Layers = Sequence[torch.Tensor]


def entropy_sum(logits_TE: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the entropy of softmax(logits), nats, in float32. Source: Shannon 1948."""
    log_probabilities_TE = torch.log_softmax(logits_TE.float(), dim=-1)
    return -(log_probabilities_TE.exp() * log_probabilities_TE).sum()


def l1_sum(student_TE: torch.Tensor, base_TE: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of sum_e |p_student(e) - p_base(e)|, from 0 (the same) to 2 (disjoint) a token, in float32."""
    student = torch.softmax(student_TE.float(), dim=-1)
    base = torch.softmax(base_TE.float(), dim=-1)
    return (student - base).abs().sum()


class RouterHealth:
    """Sums over micro-batches, one per layer; the properties are means per token, (L,) float64, and layers' means."""

    def __init__(self) -> None:
        self.tokens = 0
        self.compared_tokens = 0
        self._entropy: torch.Tensor | None = None
        self._base_entropy: torch.Tensor | None = None
        self._l1: torch.Tensor | None = None

    @torch.no_grad()
    def update(self, student: Layers, base: Layers = ()) -> None:
        """Add T tokens: router logits (T, E) of every layer; base: the same tokens', or nothing if it was not run."""
        tokens = student[0].shape[0]
        self.tokens += tokens
        self._entropy = _added(self._entropy, [entropy_sum(logits_TE) for logits_TE in student])
        if base:
            self.compared_tokens += tokens
            self._base_entropy = _added(self._base_entropy, [entropy_sum(logits_TE) for logits_TE in base])
            self._l1 = _added(self._l1, [l1_sum(ours, theirs) for ours, theirs in zip(student, base, strict=True)])

    def add_up(self, summed: Callable[[torch.Tensor], torch.Tensor], layers: int) -> None:
        """Make these the sums over several processes. summed: gives the sum of all processes' tensors, on the CPU.

        layers: how many there are, for a process that has seen no token.
        """
        zeros_L = torch.zeros(layers, dtype=torch.float64)
        sums = (zeros_L if each is None else each.cpu() for each in (self._entropy, self._base_entropy, self._l1))
        self._entropy, self._base_entropy, self._l1 = summed(torch.stack(list(sums))).unbind()
        self.tokens, self.compared_tokens = summed(torch.tensor([self.tokens, self.compared_tokens])).tolist()

    @property
    def entropy(self) -> torch.Tensor:
        """The student's entropy by layer, nats per token."""
        return _mean(self._entropy, self.tokens)

    @property
    def base_entropy(self) -> torch.Tensor:
        """The base's entropy by layer, nats per token, over the tokens it was run on."""
        return _mean(self._base_entropy, self.compared_tokens)

    @property
    def l1(self) -> torch.Tensor:
        """L1 distance to the base by layer, mean over the tokens it was run on."""
        return _mean(self._l1, self.compared_tokens)

    def summary(self) -> dict[str, float]:
        """Means over layers: router_entropy, and router_entropy_base and router_l1 if the base was run."""
        if not self.tokens:
            return {}
        values = {"router_entropy": float(self.entropy.mean())}
        if self.compared_tokens:
            values["router_entropy_base"] = float(self.base_entropy.mean())
            values["router_l1"] = float(self.l1.mean())
        return values


def _added(total: torch.Tensor | None, sums: list[torch.Tensor]) -> torch.Tensor:
    # stays on the device: a step must not wait for a number nobody reads yet
    sums_L = torch.stack(sums).double()
    return sums_L if total is None else total + sums_L


def _mean(total: torch.Tensor | None, tokens: int) -> torch.Tensor:
    return torch.zeros(0, dtype=torch.float64) if total is None else total.cpu() / max(tokens, 1)
