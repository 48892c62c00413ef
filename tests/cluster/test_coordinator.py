"""A worker that is lost in the middle of a meeting and comes back: the codebook is that of an undisturbed one."""

import asyncio

import numpy as np
import pytest
import torch
from corpora import make_clusters
from meetings import share_rows

pytest.importorskip("ray")
from ray.exceptions import ObjectLostError

from gsl_dist.cluster.coordinator import Agenda, Meeting
from gsl_dist.errors import DataError
from gsl_dist.quantizers import AdditiveConfig, Ask, LloydConfig, Rows, answer, make_quantizer

AGENDA = Agenda(AdditiveConfig(kind="rq", books=2, bits=3, cells=4), 8, LloydConfig(iterations=4), seed=0)
VECTORS = torch.from_numpy(make_clusters(300, 8, 5, 0)[0])
TIMEOUT_S = 20


async def attend(meeting, rank, rows, leaves_at=None):
    """Take part until the end, or until a question at which this worker is lost, before or after its answer."""
    quantizer = make_quantizer(AGENDA.quantizer, AGENDA.dim)
    number, step = meeting.number, meeting.step
    while isinstance(step, Ask):
        given = answer(step, rows, quantizer)
        if leaves_at == (number, "before"):
            return None
        post = asyncio.ensure_future(meeting.post(rank, number, given))
        if leaves_at == (number, "after"):
            await asyncio.sleep(0)
            return None
        await post
        number, step = meeting.number, meeting.step
    return step


def hold(leaves_at=None):
    """Hold a meeting of two workers, of whom the second is lost once and begins anew; give what both got."""

    async def meet():
        first, second = share_rows(VECTORS, [0, 120, 300])
        meeting = Meeting(AGENDA.begin(), 2)
        steady = asyncio.ensure_future(attend(meeting, 0, first))
        if leaves_at:
            assert await attend(meeting, 1, second, leaves_at) is None
            await asyncio.sleep(0)
        again = Rows(second.x_ND, second.start, second.total)
        return await asyncio.wait_for(asyncio.gather(steady, attend(meeting, 1, again)), TIMEOUT_S)

    return asyncio.run(meet())


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("question", range(0, 11, 2))
def test_a_worker_that_comes_back_answers_the_question_that_is_open(question, moment):
    undisturbed, disturbed = hold()[0].codebook, hold((question, moment))
    assert all(trained.codebook.fingerprint == undisturbed.fingerprint for trained in disturbed)


def test_an_answer_to_a_question_that_is_closed_changes_nothing():
    async def meet():
        first, second = share_rows(VECTORS, [0, 120, 300])
        meeting = Meeting(AGENDA.begin(), 2)
        stale = answer(meeting.step, second, make_quantizer(AGENDA.quantizer, AGENDA.dim))

        async def repeat():
            while isinstance(meeting.step, Ask):
                await meeting.post(1, meeting.number - 1, stale)
                await asyncio.sleep(0)

        return (await asyncio.gather(attend(meeting, 0, first), attend(meeting, 1, second), repeat()))[0]

    assert asyncio.run(meet()).codebook.fingerprint == hold()[0].codebook.fingerprint


@pytest.mark.parametrize("lost, is_survived", [((0,), True), ((3, 4, 5), True), ((2, 3, 4, 5), False)])
def test_where_an_answer_is_lost_on_its_way_all_are_asked_again(lost, is_survived):
    async def meet():
        calls = []

        async def collect(what, answers):
            calls.append(what)
            await asyncio.sleep(0)
            if len(calls) - 1 in lost:
                raise ObjectLostError("0" * 56, "", "")
            return answers

        meeting = Meeting(AGENDA.begin(), 2, collect)
        shares = share_rows(VECTORS, [0, 120, 300])
        parts = [attend(meeting, rank, rows) for rank, rows in enumerate(shares)]
        return await asyncio.wait_for(asyncio.gather(*parts, return_exceptions=True), TIMEOUT_S)

    ends = asyncio.run(meet())
    if is_survived:
        assert {end.codebook.fingerprint for end in ends} == {hold()[0].codebook.fingerprint}
    else:
        assert {type(end) for end in ends} == {ObjectLostError}


def test_whoever_comes_again_while_answers_are_joined_is_not_taken_for_the_next():
    async def meet():
        first, second = share_rows(VECTORS, [0, 120, 300])
        quantizer = make_quantizer(AGENDA.quantizer, AGENDA.dim)

        async def collect(what, answers):
            # The second worker's process was run again, and says what it said.
            again.append(
                asyncio.ensure_future(meeting.post(1, meeting.number, answer(meeting.step, second, quantizer)))
            )
            await asyncio.sleep(0)
            return answers

        again, meeting = [], Meeting(AGENDA.begin(), 2, collect)
        ends = await asyncio.wait_for(asyncio.gather(attend(meeting, 0, first), attend(meeting, 1, second)), TIMEOUT_S)
        await asyncio.gather(*again)
        return ends[0]

    assert asyncio.run(meet()).codebook.fingerprint == hold()[0].codebook.fingerprint


def test_an_error_of_the_training_reaches_every_worker():
    async def meet():
        meeting = Meeting(AGENDA.begin(), 2)
        shares = share_rows(torch.ones(300, 8), [0, 120, 300])
        parts = [attend(meeting, rank, rows) for rank, rows in enumerate(shares)]
        return await asyncio.gather(*parts, return_exceptions=True)

    assert [type(error) for error in asyncio.run(meet())] == [DataError, DataError]
    assert np.isfinite(hold()[0].relative_error)
