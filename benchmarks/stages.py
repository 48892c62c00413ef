"""Stages as `chaos.py` strikes them: tiny inputs, and a real process for each launch.

A `Yard` is a folder of corpora, configs and artefacts that nobody disturbed. Every round makes one of these again in
`out`, always at the same place, since cards name it. A launch is what an operator starts (`gsl_dist.cluster.job`, or
the pipeline), forked from a process that has imported everything, so that thousands can be started. Without Ray
(`alone`) the tasks of a stage run one after another in its own process.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsl_dist.artefact import CODEBOOK, Card, publish_card
from gsl_dist.cluster.job import PIPELINE, carry_out, open_stage, start_log
from gsl_dist.storage import Folder

# The tests' own corpora.
sys.path.append(str(Path(__file__).parent.parent / "tests"))
from corpora import write_vectors

ROWS, DIM, SHARDS, EPOCHS, STEPS, WORKERS = 1200, 16, 12, 4, 9, 2
HUNG_S = 240.0
MAKES = {"train": "model", "codebook": "codebook", "encode": "codes", "build": "index"}
CHAIN = ("codebook", "encode", "build")
"""The stages of the pipeline here."""

_VECTORS = "id_column: id, vector_column: vector"
_TEXTS = {
    "train": """
corpus: {{path: {yard}/train.parquet, id_column: id, vector_column: vector, label_column: label}}
encoder:
  {{kind: module, target: "counted:Counted", dim: 8, arguments: {{width: 16, dim: 8, tally: "{yard}/tally"}}}}
loss: {{kind: proxy}}
quantizer: {{kind: pq, sub_vectors: 2, bits: 3, cells: 4}}
fit: {{epochs: 4, warmup_epochs: 1, batch_size: 64}}
resources: {{workers: 2}}
output: {out}/model
""",
    "codebook": """
source: fitted
corpus: {{path: {yard}/corpus.parquet, id_column: id, vector_column: vector}}
quantizer: {{kind: rq, books: 3, bits: 4, cells: 4}}
lloyd: {{iterations: 100}}
resources: {{workers: 2}}
output: {out}/codebook
""",
    "encode": """
corpus: {{path: {yard}/corpus.parquet, id_column: id, vector_column: vector, payload_columns: [label]}}
codebook: {made}/codebook
shards: 12
batch_rows: 5
keep_vectors: true
resources: {{workers: 2}}
output: {out}/codes
""",
    "build": """
codes: {made}/codes
codebook: {made}/codebook
vectors: int8
index: {out}/index
version: v1
""",
}
_PIPELINE = "pause_s: 0.1\ntries: 20\nstages: [codebook, encode, build]\n"


@dataclass
class Launch:
    """A stage that was started.

    Args:
        process: what runs it.
        log: what it writes.
    """

    process: Any
    log: Path

    @property
    def pid(self) -> int:
        """Give the number of its process."""
        return int(self.process.pid)

    @property
    def is_over(self) -> bool:
        """Tell whether it has ended."""
        return self.process.exitcode is not None

    def wait(self, timeout_s: float = HUNG_S) -> int | None:
        """Give the exit code, or None if it did not end in the time given; then it is killed."""
        self.process.join(timeout_s)
        code: int | None = self.process.exitcode
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.process.join()
        return code

    def read_log(self) -> str:
        """Give what it has written so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Yard:
    """A folder with the inputs of all stages, and what undisturbed ones made of them.

    Args:
        folder: where.
        address: of the Ray that stages use.
        place: where outputs go; None: `out` inside.
    """

    def __init__(self, folder: Path, address: str = "", place: str | None = None) -> None:
        self.folder, self.address = folder, address
        self.out, self.made, self.tally = folder / "out", folder / "made", folder / "tally"
        self.place = place or str(self.out)
        self._logs = 0
        share_imports()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["chaos", *(f"gsl_dist.cluster.{stage}" for stage in MAKES)])
        self.out.mkdir(parents=True)
        write_vectors(folder / "corpus.parquet", rows=ROWS, dim=DIM)
        write_vectors(folder / "train.parquet", dim=DIM)
        self._write_configs("stages", str(self.made))
        self._write_configs(PIPELINE, self.place)
        (folder / PIPELINE / f"{PIPELINE}.yaml").write_text(_PIPELINE)

    def start(self, stage: str, meddle: Sequence[Callable[[], None]] = (), **env: str) -> Launch:
        """Start a stage, or the pipeline, in a process of its own.

        Args:
            stage: which.
            meddle: what is called in that process before.
            env: variables of its environment.
        """
        self._logs += 1
        log = self.folder / f"log-{self._logs}"
        config = self.folder / (PIPELINE if stage == PIPELINE else f"stages/{stage}.yaml")
        known = {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled", **env}
        process = self._context.Process(target=run_stage, args=(stage, config, log, known, tuple(meddle)))
        process.start()
        return Launch(process, log)

    def clear(self) -> None:
        """Forget what the last round made."""
        for path in self.out.iterdir():
            shutil.rmtree(path)
        self.tally.unlink(missing_ok=True)
        for log in self.folder.glob("log-*"):
            log.unlink()

    def keep(self, stage: str) -> None:
        """Let what a stage made be what further stages begin with."""
        shutil.copytree(self.out / MAKES[stage], self.made / MAKES[stage])

    def _write_configs(self, name: str, made: str) -> None:
        folder = self.folder / name
        folder.mkdir()
        for stage, text in _TEXTS.items():
            (folder / f"{stage}.yaml").write_text(text.format(yard=self.folder, out=self.place, made=made))


def share_imports() -> None:
    """Let every process that is started from here import what this one does."""
    held = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    wanted = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*wanted, *(path for path in held if path and path not in wanted)])


def run_stage(stage: str, config: Path, log: Path, env: dict[str, str], meddle: Sequence[Callable[[], None]]) -> None:
    """Run a stage as its job does, in this process, and exit as it does."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(env)
    for each in meddle:
        each()
    if stage == PIPELINE:
        from gsl_dist.cluster import pipeline

        sys.argv = ["pipeline", str(config)]
        pipeline.main()
        return
    start_log()
    sys.exit(carry_out(*open_stage(stage), str(config), []))


def make_codebook(yard: Yard) -> None:
    """Put a codebook where stages begin with one, without Ray."""
    import torch

    from gsl_dist.data import CorpusConfig, open_corpus
    from gsl_dist.quantizers import AdditiveConfig, LloydConfig, make_quantizer, train_codebook

    corpus = CorpusConfig(path=str(yard.folder / "corpus.parquet"), id_column="id", vector_column="vector")
    vectors = torch.from_numpy(open_corpus(corpus).read_all().items)
    quantizer = make_quantizer(AdditiveConfig(kind="rq", books=3, bits=4, cells=4), DIM)
    folder = Folder(yard.made / "codebook")
    train_codebook(vectors, quantizer, LloydConfig(iterations=5)).codebook.save(folder, CODEBOOK)
    made = {"made_by": "chaos", "config": {}, "facts": {}}
    publish_card(folder, Card(kind="codebook", files=[folder.pin(CODEBOOK)], **made))


def go_alone() -> None:
    """Let the tasks of stages run in this process, one after another, without Ray."""
    from gsl_dist.cluster import build, encode

    def run_here(work: Callable[..., Any], calls: Sequence[tuple[Any, ...]], resources: Any, **how: Any) -> list[Any]:
        found: list[Any] = []
        for call in calls:
            found.append(work(*call))
            how.get("ended", lambda count, result: None)(len(found), found[-1])
        return found

    for module in (encode, build):
        module.run_tasks, module.start_session = run_here, lambda cpus: None
