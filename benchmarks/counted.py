"""A network that counts its steps of training in a file, whichever process takes them: one byte each."""

from __future__ import annotations

import os

from torch import Tensor, nn


class Counted(nn.Module):
    """A small perceptron; every step of training adds a byte to the file `tally`."""

    def __init__(self, width: int, dim: int, tally: str) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, dim))
        self._tally = tally

    def forward(self, items: Tensor) -> Tensor:
        """Give representations, (N, width) -> (N, dim)."""
        if self.training:
            file = os.open(self._tally, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(file, b".")
            os.close(file)
        return self.layers(items)
