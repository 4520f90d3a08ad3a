"""What was done to a model, in a form that prints well."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Replacement:
    """A method of the model, and what computes its result now."""

    method: str
    by: str


@dataclass(frozen=True)
class Figure:
    """One result of the self-check: how far ours was from that of torchvision's own method."""

    what: str
    difference: float
    """Relative, in the L2 norm."""
    limit: float

    @property
    def agrees(self) -> bool:
        """NaN does not."""
        return self.difference <= self.limit


@dataclass(frozen=True)
class Report:
    """What :func:`accelerate` did. Print it."""

    model: str
    """Class of the model before, and now."""
    device: str
    """Where the self-check ran."""
    replaced: tuple[Replacement, ...]
    kept: tuple[Replacement, ...]
    """What is still torchvision's, and why."""
    figures: tuple[Figure, ...]
    """Empty if the model had been accelerated before."""

    def __str__(self) -> str:
        lines = [self.model]
        for title, entries in (("replaced", self.replaced), ("kept", self.kept)):
            lines.append(f"  {title}")
            width = max((len(entry.method) for entry in entries), default=0)
            lines += [f"    {entry.method:<{width}}  {entry.by}" for entry in entries]
        if self.figures:
            lines.append(f"  checked against torchvision's own on {self.device}")
            lines += table_of(self.figures)
        return "\n".join(lines)


def table_of(figures: tuple[Figure, ...]) -> list[str]:
    """Lines of text."""
    width = max(len(figure.what) for figure in figures)
    return [
        f"    {figure.what:<{width}}  differs by {figure.difference:.1e}, limit {figure.limit:.0e}"
        + ("" if figure.agrees else "  <- too much")
        for figure in figures
    ]
