"""The similarity losses against loops, and when each of them falls silent."""

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from reference import pairwise_in_loops, proxy_in_loops, triplet_in_loops

from gsl_dist.losses import LossConfig, level_rows, make_loss
from gsl_dist.ranked import Mined, find_neighbours

KINDS = ("triplet", "proxy", "pairwise")
every_kind = pytest.mark.parametrize("kind", KINDS)


def start_loss(kind, *, classes=4, dim=6, mined=None, **settings):
    torch.manual_seed(0)
    config = TypeAdapter(LossConfig).validate_python({"kind": kind, **settings})
    return make_loss(config, classes=classes, dim=dim, mined=mined)


def mine_some(rows=60, dim=5):
    """Give vectors that are no longer than 1 on average, and their neighbours."""
    x = level_rows(torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)))
    return Mined(x, find_neighbours(x, 20))


def neighbours_in_loops(x, y, rows, temperature, softness):
    """Cross-entropy of soft neighbours in the corpus against a softmax of distances in the batch, row by row."""
    reach = [sorted(math.dist(one, other) ** 2 for other in x)[10] for one in x]
    middle = [sum(column) / len(y) for column in zip(*y, strict=True)]
    width = 2 * temperature * sum(reach) / len(x) * sum(math.dist(row, middle) ** 2 for row in y) / len(y)
    terms = []
    for a, row in enumerate(rows):
        wanted, scores = [], []
        for b in (b for b in range(len(rows)) if b != a):
            far = math.dist(x[row], x[rows[b]]) ** 2
            wanted.append(1 / (1 + math.exp((far - reach[row]) / (softness * reach[row]))))
            scores.append(math.exp(-(math.dist(y[a], y[b]) ** 2) / width))
        if sum(wanted) > 0.5:
            logs = [math.log(score / sum(scores)) for score in scores]
            terms.append(-sum(w * log for w, log in zip(wanted, logs, strict=True)) / sum(wanted))
    return sum(terms) / len(terms)


def make_batch(*, rows=24, dim=6, classes=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    y = 3 * torch.randn(rows, dim, generator=draw)
    return y.requires_grad_(), torch.randint(classes, (rows,), generator=draw)


def make_satisfied(*, classes=4, dim=6):
    """Give a batch in which every class sits on one axis, far from the others."""
    labels = torch.arange(classes).repeat_interleave(3)
    return torch.eye(dim)[labels].requires_grad_(), labels


def take_gradient(loss, y, labels):
    y.grad = None
    loss(y, labels).backward()
    return y.grad


@pytest.mark.parametrize("mining", ["hardest", "all"])
@pytest.mark.parametrize("margin", [0.05, 0.2, 1.0])
def test_triplet_equals_the_loop_over_what_it_mines(margin, mining):
    y, labels = make_batch()
    wanted = triplet_in_loops(y.tolist(), labels.tolist(), margin, mining)
    assert wanted > 0
    loss = start_loss("triplet", margin=margin, mining=mining)
    assert float(loss(y.detach(), labels)) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("margin", [0.3, 0.8, 1.5])
def test_pairwise_equals_the_loop_over_pairs(margin):
    y, labels = make_batch()
    wanted = pairwise_in_loops(y.tolist(), labels.tolist(), margin)
    assert float(start_loss("pairwise", margin=margin)(y.detach(), labels)) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_proxy_equals_the_loop_over_classes(temperature):
    y, labels = make_batch()
    loss = start_loss("proxy", temperature=temperature)
    (proxies,) = loss.parameters()
    wanted = proxy_in_loops(y.tolist(), labels.tolist(), proxies.T.tolist(), temperature)
    assert float(loss(y.detach(), labels).detach()) == pytest.approx(wanted, rel=1e-4)


@every_kind
def test_losses_see_directions_only(kind):
    y, labels = make_batch()
    loss = start_loss(kind)
    stretched = y.detach() * torch.linspace(0.5, 4, len(y))[:, None]
    torch.testing.assert_close(loss(stretched, labels), loss(y, labels))


@every_kind
def test_gradients_reach_the_rows_and_a_step_down_them_lowers_the_loss(kind):
    y, labels = make_batch()
    loss = start_loss(kind)
    grad = take_gradient(loss, y, labels)
    assert torch.isfinite(grad).all() and grad.any()
    assert loss(y - 1e-2 * grad, labels) < loss(y, labels)


def test_the_proxies_learn_and_the_others_have_nothing_to_learn():
    y, labels = make_batch()
    loss = start_loss("proxy")
    take_gradient(loss, y, labels)
    (proxies,) = loss.parameters()
    assert proxies.shape == (6, 4) and proxies.grad.any()
    assert not list(start_loss("triplet").parameters()) and not list(start_loss("pairwise").parameters())


@pytest.mark.parametrize("kind", ["triplet", "pairwise"])
def test_margin_losses_are_silent_once_satisfied(kind):
    y, labels = make_satisfied()
    loss = start_loss(kind)
    assert float(loss(y.detach(), labels).detach()) == pytest.approx(0, abs=1e-6)
    assert not take_gradient(loss, y, labels).any()


def test_triplet_speaks_as_soon_as_one_margin_is_broken():
    y, labels = make_satisfied()
    with torch.no_grad():
        y[0] = torch.tensor([1.0, 0.9, 0, 0, 0, 0])
    grad = take_gradient(start_loss("triplet"), y, labels)
    assert grad[0].any() and not grad[labels == 3].any()


def test_proxy_is_never_silent():
    y, labels = make_satisfied()
    loss = start_loss("proxy")
    with torch.no_grad():
        next(loss.parameters()).copy_(torch.eye(6)[:, :4])
        y.add_(0.05)
    assert loss(y, labels) > 0 and (take_gradient(loss, y, labels).norm(dim=1) > 0).all()


@every_kind
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3]], ids=["one class", "no positives"])
def test_a_batch_without_triplets_still_gives_a_finite_gradient(kind, labels):
    y, _ = make_batch(rows=4)
    assert torch.isfinite(take_gradient(start_loss(kind), y, torch.tensor(labels))).all()


