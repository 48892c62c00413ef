"""What a training that was lost goes on from: its state, and beside it a pin by which a damaged state is found.

Ray keeps checkpoints as folders and does not look into them. A state that is not, byte for byte, the one that was
written is refused before torch reads it: going on from other weights would end in another network, silently.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from gsl_dist.errors import ArtefactError
from gsl_dist.storage import FileEntry, Folder

STATE, PIN = "state.pt", "state.json"


def write_state(place: str | Path, state: dict[str, Any]) -> None:
    """Write a state and its pin into a folder on this machine."""
    folder = Folder(place)
    with folder.whole(STATE) as path:
        torch.save(state, path)
    folder.write_sealed(PIN, folder.pin(STATE).model_dump(mode="json"))


def read_state(place: str | Path) -> dict[str, Any]:
    """Read the state that a folder on this machine holds.

    Raises:
        ArtefactError: it is not as it was written; the training has to begin anew, in another folder.
    """
    folder = Folder(place)
    try:
        entry = FileEntry.model_validate(folder.read_sealed(PIN))
    except ValidationError as error:
        raise ArtefactError(folder.path(PIN), "it is not the pin of a checkpoint") from error
    folder.check(entry)
    state: dict[str, Any] = torch.load(Path(place) / STATE, map_location="cpu", weights_only=True)
    return state
