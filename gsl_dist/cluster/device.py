"""Where a replica searches its rows: on the processor, or on a GPU that holds a copy of them.

Codes of lines alone are searched on a GPU. What lists are asked for besides, a row's code or where a filter's rows lie,
they are asked for where they were opened; there the rows stay mapped.

torch is loaded where there is a GPU to search on and nowhere else: a replica on a processor has no use for it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from gsl_dist.codebook import CodeArray, FloatArray, IdArray
from gsl_dist.errors import ConfigError
from gsl_dist.hits import NO_ID
from gsl_dist.index.coarse import Probed
from gsl_dist.index.search import LocalSearcher
from gsl_dist.index.selection import Places, Selection
from gsl_dist.index.vlq import LineLists, count_cells

if TYPE_CHECKING:
    from gsl_dist.quantizers.regions import Regions

Device = Literal["auto", "cpu", "cuda"]
"""What searches: the processor, a GPU, or a GPU where there is one that codes of this kind fit on."""

_DRIVER = "libcuda.so.1"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceLists:
    """Lists of regions that a device searches.

    Args:
        lists: the rows, as they were opened.
        regions: the same on the device.
    """

    lists: LineLists
    regions: Regions

    @property
    def rows(self) -> int:
        """Give the number of rows."""
        return self.lists.rows

    @property
    def places(self) -> Places:
        """Give where each row is, by id."""
        return self.lists.places

    def search(
        self,
        queries_QD: FloatArray,
        k: int,
        probes: int,
        chosen: Selection | None = None,
        *,
        probed: Probed | None = None,
    ) -> tuple[FloatArray, IdArray]:
        """Give the k nearest rows of each query in the `probes` regions that come first, among those chosen.

        Shapes: (Q, D) -> squared distances (Q, k) float32, ids (Q, k) int64, -1 where there is no further row.
        """
        assert probed is None, "no coarse step ranks regions"
        cells, mask = count_cells(self.lists.codebook, probes), None if chosen is None else chosen.mask
        distances_Qk, ranks_Qk = self.regions.search(queries_QD, k, probes, cells=cells, mask_N=mask)
        ids_Qk, is_found_Qk = np.full(ranks_Qk.shape, NO_ID), ranks_Qk >= 0
        ids_Qk[is_found_Qk] = self.places.ids_N[ranks_Qk[is_found_Qk]]
        return distances_Qk, ids_Qk

    def take(self, places_n: NDArray[np.int64]) -> tuple[IdArray, CodeArray]:
        """Give the regions (n,) and packed codes (n, code_bytes) of rows by their numbers in list order."""
        return self.lists.take(places_n)

    def read(self) -> tuple[IdArray, IdArray, CodeArray]:
        """Give all rows as ids (N,), regions (N,) and packed codes (N, code_bytes), in list order."""
        return self.lists.read()

    def write(self, path: Path) -> None:
        """Write the lists as one file."""
        self.lists.write(path)


def place_searcher(searcher: LocalSearcher, device: Device) -> LocalSearcher:
    """Give a searcher whose lists lie where they are to be searched.

    With `auto` that is a GPU, where there is one for this process and codes of this kind fit on it.

    Raises:
        ConfigError: a GPU is asked for and cannot be had; it says why.
    """
    if device == "cpu":
        return searcher
    fault = find_fault(searcher)
    if fault is None:
        assert isinstance(searcher.lists, LineLists), type(searcher.lists)
        return replace(searcher, lists=hold_lists(searcher.lists, "cuda"))
    if device == "cuda":
        raise ConfigError("device", device, fault)
    _log.info("rows are searched on the processor: %s", fault)
    return searcher


def check_device(device: Device, kind: str) -> None:
    """Let a device pass that searches codes of a kind.

    Raises:
        ConfigError: a GPU is asked for, and searches no such codes.
    """
    if device == "cuda" and kind != "vlq":
        raise ConfigError("device", device, _tell_kind(kind))


def find_fault(searcher: LocalSearcher) -> str | None:
    """Tell why the lists of a searcher cannot be searched on a GPU; None where they can."""
    if not isinstance(searcher.lists, LineLists):
        return _tell_kind(searcher.codebook.kind)
    if not _has_driver():
        return "no GPU was found for this process; resources.gpus gives replicas theirs"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed; pip install gsl_dist[train] brings it"
    import torch

    if not torch.cuda.is_available():
        return "torch finds no GPU for this process; it may be a build without, or resources.gpus may give it none"
    return find_shortage(searcher.lists, torch.cuda.mem_get_info()[0])


def find_shortage(lists: LineLists, free_bytes: int) -> str | None:
    """Tell what a device lacks to hold and search rows; None where there is room."""
    from gsl_dist.quantizers.regions import BATCH_BYTES, MOST_ROWS, measure_bytes

    if lists.rows > MOST_ROWS:
        return f"a GPU searches {MOST_ROWS} rows at most and these are {lists.rows}: more replicas hold fewer each"
    wanted = measure_bytes(lists.codebook, lists.rows) + BATCH_BYTES
    if wanted <= free_bytes:
        return None
    sizes = f"{wanted / 2**30:.2f} GiB with what a search takes, and {free_bytes / 2**30:.2f} GiB are free there"
    return f"{lists.rows} rows take {sizes}: more replicas, each with a GPU, hold fewer each"


def hold_lists(lists: LineLists, device: str, *, batch_bytes: int | None = None) -> DeviceLists:
    """Copy lists to a device, to be searched there.

    Args:
        lists: as they were opened.
        device: where to; torch's name for it.
        batch_bytes: what a search may take there; 1 GiB by default.
    """
    from gsl_dist.quantizers.regions import BATCH_BYTES, Regions, RowArrays

    ranks_N = np.empty(lists.rows, np.int32)
    ranks_N[lists.places.places_N] = np.arange(lists.rows, dtype=np.int32)
    arrays = RowArrays(lists.offsets_R, lists.codes, lists.squares_N, ranks_N, lists.tables.centre_D)
    return DeviceLists(lists, Regions(lists.codebook, arrays, device, batch_bytes=batch_bytes or BATCH_BYTES))


def _tell_kind(kind: str) -> str:
    return f"codes of lines (`vlq`) alone are searched on a GPU, and those of this version are of kind {kind}"


def _has_driver() -> bool:
    """Tell whether there may be a GPU for this process, at less cost than by asking torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    return True
