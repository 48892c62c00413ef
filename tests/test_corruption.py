"""Whatever of an artefact is not as it was written is found before it is used, and named: files of every kind."""

import pytest

pytest.importorskip("faiss")
pytest.importorskip("ray")
import frail
from damage import WAYS, Victim, count_outcomes, damage, draw_seed

MUTANTS = 100
NAMES = [
    *(
        "codebook",
        "codes, built from",
        "codes, added",
        "notes, encode",
        "notes, build",
        "model, float",
        "model, lowbit",
    ),
    *("checkpoint", "manifest", "pointer", "codebook of a version", "payload", "vectors, float16", "vectors, int8"),
    *("model of a version", "write log", "sample of queries", "tokens", "measured", "cache of a replica", "config"),
    *(f"shard, {kind}" for kind in ("pq", "opq", "pq in blocks", "pq behind a graph", "rq", "lsq", "cq", "vlq")),
    *(f"shard, {kind}" for kind in ("rabitq", "rabitq in blocks")),
]


@pytest.fixture(scope="module")
def victim():
    victim = Victim()
    yield victim
    victim.close()


def test_every_kind_of_artefact_is_among_those_that_are_damaged(victim):
    assert victim.names == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_found_before_use_and_named(victim, name):
    counts, faults = count_outcomes(victim.strike(name, range(MUTANTS)))
    assert not faults, faults[:3]
    assert sum(counts.values()) == MUTANTS and counts["harmless"] < MUTANTS / 10


def test_what_is_wrong_is_seen_for_what_it_is(tmp_path):
    victim, subject = Victim(timeout_s=1.0, module="frail"), frail.make_subjects(tmp_path)["frail"]
    outcomes = victim.strike("frail", range(frail.COUNT))
    victim.close()
    ways = [damage(subject, draw_seed(0, "frail", number))[1] for number in range(frail.COUNT)]
    assert [outcome for outcome, *_ in outcomes] == [frail.VERDICTS[way] for way in ways]
    assert set(ways) == set(WAYS) and len(count_outcomes(outcomes)[1]) == frail.COUNT
