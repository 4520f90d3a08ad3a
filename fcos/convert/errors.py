"""What goes wrong with foreign checkpoints."""

from __future__ import annotations


class ConvertError(ValueError):
    """A foreign checkpoint is of no known kind, or has not exactly the weights it should have."""
