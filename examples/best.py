"""The best weights of a training so far, as a folder beside its checkpoints."""

import math
import pathlib
import shutil
from collections.abc import Callable

from examples import runs
from examples.files import disk_errors


class Best:
    """Watches validations; the folder `best` holds the weights of the best one."""

    def __init__(
        self, folder: pathlib.Path, metric: str, save: Callable[[pathlib.Path, dict], None]
    ):
        """Goes on after the validations in the run's metrics.

        Args:
          folder: of the training.
          metric: the figure that counts, the larger the better; of `loss` the smaller.
          save: writes weights into a new folder.
        """
        self.folder, self.save = folder / "best", save
        self.key, self.sign = f"val_{metric}", -1 if metric == "loss" else 1
        self.value, self.since, self.figures = -math.inf, 0, dict[str, float]()
        for row in runs.read_metrics(folder):
            if self.key in row:
                self._count(row)

    def _count(self, row: dict[str, float]) -> bool:
        value, self.since = self.sign * row[self.key], self.since + 1
        if not value > self.value:
            return False
        self.value, self.since = value, 0
        self.figures = {name: x for name, x in row.items() if name.startswith("val_")}
        return True

    def look(self, figures: dict[str, float], params: dict) -> None:
        """Keeps the weights if this validation is better than all before."""
        if self._count(figures):
            self._keep(params)

    def is_old(self, patience: int) -> bool:
        """Whether so many validations were no better; 0 is never."""
        return 0 < patience <= self.since

    def _keep(self, params: dict) -> None:
        new, old = (self.folder.with_name(f".best.{name}") for name in ("new", "old"))
        for left in (new, old):  # By a process that died here.
            shutil.rmtree(left, ignore_errors=True)
        with disk_errors(f"{self.folder} could not be written", "Make room there."):
            self.save(new, params)
            if self.folder.exists():
                self.folder.rename(old)
            new.rename(self.folder)
            shutil.rmtree(old, ignore_errors=True)
