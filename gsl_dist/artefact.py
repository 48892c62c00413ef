"""What a stage leaves behind: a folder of files, and a card written last that pins them.

A folder without its card is unfinished work and counts as absent. The card records which settings and inputs made the
artefact (`made_by`), so that a relaunch of the same stage finds its work done, and another run never overwrites it.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from gsl_dist.codebook import Codebook
from gsl_dist.config import Strict
from gsl_dist.errors import ArtefactError, ConfigError
from gsl_dist.storage import FileEntry, Folder

CODEBOOK = "codebook.safetensors"
"""The file of a codebook, in whichever artefact."""


class Card(Strict):
    """The description of a finished artefact.

    Args:
        kind: model, codebook or codes.
        made_by: a hash of the settings and inputs that decide the content.
        files: every file of the artefact but the card.
        config: the resolved config of the stage.
        facts: what the stage measured or decided.
    """

    kind: str
    made_by: str
    files: list[FileEntry]
    config: dict[str, Any]
    facts: dict[str, Any]

    def entry(self, name: str) -> FileEntry:
        """Give the pin of one file."""
        return next(entry for entry in self.files if entry.name == name)


def publish_card(folder: Folder, card: Card) -> Card:
    """Make an artefact exist, after all of its files are in place."""
    folder.sweep()
    folder.write_json(name_card(card.kind), card.model_dump(mode="json"))
    return card


def open_card(folder: Folder, kind: str, *, verify: bool = True) -> Card:
    """Read the card of an artefact and, unless told otherwise, check all of its files.

    Raises:
        ArtefactError: there is no such artefact, or a file differs from what the card pins.
    """
    if not folder.exists(name_card(kind)):
        raise ArtefactError(folder.path(), f"there is no finished {kind} here ({name_card(kind)} is missing)")
    try:
        card = Card.model_validate(folder.read_json(name_card(kind)))
    except ValidationError as error:
        raise ArtefactError(folder.path(name_card(kind)), "it is not the card of an artefact") from error
    for entry in card.files if verify else []:
        folder.check(entry)
    return card


def find_finished(folder: Folder, kind: str, made_by: str) -> Card | None:
    """Give the card if this very work is done already, None if nothing is.

    Raises:
        ConfigError: the folder holds an artefact of other settings or inputs, which is never overwritten.
    """
    if not folder.exists(name_card(kind)):
        return None
    card = open_card(folder, kind)
    if card.made_by != made_by:
        raise ConfigError("output", folder.location, f"it holds a {kind} made by other settings; choose another folder")
    return card


def load_codebook(location: str) -> Codebook:
    """Read the codebook of a codebook folder.

    Raises:
        ArtefactError: absent or damaged.
    """
    folder = Folder(location)
    open_card(folder, "codebook")
    return Codebook.load(folder, CODEBOOK)


def name_card(kind: str) -> str:
    """Give the name of an artefact's card."""
    return f"{kind}.json"
