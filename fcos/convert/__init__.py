"""Checkpoints of other FCOS code bases, read and written."""
