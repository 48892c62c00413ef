"""Codewords that learn to rank: neighbours and losses against loops, and more neighbours found on real images."""

import numpy as np
import pytest
import torch
from corpora import read_pictures

from gsl_dist.errors import BadInput
from gsl_dist.evaluate import average_precision
from gsl_dist.quantizers import (
    AdditiveConfig,
    LineConfig,
    LloydConfig,
    OptimizedConfig,
    ProductConfig,
    decode,
    make_quantizer,
    open_quantizer,
    train_codebook,
)
from gsl_dist.ranked import (
    Mined,
    RankedConfig,
    Viewed,
    draw_batch,
    earn_ranked,
    find_neighbours,
    learn_ranked,
    measure_recall,
    mine_neighbours,
    rank_in_batch,
)

QUICK = RankedConfig(
    rounds=3, steps=40, last_steps=80, batch_rows=512, learning_rate=2e-3, neighbours=100, temperature=0.03
)
KINDS = {
    "pq": ProductConfig(kind="pq", sub_vectors=4, bits=4),
    "cells": ProductConfig(kind="pq", sub_vectors=4, bits=4, cells=4, residual=True),
    "opq": OptimizedConfig(kind="opq", sub_vectors=4, bits=4, rotation_iterations=10),
    "rq": AdditiveConfig(kind="rq", books=4, bits=4, joint_iterations=2),
    "lsq": AdditiveConfig(kind="lsq", books=4, bits=4, joint_iterations=8, train_restarts=2),
    "vlq": LineConfig(kind="vlq", sub_vectors=4, bits=4, cells=4, edges=2),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def images():
    """Real images as 32 numbers each: 2,500 to search, 500 to ask."""
    reduced = read_pictures(3000, 32)
    rows = torch.tensor(reduced / np.sqrt(np.square(reduced).sum(1).mean()), dtype=torch.float32)
    return rows[:2500], rows[2500:]


def start_codebook(kind, x):
    return train_codebook(x, make_quantizer(KINDS[kind], x.shape[1]), LloydConfig(iterations=6)).codebook


def recall(codebook, x, queries, truth):
    quantizer = open_quantizer(codebook)
    cells, codes = quantizer.encode(x, codebook)
    decoded = decode(cells, codes, codebook)
    if codebook.bias is not None:  # scores are all there is
        biases = sum(torch.tensor(codebook.bias)[book][code] for book, code in enumerate(codes.T.long()))
        found = (queries @ decoded.T + biases).topk(10).indices
        return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), truth.tolist(), strict=True)])
    found = torch.cdist(queries, decoded).topk(10, largest=False).indices
    return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), truth.tolist(), strict=True)])


def test_neighbours_equal_brute_force_and_leave_the_row_itself_out(monkeypatch):
    x, queries = torch.randn(200, 6), torch.randn(9, 6)
    plain = torch.cdist(x, x).fill_diagonal_(torch.inf).argsort(1)[:, :7]
    assert torch.equal(find_neighbours(x, 7), plain)
    assert torch.equal(find_neighbours(x, 7, queries_QD=queries), torch.cdist(queries, x).argsort(1)[:, :7])
    monkeypatch.setattr("gsl_dist.ranked._CHUNK_FLOATS", 700)
    assert torch.equal(find_neighbours(x, 7), plain)


def test_a_batch_holds_each_row_once_and_the_nearest_of_its_seeds():
    near = find_neighbours(torch.randn(500, 8), 100)
    rows = draw_batch(near, 256, np.random.default_rng(0))
    assert len(rows.unique()) == len(rows) and int(rows.min()) >= 0 and int(rows.max()) < 500
    seeds = np.random.default_rng(0).choice(500, 4, replace=False)
    assert set(near[seeds, :31].flatten().tolist()) <= set(rows.tolist())


def test_the_reach_of_a_row_is_the_distance_of_its_tenth_neighbour():
    x = torch.randn(50, 4)
    mined = mine_neighbours(x, RankedConfig(neighbours=20))
    plain = torch.cdist(x, x).square().sort(1).values[:, 10]
    torch.testing.assert_close(mined.reach(torch.arange(50)), plain)


