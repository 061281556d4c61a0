"""A rolling average of the weights with an earlier state of themselves: forgetting less for a little of the gain.

Every `interval` steps the weights become (1 - alpha) * weights + alpha * anchor, and the anchor what they became; the
first anchor is the state the run began with. Source: arXiv 2501.05559 (averaging with earlier checkpoints in
sequential fine-tuning).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

KEY_PREFIX = "anchor/"


class Anchor:
    """Holds the earlier state of `masters` (float32, by name), as many numbers as are trained.

    On the CPU: it is looked at once in `interval` steps, and would take 4 bytes a number of a GPU all the time.
    """

    def __init__(self, interval: int, alpha: float, masters: Mapping[str, torch.Tensor]):
        self.interval, self.alpha = interval, alpha
        self._anchor = {name: tensor.detach().to("cpu", copy=True) for name, tensor in masters.items()}

    def is_due(self, step: int) -> bool:
        """Whether it is time to average after this step."""
        return step % self.interval == 0

    @torch.no_grad()
    def average(self, name: str, master: torch.Tensor) -> None:
        """Average one parameter's numbers in place; each once when it is due."""
        master.lerp_(self._anchor[name].to(master.device), self.alpha)
        self._anchor[name].copy_(master)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The anchor as `anchor/NAME`, for checkpoints."""
        return {f"{KEY_PREFIX}{name}": tensor for name, tensor in self._anchor.items()}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what `state_tensors` gave."""
        for name, tensor in self._anchor.items():
            tensor.copy_(tensors[f"{KEY_PREFIX}{name}"])
