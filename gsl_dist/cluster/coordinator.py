"""Where workers meet to train one codebook: the actor that carries the messages of `quantizers.coordinate`.

Each worker opens a meeting by the same key and then posts its answers; when all have answered, the coordinator
thinks, and everyone gets its next question, or the trained codebook. What travels are statistics and one bounded
sample; what comes back is the codebook, once to each node: a question lies in Ray's object store for all to read.

An answer depends on nothing but its question and the worker's rows. So a worker whose process was lost, and that Ray
runs again, comes in at the question that is open; what it missed, others have answered with it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gsl_dist.codebook import Codebook
from gsl_dist.errors import ConfigError, DataError, GslError
from gsl_dist.quantizers import (
    Ask,
    LloydConfig,
    Quantizer,
    QuantizerConfig,
    Rows,
    Trained,
    answer,
    coordinate,
    make_quantizer,
)
from gsl_dist.quantizers.coordinate import Coordination

Step = Ask | Trained


@dataclass(frozen=True)
class Agenda:
    """What a meeting is to train: which quantizer for vectors of `dim` numbers, how, and from which codebook on."""

    quantizer: QuantizerConfig
    dim: int
    lloyd: LloydConfig
    seed: int
    start: Codebook | None = None

    def begin(self) -> Coordination:
        """Begin the training."""
        return coordinate(make_quantizer(self.quantizer, self.dim), self.lloyd, seed=self.seed, start=self.start)


@dataclass(frozen=True)
class Seat:
    """One worker's place in the meetings of one attempt."""

    coordinator: Any
    attempt: str
    rank: int
    workers: int

    def attend(self, key: int, agenda: Agenda, rows: Rows, *, remark: bool = False) -> Trained:
        """Take part in training a codebook with the rows of this worker, to the end.

        Args:
            key: the meeting.
            agenda: what is to be trained; the same from every worker.
            rows: the rows of this worker.
            remark: whether the first worker notes every iteration for the driver, as its phase and `Turn`.
        """
        quantizer = make_quantizer(agenda.quantizer, agenda.dim)
        number, step = self._read(self.coordinator.open.remote(self.attempt, key, self.workers, agenda))
        while isinstance(step, Ask):
            if remark and step.turn and self.rank == 0:
                self.coordinator.remark.remote((step.phase, step.turn))
            given = answer(step, rows, quantizer)
            number, step = self._read(self.coordinator.post.remote(key, self.rank, number, given))
        return step

    def _read(self, reply: Any) -> tuple[int, Step]:
        number, [shared] = ray.get(reply)
        return number, ray.get(shared)


class Meeting:
    """One training of one codebook: collects an answer from every worker, then goes one step on.

    `number` and `step` are the question that is open, or in the end what was trained.
    """

    def __init__(self, coordination: Coordination, workers: int) -> None:
        self._coordination, self._workers = coordination, workers
        self._answers: dict[int, Any] = {}
        self._advanced: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.number, self.step = 0, cast(Step, next(coordination))

    async def post(self, rank: int, number: int, given: Any) -> None:
        """Hand in the answer to a question and wait until there is another; one that is closed asks for no answer."""
        if number != self.number:
            return
        self._answers[rank] = given
        waiting = self._advanced
        if len(self._answers) == self._workers:
            self._advance()
        await asyncio.shield(waiting)

    def abandon(self) -> None:
        """Send everyone home: a worker of this meeting is gone."""
        if not self._advanced.done():
            self._advanced.cancel()

    def _advance(self) -> None:
        ordered = [self._answers[rank] for rank in sorted(self._answers)]
        waiting, self._advanced = self._advanced, asyncio.get_running_loop().create_future()
        self._answers = {}
        try:
            self.step = self._coordination.send(ordered)
        except StopIteration as end:
            self.step = end.value
        except GslError as error:
            waiting.set_exception(error)
            return
        self.number += 1
        waiting.set_result(None)


class Coordinator:
    """The shell around meetings; it also collects remarks on progress for the driver."""

    def __init__(self) -> None:
        self._attempt, self._meetings, self._remarks = "", {}, []  # type: ignore[var-annotated]
        self._shared: tuple[Step | None, Any] = None, None

    async def open(self, attempt: str, key: int, workers: int, agenda: Agenda) -> tuple[int, list[Any]]:
        """Open or join the meeting `key`, and give the question that is open: its number and a reference."""
        if attempt != self._attempt:
            # The workers were restarted: those still waiting in older meetings are dead.
            for meeting in self._meetings.values():
                meeting.abandon()
            self._attempt, self._meetings = attempt, {}
        if key not in self._meetings:
            self._meetings = {key: Meeting(agenda.begin(), workers)}
        return self._share(self._meetings[key])

    async def post(self, key: int, rank: int, number: int, given: Any) -> tuple[int, list[Any]]:
        """Hand in the answer to a question of a meeting and wait for the next: its number and a reference."""
        meeting = self._meetings[key]
        await meeting.post(rank, number, given)
        return self._share(meeting)

    async def remark(self, remark: Any) -> None:
        """Note something for the driver."""
        self._remarks.append(remark)

    async def take_remarks(self) -> list[Any]:
        """Give what was noted since the last call."""
        taken, self._remarks = self._remarks, []
        return taken

    def _share(self, meeting: Meeting) -> tuple[int, list[Any]]:
        if meeting.step is not self._shared[0]:
            self._shared = meeting.step, ray.put(meeting.step)
        # In a list, or Ray would hand over what it refers to.
        return meeting.number, [self._shared[1]]


def check_rows(corpus_rows: int, lloyd: LloydConfig, quantizer: Quantizer) -> None:
    """See to it, before anything is started, that there are rows enough for a codebook.

    Raises:
        DataError: the corpus has fewer than that.
        ConfigError: fewer than that are to be used.
    """
    if corpus_rows < quantizer.min_rows:
        raise DataError(
            "corpus", f"{corpus_rows} rows", f"the codebook needs at least {quantizer.min_rows} to train on"
        )
    if lloyd.sample_rows < quantizer.min_rows:
        raise ConfigError("lloyd.sample_rows", lloyd.sample_rows, f"the codebook needs {quantizer.min_rows} rows")


def start_coordinator() -> Any:
    """Start a coordinator as an actor; it ends with the last handle to it.

    It lives on the node of whoever starts it, without whom nothing goes on anyway: the loss of another costs a worker.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    start = ray.remote(num_cpus=0, max_concurrency=1000, scheduling_strategy=here)(Coordinator)
    return start.remote()