def test_the_listwise_loss_equals_a_loop():
    x, scores, losses = torch.randn(12, 4) / 2, torch.randn(12, 12), []
    for row in range(12):
        others = [other for other in range(12) if other != row]
        wanted = torch.stack([torch.sigmoid((0.8 - (x[row] - x[o]).square().sum()) / (0.1 * 0.8)) for o in others])
        if wanted.sum() > 0.5:
            losses.append(-(wanted / wanted.sum() * scores[row, others].log_softmax(0)).sum())
    assert losses
    measured = rank_in_batch(x, scores, torch.full((12,), 0.8), 0.1)
    assert float(measured) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def test_the_listwise_loss_is_lower_where_true_neighbours_score_higher():
    x = torch.randn(30, 4)
    near, reach = -torch.cdist(x, x).square(), torch.cdist(x, x).square().sort(1).values[:, 5]
    assert (
        rank_in_batch(x, near, reach, 0.1)
        < rank_in_batch(x, 0 * near, reach, 0.1)
        < rank_in_batch(x, -near, reach, 0.1)
    )


@every_kind
def test_a_codebook_that_learned_to_rank_finds_more_true_neighbours(kind, images):
    x, queries = images
    codebook, truth = start_codebook(kind, x), find_neighbours(x, 10, queries_QD=queries)
    rounds = []
    learned = learn_ranked(mine_neighbours(x, QUICK), codebook, QUICK, seed=0, on_round=lambda n, c: rounds.append(n))
    assert rounds == [0, 1, 2, 3]
    assert recall(learned, x, queries, truth) > recall(codebook, x, queries, truth) + 0.001


@pytest.mark.parametrize("kind", ["pq", "opq", "rq"])
def test_scores_by_look_up_alone_are_learned_for_and_the_landing_is_kept(kind, images):
    x, queries = images
    codebook, truth = start_codebook(kind, x), find_neighbours(x, 10, queries_QD=queries)
    config, learned = QUICK.model_copy(update={"scores": "tables"}), []
    mined = mine_neighbours(x, config)
    final = learn_ranked(mined, codebook, config, seed=0, on_round=lambda n, c: learned.append(c))
    assert final.kind == "cq" and final.bias.shape == (4, 16)
    assert np.array_equal(final.landing, learned[-2].books) and np.array_equal(final.landing_bias, learned[-2].bias)
    untaught = learn_ranked(mined, codebook, config.model_copy(update={"rounds": 0, "last_steps": 0}), seed=0)
    assert recall(final, x, queries, truth) > recall(untaught, x, queries, truth) + 0.02
    assert measure_recall(x, queries, truth, final) == pytest.approx(recall(final, x, queries, truth))


@every_kind
def test_only_codewords_change(kind, images):
    x = images[0][:800]
    codebook = start_codebook(kind, x)
    quick = QUICK.model_copy(update={"rounds": 0, "last_steps": 3})
    learned = learn_ranked(mine_neighbours(x, quick), codebook, quick, seed=0)
    assert learned.kind == codebook.kind and learned.residual == codebook.residual
    assert np.array_equal(learned.coarse, codebook.coarse) and not np.array_equal(learned.books, codebook.books)
    assert (learned.rotation is None) == (codebook.rotation is None)


def make_views(views=6, rows=600, spread=0.6):
    """Give rows of four classes as an unsure network sees them, and its codebook fitted to the sure ones."""
    rng = np.random.default_rng(0)
    centres, labels = rng.normal(size=(4, 8)), rng.integers(4, size=rows)
    sure = centres[labels] + 0.4 * rng.normal(size=(rows, 8))
    seen = sure + spread * rng.normal(size=(views, rows, 8))
    return Viewed(torch.tensor(seen, dtype=torch.float32), torch.tensor(labels)), torch.tensor(
        sure, dtype=torch.float32
    )


