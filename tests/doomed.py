"""Networks that fail in the middle of training: one takes its worker down, another gives what is no number."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from torch import Tensor, nn


class Doomed(nn.Module):
    """A small perceptron that takes its process down at the given training step, unless the marker says it has."""

    def __init__(self, width: int, dim: int, marker: str, at_step: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, dim))
        self._marker, self._at_step, self._steps = Path(marker), at_step, 0

    def forward(self, items: Tensor) -> Tensor:
        if self.training:
            self._steps += 1
            if self._steps == self._at_step and not self._marker.exists():
                self._marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return self.layers(items)


class Poisoned(nn.Module):
    """A small perceptron that gives no numbers from the given training step on."""

    def __init__(self, width: int, dim: int, at_step: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, dim)
        self._at_step, self._steps = at_step, 0

    def forward(self, items: Tensor) -> Tensor:
        self._steps += self.training
        return self.layer(items) * (float("nan") if self._steps >= self._at_step else 1.0)
