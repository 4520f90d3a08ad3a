"""Checkpoints of other FCOS implementations: one module for each family."""