def test_a_lesson_of_views_asks_for_rows_of_the_class_in_another_view_and_never_for_the_row_itself():
    taught = make_views()[0]
    lesson = taught.draw(RankedConfig(batch_rows=100), np.random.default_rng(1))
    rows = lesson.rows_B % 600
    assert len(rows.unique()) == len(rows) == 100 and len((lesson.rows_B // 600).unique()) > 1
    for at, row in enumerate(rows):
        assert any(torch.equal(lesson.asked_BD[at], view[row]) for view in taught.views_VND)
        wanted = [float(taught.labels_N[row] == taught.labels_N[other] and row != other) for other in rows]
        assert lesson.wanted_BB[at].tolist() == wanted
    assert torch.equal(taught.x_ND[lesson.rows_B], taught.views_VND[lesson.rows_B // 600, rows])


def test_codewords_taught_by_labels_rank_rows_of_the_class_higher():
    taught, sure = make_views()
    codebook = start_codebook("pq", sure)
    config = RankedConfig(rounds=0, last_steps=300, learning_rate=3e-3, batch_rows=256, temperature=0.1)
    learned = learn_ranked(taught, codebook, config, seed=0)
    assert np.array_equal(learned.landing, codebook.books)
    fresh = make_views(views=1, rows=900)[0]

    def mean_precision(codebook):
        x = fresh.views_VND[0]
        quantizer = open_quantizer(codebook)
        far = quantizer.measure_distances(x[:200], *quantizer.encode(x[200:], codebook), codebook)
        return np.mean(
            [
                average_precision(row.numpy(), (fresh.labels_N[200:] == label).numpy())
                for row, label in zip(far, fresh.labels_N[:200], strict=True)
            ]
        )

    assert mean_precision(learned) > mean_precision(codebook) + 0.01


def test_the_size_of_the_vectors_does_not_matter(images):
    x = images[0][:1000]
    quick = QUICK.model_copy(update={"rounds": 1, "steps": 10, "last_steps": 10})
    books = []
    for scale in (1.0, 64.0):
        codebook = start_codebook("pq", x * scale)
        books.append(learn_ranked(mine_neighbours(x * scale, quick), codebook, quick, seed=0).books / scale)
    np.testing.assert_allclose(*books, atol=2e-3)


@every_kind
def test_a_first_step_moves_codewords_by_a_share_of_the_quantization_error(kind, images):
    x, _ = images
    start = start_codebook(kind, x)
    config = QUICK.model_copy(update={"rounds": 0, "last_steps": 1, "learning_rate": None})
    moved = learn_ranked(mine_neighbours(x, config), start, config, seed=0).books - start.books
    error = (x - decode(*open_quantizer(start).encode(x, start), start)).square().sum(1).mean().sqrt()
    # Adam's first step is of the whole rate, of which a tenth counts at first, by the warm-up and the cosine.
    assert np.abs(moved).max() == pytest.approx(0.1 * 1.01 * 1e-3 * float(error), rel=0.02)


def test_a_seed_decides_what_is_learned(images):
    x = images[0][:800]
    quick = QUICK.model_copy(update={"rounds": 1, "steps": 5, "last_steps": 5})
    mined, codebook = mine_neighbours(x, quick), start_codebook("pq", x)
    one, two, other = (learn_ranked(mined, codebook, quick, seed=seed).fingerprint for seed in (1, 1, 2))
    assert one == two != other


def test_a_row_of_zeros_does_no_harm_to_look_ups(images):
    x, queries = images
    x = x.clone()
    x[7] = 0
    config = QUICK.model_copy(update={"scores": "tables"})
    truth = find_neighbours(x, 10, queries_QD=queries)
    start, mined = start_codebook("pq", x), mine_neighbours(x, config)
    learned = learn_ranked(mined, start, config, seed=0)
    assert measure_recall(x, queries, truth, learned) > measure_recall(x, queries, truth, start) + 0.02


def test_too_few_rows_to_mine_are_refused():
    with pytest.raises(BadInput, match="training rows: got 100, but to mine 100 neighbours"):
        mine_neighbours(torch.randn(100, 4), QUICK)


def test_rows_without_neighbours_in_the_batch_do_not_ask():
    x = torch.arange(4.0)[:, None] * 100
    assert float(rank_in_batch(x, torch.randn(4, 4), torch.full((4,), 0.1), 0.1)) == 0
    assert Mined(x, torch.zeros(4, 10, dtype=torch.int64)).energy == pytest.approx(35_000)


def test_what_was_learned_is_kept_only_if_rows_kept_apart_find_more(images):
    x = images[0]
    codebook, config = start_codebook("rq", x), QUICK.model_copy(update={"held_rows": 300})
    gain = earn_ranked(x, codebook, config, seed=0)
    assert gain.after > gain.before and gain.codebook.fingerprint != codebook.fingerprint
    ruined = earn_ranked(x, codebook, config.model_copy(update={"learning_rate": 3.0}), seed=0)
    assert ruined.after <= ruined.before == gain.before and ruined.codebook.fingerprint == codebook.fingerprint


@every_kind
def test_recall_by_codes_equals_that_by_brute_force(kind, images):
    x, queries = images[0][:500], images[1][:50]
    codebook, truth = start_codebook(kind, x), find_neighbours(x, 10, queries_QD=queries)
    assert measure_recall(x, queries, truth, codebook) == pytest.approx(recall(codebook, x, queries, truth))
