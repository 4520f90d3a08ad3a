"""What goes wrong with a foreign checkpoint."""

from __future__ import annotations


class ConvertError(ValueError):
    """A file is no checkpoint that is known here, is damaged, or does not fit its own layout."""
