"""Queries that come while others are under way, with searches that a test ends when it likes."""

import asyncio

import numpy as np
import pytest

from gsl_dist.errors import ShardUnavailable
from gsl_dist.hits import Effort
from gsl_dist.service.gather import Gatherer

EFFORT = Effort(5, 8)


class Desk:
    """Searches that last until they are let go; an answer is the query's own number."""

    def __init__(self, room=1):
        self.went, self.noted = [], []
        self.gatherer = Gatherer(self.search, room, self.noted.append)

    async def search(self, queries, effort):
        numbers, end = queries[:, 0].astype(int).tolist(), asyncio.get_running_loop().create_future()
        self.went.append((numbers, effort, end))
        await end
        return numbers

    def ask(self, number, effort=EFFORT):
        return asyncio.ensure_future(self.gatherer.search(np.array([[number]], np.float32), effort))

    async def end(self, place, error=None):
        end = self.went[place][2]
        if error is None:
            end.set_result(None)
        else:
            end.set_exception(error)
        await settle()

    @property
    def numbers(self):
        return [numbers for numbers, _, _ in self.went]


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def running(test):
    """Run a test on a loop, with waits that do not end by themselves unless it says so."""

    def run(monkeypatch):
        monkeypatch.setattr("gsl_dist.service.gather._LONGEST_WAIT_S", 30)
        monkeypatch.setattr("gsl_dist.service.gather._START_S", 30)
        asyncio.run(asyncio.wait_for(test(), 10))

    run.__name__ = test.__name__
    return run


@running
async def test_a_query_goes_at_once_where_there_is_room():
    desk = Desk(room=2)
    asked = [desk.ask(number) for number in range(2)]
    await settle()
    assert desk.numbers == [[0], [1]] and len(desk.noted) == 2
    for place in (0, 1):
        await desk.end(place)
    assert await asyncio.gather(*asked) == [0, 1]


@running
async def test_those_that_come_meanwhile_go_together_and_each_gets_its_own_answer():
    desk = Desk()
    asked = [desk.ask(number) for number in range(6)]
    await settle()
    assert desk.numbers == [[0]]
    await desk.end(0)
    assert desk.numbers == [[0], [1, 2, 3, 4, 5]]
    asked.append(desk.ask(6))
    await desk.end(1)
    await desk.end(2)
    assert await asyncio.gather(*asked) == list(range(7)) and desk.numbers[2] == [6]


@running
async def test_what_asks_for_something_else_goes_by_itself_the_first_to_come_first():
    desk, other = Desk(), Effort(7, 8)
    asked = [desk.ask(0), desk.ask(1), desk.ask(2, other), desk.ask(3), desk.ask(4, other)]
    await settle()
    for place in range(3):
        await desk.end(place)
    assert desk.numbers == [[0], [1, 3], [2, 4]]
    assert [effort for _, effort, _ in desk.went] == [EFFORT, EFFORT, other]
    assert await asyncio.gather(*asked) == [0, 1, 2, 3, 4]


@running
async def test_no_more_go_together_than_a_search_may_hold():
    desk = Desk()
    asked = [desk.ask(number) for number in range(150)]
    await settle()
    for place in range(4):
        await desk.end(place)
    assert [len(numbers) for numbers in desk.numbers] == [1, 64, 64, 21]
    assert await asyncio.gather(*asked) == list(range(150))


@running
async def test_an_error_is_that_of_all_who_went_together_and_of_nobody_else():
    desk = Desk()
    asked = [desk.ask(number) for number in range(4)]
    await settle()
    await desk.end(0)
    last = desk.ask(4)
    await desk.end(1, ShardUnavailable(["s1"], 2))
    await desk.end(2)
    outcomes = await asyncio.gather(*asked, last, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [int, *[ShardUnavailable] * 3, int]


@running
async def test_whoever_has_gone_away_is_not_searched_for():
    desk = Desk()
    asked = [desk.ask(number) for number in range(4)]
    await settle()
    asked[2].cancel()
    await settle()
    await desk.end(0)
    await desk.end(1)
    assert desk.numbers == [[0], [1, 3]] and await asked[3] == 3


@running
async def test_if_all_have_gone_away_the_next_finds_room():
    desk = Desk()
    asked = [desk.ask(number) for number in range(3)]
    await settle()
    for query in asked[1:]:
        query.cancel()
    await settle()
    await desk.end(0)
    last = desk.ask(9)
    await settle()
    assert desk.numbers == [[0], [9]]
    await desk.end(1)
    assert await last == 9


def test_nobody_waits_for_long_behind_a_search_that_does_not_end(monkeypatch):
    monkeypatch.setattr("gsl_dist.service.gather._LONGEST_WAIT_S", 0.01)

    async def ask():
        desk = Desk()
        stuck, asked = desk.ask(0), [desk.ask(number) for number in (1, 2)]
        await asyncio.sleep(0.2)
        assert desk.numbers == [[0], [1, 2]]
        asked.append(desk.ask(3))
        await asyncio.sleep(0.2)
        assert desk.numbers[2:] == [[3]]
        for place in (1, 2):
            await desk.end(place)
        assert await asyncio.gather(*asked) == [1, 2, 3] and not stuck.done()
        stuck.cancel()

    asyncio.run(asyncio.wait_for(ask(), 10))


@pytest.mark.parametrize("count, room", [(200, 1), (200, 3)])
def test_in_any_order_everybody_gets_their_own_answer_once(count, room):
    rng, went = np.random.default_rng(0), []

    async def search(queries, effort):
        went.append(len(queries))
        await asyncio.sleep(rng.exponential(0.001))
        return [(effort.k, int(number)) for number in queries[:, 0]]

    async def ask():
        gatherer = Gatherer(search, room)

        async def one(number):
            await asyncio.sleep(rng.uniform(0, 0.05))
            return await gatherer.search(np.array([[number]], np.float32), Effort(1 + number % 2, 8))

        return await asyncio.gather(*(one(number) for number in range(count)))

    assert asyncio.run(ask()) == [(1 + number % 2, number) for number in range(count)]
    assert sum(went) == count > len(went)