@pytest.mark.parametrize(("temperature", "softness"), [(0.05, 0.1), (0.5, 0.3)])
def test_neighbours_equal_the_loop_over_pairs(temperature, softness):
    mined, rows = mine_some(), torch.randperm(60, generator=torch.Generator().manual_seed(1))[:24]
    y = make_batch()[0].detach()
    wanted = neighbours_in_loops(mined.x_ND.tolist(), y.tolist(), rows.tolist(), temperature, softness)
    loss = start_loss("neighbours", mined=mined, temperature=temperature, softness=softness)
    assert float(loss(y, rows)) == pytest.approx(wanted, rel=1e-4)


def test_neighbours_do_not_see_size_and_place_of_representations():
    y, rows, loss = make_batch()[0].detach(), torch.arange(24), start_loss("neighbours", mined=mine_some())
    torch.testing.assert_close(loss(100 * y + 7, rows), loss(y, rows), rtol=1e-3, atol=0)


def test_neighbours_are_satisfied_by_the_vectors_themselves_and_not_by_those_of_others():
    mined, rows = mine_some(), torch.arange(60)
    loss = start_loss("neighbours", mined=mined, temperature=0.2)
    mixed = loss(mined.x_ND[rows.roll(1)], rows)
    assert loss(mined.x_ND, rows) < loss(mined.x_ND + torch.randn(60, 5).roll(1, 0) / 3, rows) < mixed
    y = mined.x_ND[rows.roll(1)].requires_grad_()
    grad = take_gradient(loss, y, rows)
    assert torch.isfinite(grad).all() and loss(y - 1e-2 * grad, rows) < mixed


def test_what_neighbours_know_of_the_corpus_is_in_no_checkpoint():
    loss = start_loss("neighbours", mined=mine_some())
    assert not loss.state_dict() and not list(loss.parameters())
    assert {tuple(held.shape) for held in loss.buffers()} == {(60, 5), (60,)}


def test_level_rows_are_about_zero_of_length_one_and_keep_their_neighbours():
    x = 300 * torch.randn(80, 6, generator=torch.Generator().manual_seed(2)) + 500
    level = level_rows(x)
    torch.testing.assert_close(level.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    assert float(level.square().sum(1).mean()) == pytest.approx(1)
    assert torch.equal(find_neighbours(level.double(), 9), find_neighbours(x.double(), 9))


def test_a_sample_without_neighbours_is_no_config():
    with pytest.raises(ValidationError, match=r"sample_rows \(200\) must be more than neighbours \(200\)"):
        start_loss("neighbours", sample_rows=200)
