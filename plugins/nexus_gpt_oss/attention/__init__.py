"""Attention with sinks and sliding windows over long sequences, without ever holding an S x S matrix.

    blocks   plain torch, a block of queries at a time: CPUs, and wherever flex does not work
    flex     torch's flex_attention, compiled: GPUs, after it was checked against blocks

Short sequences, and single tokens read with a cache, go through transformers' own attention. Which of the two reads
long ones is chosen by device; NEXUS_GPT_OSS_ATTENTION=eager, blocks or flex forces one for sequences of any length.
"""

from __future__ import annotations

# Sequences longer than this, by device, go through blocks or flex: on a CPU what is shorter takes little memory, on a
# GPU batches have many sequences, each with its own scores.
LONGER_THAN = {"cpu": 1024, "cuda": 256}
