"""The similarity losses against loops, and when each of them falls silent."""

import pytest
import torch
from pydantic import TypeAdapter
from reference import pairwise_in_loops, proxy_in_loops, triplet_in_loops

from gsl_dist.losses import LossConfig, make_loss

KINDS = ("triplet", "proxy", "pairwise")
every_kind = pytest.mark.parametrize("kind", KINDS)


def start_loss(kind, *, classes=4, dim=6, **settings):
    torch.manual_seed(0)
    config = TypeAdapter(LossConfig).validate_python({"kind": kind, **settings})
    return make_loss(config, classes=classes, dim=dim)


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


@pytest.mark.parametrize("margin", [0.05, 0.2, 1.0])
def test_triplet_equals_the_loop_over_hardest_pairs(margin):
    y, labels = make_batch()
    wanted = triplet_in_loops(y.tolist(), labels.tolist(), margin)
    assert wanted > 0
    assert float(start_loss("triplet", margin=margin)(y.detach(), labels)) == pytest.approx(wanted, rel=1e-4)


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
