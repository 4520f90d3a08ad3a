"""The folder of a training run: what it holds, and how to find it again."""

from __future__ import annotations

import csv
import io
import os
from datetime import datetime
from pathlib import Path

from .config import Config, ConfigError
from .config_files import save_yaml

METRICS = (
    "iteration",
    "lr",
    "cls",
    "box",
    "centerness",
    "total",
    "images_per_second",
    "memory_gib",
    "ap",
    "ap50",
)


class RunFolder:
    """Paths and small files of a run.

    Attributes:
        path: the folder.
        best, last: checkpoints: the best evaluated one, and the one to go on from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "best.pt"
        self.last = path / "last.pt"
        self.metrics = path / "metrics.csv"

    @classmethod
    def create(cls, config: Config, name: str) -> RunFolder:
        """A new folder: ``train.output``, or runs/<name>-<date>-<time>.

        Raises:
            ConfigError: it holds a run already, which is never overwritten, or cannot be made.
        """
        path = config.train.output
        if path is None:
            path = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        run = cls(path)
        if run.last.exists() or run.metrics.exists():
            raise ConfigError(
                f"train.output {path} holds a run already: continue it with --resume {path}, or "
                "choose another folder"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            save_yaml(config, path / "config.yaml")
        except OSError as error:
            raise ConfigError(f"train.output {path}: cannot be written to ({error})") from error
        return run

    def add_row(self, **values: float | int | None) -> None:
        """Append to metrics.csv; columns that are not given stay empty."""
        new = not self.metrics.exists()
        with open(self.metrics, "a", newline="") as file:
            writer = csv.DictWriter(file, METRICS, restval="")
            if new:
                writer.writeheader()
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
            )

    def forget_after(self, iteration: int) -> None:
        """Drop the rows of metrics.csv that a resumed run is going to write again."""
        if not self.metrics.exists():
            return
        # after a crash of the machine, the last line may be cut off or be zeros
        lines = self.metrics.read_text(errors="replace").replace("\0", "").splitlines()
        rows = [
            row
            for row in csv.DictReader(lines)
            if row["iteration"].isdecimal() and int(row["iteration"]) <= iteration
        ]
        text = io.StringIO()
        writer = csv.DictWriter(text, METRICS, restval="")
        writer.writeheader()
        writer.writerows(rows)
        temporary = self.metrics.with_suffix(".tmp")
        temporary.write_text(text.getvalue())
        os.replace(temporary, self.metrics)
