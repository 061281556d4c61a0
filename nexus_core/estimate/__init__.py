"""What a recipe will take, on paper: memory by part, disk, tokens, arithmetic, bytes moved and time of every stage.

Sums of the config's and the recipe's numbers that anyone can redo; nothing here reads a weight or asks a device.
`python -m benchmarks preflight` sets them beside measurements.

    # L layers, E experts, K experts per token, T tokens of a micro-batch, S sequence length
    # D hidden size, V vocabulary
"""

from nexus_core.estimate.devices import DEVICES, Device, find_device
from nexus_core.estimate.model import ModelSize
from nexus_core.estimate.remedies import Remedy, remedies
from nexus_core.estimate.stages import StageEstimate, estimate_stages
from nexus_core.estimate.work import Work
from nexus_core.estimate.workload import Prompts, Workload

__all__ = [
    "DEVICES",
    "Device",
    "ModelSize",
    "Prompts",
    "Remedy",
    "StageEstimate",
    "Work",
    "Workload",
    "estimate_stages",
    "find_device",
    "remedies",
]
