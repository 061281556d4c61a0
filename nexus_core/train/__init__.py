"""Distillation of a model's additions by itself: schedule, optimizer, loop, checkpoints, and the model at the end."""
