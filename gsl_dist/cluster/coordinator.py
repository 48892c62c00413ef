"""Where workers meet to train one codebook: the actor that carries the messages of `quantizers.coordinate`.

Each worker opens a meeting by the same key and then posts its answers; when all have answered, the coordinator
thinks, and everyone gets its next question, or the trained codebook. What travels are statistics and one bounded
sample; what comes back is the codebook, once to each node: a question lies in Ray's object store for all to read.

Of many workers the answers stay where they are, and tasks join them, some at a time, until few enough are left for the
coordinator: what it takes in and holds grows neither with the corpus nor with the workers.

An answer depends on nothing but its question and the worker's rows. So a worker whose process was lost, and that Ray
runs again, comes in at the question that is open; what it missed, others have answered with it. Where an answer was
lost before it was joined, all are asked the same again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
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
from gsl_dist.quantizers.coordinate import Asked, Coordination, join_answers

FAN_IN = 8
"""So many answers are taken in by one process."""
# Everyone waits in a call of its own for the next question.
_MOST_WORKERS, _MOST_LOST = 1 << 16, 3

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
        number, [shared], is_crowded = ray.get(self.coordinator.open.remote(self.attempt, key, self.workers, agenda))
        step: Step = ray.get(shared)
        while isinstance(step, Ask):
            if remark and step.turn and self.rank == 0:
                self.coordinator.remark.remote((step.phase, step.turn))
            given = answer(step, rows, quantizer)
            # In a list, or Ray would hand over what it refers to.
            given = [ray.put(given)] if is_crowded else given
            number, [shared] = ray.get(self.coordinator.post.remote(key, self.rank, number, given))
            step = ray.get(shared)
        return step


async def take_given(what: Asked, answers: list[Any]) -> list[Any]:
    """Give answers as they came."""
    return answers


class Meeting:
    """One training of one codebook: collects an answer from every worker, then goes one step on.

    `number` and `step` are the question that is open, or in the end what was trained.
    """

    def __init__(self, coordination: Coordination, workers: int, collect: Collect = take_given) -> None:
        self._coordination, self._workers, self._collect = coordination, workers, collect
        self._answers: dict[int, Any] = {}
        self._advanced: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.number, self.step, self._lost = 0, cast(Step, next(coordination)), 0

    async def post(self, rank: int, number: int, given: Any) -> None:
        """Hand in the answer to a question and wait until there is another; one that is closed asks for no answer."""
        if number != self.number:
            return
        waiting = self._advanced
        # Once all are there they are being joined, and whoever comes again says what is known.
        if len(self._answers) < self._workers:
            self._answers[rank] = given
            if len(self._answers) == self._workers:
                await self._advance()
        await asyncio.shield(waiting)

    def abandon(self) -> None:
        """Send everyone home: a worker of this meeting is gone."""
        if not self._advanced.done():
            self._advanced.cancel()

    async def _advance(self) -> None:
        assert isinstance(self.step, Ask), "answers are to a question"
        try:
            collected = await self._collect(self.step.what, [self._answers[rank] for rank in sorted(self._answers)])
            self.step, self._lost = self._coordination.send(collected), 0
        except StopIteration as end:
            self.step = end.value
        except (GslError, ray.exceptions.RayError) as error:
            # Whose answer was lost is gone, and comes back; the question stays, and is asked under another number.
            self._lost += isinstance(error, ray.exceptions.ObjectLostError)
            if not isinstance(error, ray.exceptions.ObjectLostError) or self._lost > _MOST_LOST:
                self._settle(error)
                return
        self._answers, self.number = {}, self.number + 1
        self._settle(None)

    def _settle(self, error: Exception | None) -> None:
        waiting = self._advanced
        if waiting.done():
            return
        if error is not None:
            waiting.set_exception(error)
            return
        self._advanced = asyncio.get_running_loop().create_future()
        waiting.set_result(None)


class Coordinator:
    """The shell around meetings; it also collects remarks on progress for the driver.

    Args:
        fan_in: so many workers hand their answers in; of more, answers are joined on the way.
    """

    def __init__(self, fan_in: int) -> None:
        self._fan_in = fan_in
        self._attempt, self._meetings, self._remarks = "", {}, []  # type: ignore[var-annotated]
        self._shared: tuple[Step | None, Any] = None, None

    async def open(self, attempt: str, key: int, workers: int, agenda: Agenda) -> tuple[int, list[Any], bool]:
        """Open or join the meeting `key`; give the question's number and reference, and whether answers are joined."""
        if attempt != self._attempt:
            # The workers were restarted: those still waiting in older meetings are dead.
            for meeting in self._meetings.values():
                meeting.abandon()
            self._attempt, self._meetings = attempt, {}
        if key not in self._meetings:
            collect = self._join_shared if workers > self._fan_in else take_given
            self._meetings = {key: Meeting(agenda.begin(), workers, collect)}
        return *self._share(self._meetings[key]), workers > self._fan_in

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

    async def _join_shared(self, what: Asked, answers: list[Any]) -> list[Any]:
        join = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(_join)
        shared = [reference for [reference] in answers]
        while len(shared) > self._fan_in:
            starts = range(0, len(shared), self._fan_in)
            shared = [join.remote(what, *shared[start : start + self._fan_in]) for start in starts]
        return list(await asyncio.gather(*shared))

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
    start = ray.remote(num_cpus=0, max_concurrency=_MOST_WORKERS, scheduling_strategy=here)(Coordinator)
    return start.remote(FAN_IN)


def _join(what: Asked, *answers: Any) -> Any:
    return join_answers(what, answers)
