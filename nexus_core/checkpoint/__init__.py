"""Checkpoints on disk: reading slices, writing shards, telling one from another; never a whole model in memory."""
