"""Where workers meet to train one codebook: the actor that carries the messages of `quantizers.coordinate`.

Each worker opens a meeting by the same key and then posts its answers; when all have answered, the coordinator
thinks, and everyone gets its next question, or the trained codebook. What travels are statistics and one bounded
sample; what comes back is the codebook, once to each node: a question lies in Ray's object store for all to read.

Of many workers the answers stay where they are, and tasks join them, some at a time, until few enough are left for the
coordinator: what it takes in and holds grows neither with the corpus nor with the workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import ray

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
from gsl_dist.quantizers.coordinate import Asked, Coordination, join_answers

FAN_IN = 8
"""So many answers are taken in by one process."""
# Everyone waits in a call of its own for the next question.
_MOST_WORKERS = 1 << 16

Step = Ask | Trained
Collect = Callable[[Asked, list[Any]], Awaitable[list[Any]]]
"""Makes the answers of all workers those that are thought about."""


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
        [shared], is_crowded = ray.get(self.coordinator.open.remote(self.attempt, key, self.workers, agenda))
        step: Step = ray.get(shared)
        while isinstance(step, Ask):
            if remark and step.turn and self.rank == 0:
                self.coordinator.remark.remote((step.phase, step.turn))
            given = answer(step, rows, quantizer)
            # In a list, or Ray would hand over what it refers to.
            given = [ray.put(given)] if is_crowded else given
            [shared] = ray.get(self.coordinator.post.remote(key, self.rank, given))
            step = ray.get(shared)
        return step


class Meeting:
    """One training of one codebook: collects an answer from every worker, then goes one step on."""

    def __init__(self, coordination: Coordination, workers: int, collect: Collect) -> None:
        self._coordination, self._workers, self._collect = coordination, workers, collect
        self._answers: dict[int, Any] = {}
        self._next: asyncio.Future[Step] = asyncio.get_running_loop().create_future()
        self.first = self._last = next(coordination)

    async def post(self, rank: int, given: Any) -> Step:
        """Hand in an answer and wait for the next question."""
        self._answers[rank] = given
        waiting = self._next
        if len(self._answers) == self._workers:
            await self._advance()
        return await waiting

    def abandon(self) -> None:
        """Send everyone home: a worker of this meeting is gone."""
        if not self._next.done():
            self._next.cancel()

    async def _advance(self) -> None:
        ordered = [self._answers[rank] for rank in sorted(self._answers)]
        waiting, self._next = self._next, asyncio.get_running_loop().create_future()
        self._answers = {}
        try:
            self._last = self._coordination.send(await self._collect(self._last.what, ordered))
            waiting.set_result(self._last)
        except StopIteration as end:
            waiting.set_result(end.value)
        except (GslError, ray.exceptions.RayError) as error:
            waiting.set_exception(error)


class Coordinator:
    """The shell around meetings; it also collects remarks on progress for the driver.

    Args:
        fan_in: so many workers hand their answers in; of more, answers are joined on the way.
    """

    def __init__(self, fan_in: int) -> None:
        self._fan_in = fan_in
        self._attempt, self._meetings, self._remarks = "", {}, []  # type: ignore[var-annotated]
        self._shared: tuple[Step | None, Any] = None, None

    async def open(self, attempt: str, key: int, workers: int, agenda: Agenda) -> tuple[list[Any], bool]:
        """Open or join the meeting `key`; give a reference to its first question, and whether answers are joined."""
        if attempt != self._attempt:
            # The workers were restarted: those still waiting in older meetings are dead.
            for meeting in self._meetings.values():
                meeting.abandon()
            self._attempt, self._meetings = attempt, {}
        if key not in self._meetings:
            collect = self._join_shared if workers > self._fan_in else _take_given
            self._meetings = {key: Meeting(agenda.begin(), workers, collect)}
        return self._share(self._meetings[key].first), workers > self._fan_in

    async def post(self, key: int, rank: int, given: Any) -> list[Any]:
        """Hand in an answer to the last question of a meeting and wait for a reference to the next."""
        return self._share(await self._meetings[key].post(rank, given))

    async def remark(self, remark: Any) -> None:
        """Note something for the driver."""
        self._remarks.append(remark)

    async def take_remarks(self) -> list[Any]:
        """Give what was noted since the last call."""
        taken, self._remarks = self._remarks, []
        return taken

    async def _join_shared(self, what: Asked, answers: list[Any]) -> list[Any]:
        join = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(_join)
        shared = [reference for [reference] in answers]
        while len(shared) > self._fan_in:
            starts = range(0, len(shared), self._fan_in)
            shared = [join.remote(what, *shared[start : start + self._fan_in]) for start in starts]
        return list(await asyncio.gather(*shared))

    def _share(self, step: Step) -> list[Any]:
        if step is not self._shared[0]:
            self._shared = step, ray.put(step)
        # In a list, or Ray would hand over what it refers to.
        return [self._shared[1]]


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
    """Start a coordinator as an actor; it ends with the last handle to it."""
    return ray.remote(num_cpus=0, max_concurrency=_MOST_WORKERS)(Coordinator).remote(FAN_IN)


async def _take_given(what: Asked, answers: list[Any]) -> list[Any]:
    return answers


def _join(what: Asked, *answers: Any) -> Any:
    return join_answers(what, answers)
