"""What pulls with a weight of its own: penalty, surgery and springs."""

import pytest
import torch
from pydantic import ValidationError
from reference import spring_in_loops
from snapping import (
    COUPLED,
    every_dtype,
    every_force,
    every_shape,
    find_pulls,
    make_batch,
    make_blocks,
    make_codebook,
    make_config,
    make_layer,
    make_shape,
    quantize,
    send_back,
    snap_gradient,
)

from gsl_dist.snap import SnapConfig


def descend(y, target, weights, *, weight, quantized):
    """Give the gradient of a similarity loss plus a share of the mean quantization error, by autograd."""
    y = y.clone().requires_grad_()
    loss = ((y - target).square() * weights).sum().log1p()
    (loss + weight * (y - quantized).square().sum(1).mean()).backward()
    return y.grad


@pytest.mark.parametrize("workers", [1, 2])
@every_shape
def test_penalty_equals_the_gradient_of_a_loss_with_the_quantization_error_added(kind, rotated, residual, workers):
    codebook = make_shape(kind, rotated, residual)
    y, target = make_batch()
    weights = torch.linspace(0.1, 1, 6, dtype=y.dtype)
    plain = descend(y, target, weights, weight=0, quantized=y)
    wanted = descend(y, target, weights, weight=0.7, quantized=quantize(y, codebook))
    layers = [make_layer(SnapConfig(variant="penalty", weight=0.7), codebook, workers=workers) for _ in range(workers)]
    parts = zip(layers, y.chunk(workers), plain.chunk(workers), strict=True)
    found = torch.cat([send_back(layer, part, grad) for layer, part, grad in parts])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(found, plain, rtol=1e-2)


@every_shape
def test_surgery_takes_from_the_penalty_what_goes_against_the_gradient_and_nothing_else(kind, rotated, residual):
    codebook = make_shape(kind, rotated, residual)
    y, grad = make_batch()
    bent, penalty = (
        send_back(make_layer(SnapConfig(variant=variant, weight=8.0), codebook), y, grad) for variant in COUPLED[::-1]
    )
    along, size = (grad * bent).sum(1), grad.square().sum(1)
    assert (along >= size - 1e-6).all()
    conflict = (grad * (penalty - grad)).sum(1) < 0
    assert conflict.any() and not conflict.all()
    torch.testing.assert_close(bent[~conflict], penalty[~conflict])
    torch.testing.assert_close(along[conflict], size[conflict])
    # What is taken away lies along the gradient.
    taken = torch.nn.functional.cosine_similarity(penalty - bent, grad, dim=1)[conflict]
    torch.testing.assert_close(taken, -torch.ones_like(taken))


@every_dtype
@pytest.mark.parametrize("fallback", ["pass", "widen"])
@pytest.mark.parametrize("neighbours", [1, 3, 100])
def test_a_spring_equals_the_loop(neighbours, fallback, dtype):
    config = make_config("spring", fallback, neighbours=neighbours, weight=7.0)
    grad, y, books = make_blocks(dtype=dtype)
    grad[3] = 0
    bent, aligned = snap_gradient(grad, y, books, config)
    slow = spring_in_loops(grad.tolist(), y.tolist(), books.tolist(), config, len(y))
    assert 0 < aligned.float().mean() < 1
    torch.testing.assert_close(bent.double(), torch.tensor(slow, dtype=torch.float64), rtol=2e-4, atol=2e-5)


@every_shape
def test_a_spring_pulls_without_raising_the_loss_to_first_order(kind, rotated, residual):
    codebook = make_shape(kind, rotated, residual)
    y, grad = make_batch(200)
    bent = send_back(make_layer(make_config("spring", weight=50.0), codebook), y, grad)
    assert ((grad * bent).sum(1) >= grad.square().sum(1) * (1 - 1e-5)).all()
    assert not torch.allclose(bent, grad, rtol=1e-2)


def test_a_spring_gets_nearer_to_the_codeword_it_chose_by_a_force_that_grows_with_the_distance():
    config = make_config("spring", weight=5.0)
    grad, y, books = make_blocks(rows=60)
    bent, _ = snap_gradient(grad, y, books, config)
    pull, aligned = find_pulls(grad, y, books, config)
    torch.testing.assert_close((grad - bent)[aligned], 2 * 5.0 / 60 * pull[aligned])
    assert (-(bent * pull).sum(-1)[aligned] > 0).all()


@every_shape
def test_without_a_gradient_a_spring_is_the_penalty(kind, rotated, residual):
    codebook = make_shape(kind, rotated, residual)
    y, _ = make_batch()
    found = [
        send_back(make_layer(make_config(variant, weight=4.0), codebook), y, torch.zeros_like(y))
        for variant in ("spring", "penalty")
    ]
    torch.testing.assert_close(*found)
    assert found[0].any()


@pytest.mark.parametrize("fallback", ["zero", "orthogonal"])
def test_a_spring_refuses_fallbacks_that_it_has_no_use_for(fallback):
    with pytest.raises(ValidationError, match=r"fallback .* must be pass or widen with variant spring"):
        make_config("spring", fallback)


@every_force
def test_the_force_of_a_penalty_does_not_depend_on_how_a_batch_is_shared(variant):
    config, codebook = SnapConfig(variant=variant, weight=3.0), make_codebook()
    y, grad = make_batch()
    whole = send_back(make_layer(config, codebook), y, grad)
    for workers in (2, 4):
        layer = make_layer(config, codebook, workers=workers)
        parts = [send_back(layer, part, g) for part, g in zip(y.chunk(workers), grad.chunk(workers), strict=True)]
        torch.testing.assert_close(torch.cat(parts), whole)


@every_force
def test_without_weight_nothing_is_coupled(variant):
    y, grad = make_batch()
    assert torch.equal(send_back(make_layer(SnapConfig(variant=variant, weight=0), make_codebook()), y, grad), grad)
