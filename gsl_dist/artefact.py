"""What a stage leaves behind: a folder of files, and a card written last that pins them.

A folder without its card is unfinished work and counts as absent. The card carries a digest of itself and records which
settings and inputs made the artefact (`made_by`), so that a relaunch of the same stage finds its work done, and another
run never overwrites it.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from gsl_dist.codebook import Codebook
from gsl_dist.config import Strict, hide_keys
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
    shown = card.model_copy(update={"config": hide_keys(card.config)})
    folder.write_sealed(name_card(card.kind), shown.model_dump(mode="json"))
    return shown


def open_card(folder: Folder, kind: str, *, verify: bool = True) -> Card:
    """Read the card of an artefact and, unless told otherwise, check all of its files.

    Raises:
        ArtefactError: there is no such artefact, or the card or a file that it pins is not as it was written.
    """
    if not folder.exists(name_card(kind)):
        raise ArtefactError(folder.path(), f"there is no finished {kind} here ({name_card(kind)} is missing)")
    try:
        card = Card.model_validate(folder.read_sealed(name_card(kind), always=False))
    except ValidationError as error:
        raise ArtefactError(folder.path(name_card(kind)), "it is not the card of an artefact") from error
    for entry in card.files if verify else []:
        folder.check(entry)
    return card


def find_finished(folder: Folder, kind: str, made_by: str, *, verify: bool = True) -> Card | None:
    """Give the card if this very work is done already, None if nothing is.

    Args:
        folder: where it would be.
        kind: of artefact.
        made_by: the hash of the settings and inputs.
        verify: whether to check all of its files; not where there are too many for one process.

    Raises:
        ConfigError: the folder holds an artefact of other settings or inputs, which is never overwritten.
    """
    if not folder.exists(name_card(kind)):
        return None
    card = open_card(folder, kind, verify=verify)
    if card.made_by != made_by:
        raise ConfigError("output", folder.path(), f"it holds a {kind} made by other settings; choose another folder")
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
