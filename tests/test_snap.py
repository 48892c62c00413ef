"""The snapping layer against loops written from its formulas, and the three properties that it claims."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reference import snap_in_loops
from snapping import (
    COUPLED,
    VARIANTS,
    every_dtype,
    every_fallback,
    every_shape,
    every_variant,
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
    snap_slowly,
)

from gsl_dist.codebook import Codebook
from gsl_dist.quantizers import open_quantizer, rotate
from gsl_dist.snap import SnapConfig, SnappingLayer


@every_dtype
@every_fallback
@every_variant
def test_snapping_equals_the_loop_over_rows_and_blocks(variant, fallback, dtype):
    config = make_config(variant, fallback)
    grad, y, books = make_blocks(dtype=dtype)
    bent, aligned = snap_gradient(grad, y, books, config)
    slow, slow_aligned, _ = snap_in_loops(grad.tolist(), y.tolist(), books.tolist(), config)
    assert aligned.tolist() == slow_aligned
    assert 0 < aligned.float().mean() <= 1 and (fallback == "widen" or not aligned.all())
    assert bent.dtype == dtype
    torch.testing.assert_close(bent.double(), torch.tensor(slow, dtype=torch.float64), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("neighbours", [1, 2, 5, 8, 100])
def test_any_number_of_neighbours_equals_the_loop_and_more_than_there_are_means_all(neighbours):
    config = make_config("project", "zero", neighbours=neighbours)
    grad, y, books = make_blocks()
    bent, _ = snap_gradient(grad, y, books, config)
    slow, _, _ = snap_in_loops(grad.tolist(), y.tolist(), books.tolist(), config)
    torch.testing.assert_close(bent, torch.tensor(slow, dtype=torch.float64))


def test_widening_equals_asking_for_all_neighbours_only_where_the_near_ones_fail():
    grad, y, books = make_blocks()
    near, near_aligned = snap_gradient(grad, y, books, make_config("project", "zero"))
    wide, _ = snap_gradient(grad, y, books, make_config("project", "widen"))
    far, _ = snap_gradient(grad, y, books, make_config("project", "zero", neighbours=8))
    torch.testing.assert_close(wide, torch.where(near_aligned[..., None], near, far))


@every_dtype
@every_fallback
@every_variant
def test_a_step_never_raises_the_loss_to_first_order(variant, fallback, dtype):
    for beta in (0.0, 0.5, 1.0):
        grad, y, books = make_blocks(rows=200, dtype=dtype)
        bent, _ = snap_gradient(grad, y, books, make_config(variant, fallback, beta=beta))
        slope = (grad * bent).sum(-1)
        assert (slope >= -1e-5 * grad.square().sum(-1)).all()


@every_fallback
@every_variant
def test_a_step_shorter_than_the_bound_gets_strictly_nearer_to_the_chosen_codeword(variant, fallback):
    config = make_config(variant, fallback)
    grad, y, books = make_blocks(rows=60)
    bent, _ = snap_gradient(grad, y, books, config)
    pull, aligned = find_pulls(grad, y, books, config)
    toward = -(bent * pull).sum(-1)[aligned]
    assert (toward > 0).all()
    for share in (1e-3, 0.5, 0.99):
        step = (share * 2 * toward / bent.square().sum(-1)[aligned])[:, None] * -bent[aligned]
        assert ((pull[aligned] - step).norm(dim=-1) < pull[aligned].norm(dim=-1)).all()


@every_variant
def test_what_is_added_to_a_part_of_the_gradient_points_to_the_codeword(variant):
    config = make_config(variant)
    grad, y, books = make_blocks(rows=60)
    bent, _ = snap_gradient(grad, y, books, config)
    pull, aligned = find_pulls(grad, y, books, config)
    share = {"add": 1.0, "blend": 1 - config.beta}.get(variant, 0.0)
    added = (share * grad - bent)[aligned]
    cosine = torch.nn.functional.cosine_similarity(added, pull[aligned], dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


@every_dtype
@every_fallback
@every_variant
def test_without_a_gradient_there_is_no_force(variant, fallback, dtype):
    grad, y, books = make_blocks(dtype=dtype)
    grad[:4], grad[5:, 1] = 0, 0
    bent, _ = snap_gradient(grad, y, books, make_config(variant, fallback))
    assert not bent[grad.norm(dim=-1) == 0].any() and bent[4].any()
    nothing, _ = snap_gradient(torch.zeros_like(grad), y, books, make_config(variant, fallback))
    assert not nothing.any()


@every_dtype
@every_fallback
@every_variant
@pytest.mark.parametrize("neighbours", [1, 3])
def test_a_row_on_its_codeword_gets_a_finite_gradient(variant, fallback, dtype, neighbours):
    grad, y, books = make_blocks(dtype=dtype)
    y[::2] = books[:, 3]
    grad[2] = 0
    bent, aligned = snap_gradient(grad, y, books, make_config(variant, fallback, neighbours=neighbours))
    assert torch.isfinite(bent).all()
    if neighbours == 1 and fallback == "pass":
        assert not aligned[::2].any() and torch.equal(bent[::2], grad[::2])


def test_project_equals_its_closed_form():
    grad, y, books = make_blocks(words=1)
    bent, aligned = snap_gradient(grad, y, books, make_config("project", "zero"))
    pull = books[:, 0] - y
    line = pull[..., :, None] * pull[..., None, :] / pull.square().sum(-1)[..., None, None]
    downhill = ((grad * pull).sum(-1) < 0)[..., None]
    torch.testing.assert_close(bent, (line @ grad[..., None])[..., 0] * downhill)
    assert torch.equal(aligned, downhill[..., 0])


@every_dtype
def test_a_clamp_step_never_passes_the_codeword(dtype):
    config = make_config("clamp", "zero", step=50.0)
    grad, y, books = make_blocks(rows=60, dtype=dtype)
    bent, _ = snap_gradient(grad, y, books, config)
    pull, aligned = find_pulls(grad, y, books, config)
    past = (-config.step * bent - pull) * pull
    assert (past.sum(-1)[aligned] <= 1e-5).all()
    # Steps this long would pass it in most blocks: they stop exactly there.
    stopped = (-config.step * bent - pull).norm(dim=-1)[aligned] < 1e-4
    assert stopped.float().mean() > 0.5


def test_norm_keeps_the_length_of_each_block_and_rescale_that_of_the_batch():
    grad, y, books = make_blocks()
    bent, aligned = snap_gradient(grad, y, books, make_config("norm", "zero"))
    torch.testing.assert_close(bent.norm(dim=-1), grad.norm(dim=-1) * aligned)
    bent, _ = snap_gradient(grad, y, books, make_config("rescale", "zero"))
    torch.testing.assert_close(bent.norm(), grad.norm())


def test_all_but_rescale_bend_a_row_whatever_the_rest_of_its_batch():
    grad, y, books = make_blocks()
    for variant in VARIANTS:
        config = make_config(variant)
        whole, _ = snap_gradient(grad, y, books, config)
        halves = [snap_gradient(g, x, books, config)[0] for g, x in zip(grad.split(12), y.split(12), strict=True)]
        assert torch.allclose(torch.cat(halves), whole) == (variant != "rescale")


def test_orthogonal_fallback_keeps_the_distance_to_the_nearest_codeword():
    grad, y, books = make_blocks()
    bent, aligned = snap_gradient(grad, y, books, make_config("project", "orthogonal"))
    nearest = (y[:, :, None] - books).norm(dim=-1).argmin(-1)
    rest = y - books[torch.arange(3), nearest]
    assert ((bent * rest).sum(-1)[~aligned].abs() < 1e-9).all()


def test_blend_runs_from_the_gradient_to_its_projection_and_no_further():
    grad, y, books = make_blocks()
    project, _ = snap_gradient(grad, y, books, make_config("project"))
    assert torch.equal(snap_gradient(grad, y, books, make_config("blend", beta=0.0))[0], grad)
    torch.testing.assert_close(snap_gradient(grad, y, books, make_config("blend", beta=1.0))[0], project)
    with pytest.raises(ValidationError, match="is a share in blend"):
        make_config("blend", beta=1.5)


@every_dtype
@every_variant
def test_the_layer_gives_the_same_values_and_bends_what_comes_back(variant, dtype):
    config, codebook = make_config(variant), make_codebook()
    layer = make_layer(config, codebook)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(20, 6, generator=draw, dtype=dtype, requires_grad=True)
    grad = torch.randn(20, 6, generator=draw, dtype=dtype)
    y = layer(x * 2)
    assert torch.equal(y, x * 2)
    (y * grad).sum().backward()
    books = torch.tensor(codebook.books, dtype=dtype)
    bent, _ = snap_gradient(grad.unflatten(1, (2, 3)), (x * 2).detach().unflatten(1, (2, 3)), books, config)
    torch.testing.assert_close(x.grad, 2 * bent.flatten(1))
    assert not torch.allclose(bent.flatten(1), grad)


def test_residual_codebooks_snap_what_the_cell_leaves_over():
    config, codebook = make_config("project", "zero"), make_codebook(cells=4, residual=True)
    layer = make_layer(config, codebook)
    draw = torch.Generator().manual_seed(1)
    y = (3 * torch.randn(30, 6, generator=draw)).requires_grad_()
    grad = torch.randn(30, 6, generator=draw)
    layer(y).backward(grad)
    coarse = torch.tensor(codebook.coarse)
    rest = torch.stack([row - min(coarse, key=lambda cell: float((row - cell).norm())) for row in y.detach()])
    slow, _, _ = snap_in_loops(
        grad.unflatten(1, (2, 3)).tolist(), rest.unflatten(1, (2, 3)).tolist(), codebook.books.tolist(), config
    )
    torch.testing.assert_close(y.grad, torch.tensor(slow).flatten(1), rtol=1e-4, atol=1e-5)


def test_cells_without_residuals_do_not_move_what_is_snapped():
    plain, celled = make_codebook(), make_codebook(cells=4)
    celled = Codebook(coarse=celled.coarse, books=plain.books, residual=False)
    grads = []
    for codebook in (plain, celled):
        y = torch.linspace(-1, 1, 60).reshape(10, 6).requires_grad_()
        make_layer(make_config("norm"), codebook)(y).square().sum().backward()
        grads.append(y.grad)
    assert torch.equal(*grads)


@every_shape
@every_fallback
@every_variant
def test_the_layer_equals_the_loop_among_blocks_and_sums_turned_or_not(variant, fallback, kind, rotated, residual):
    config, codebook = make_config(variant, fallback), make_shape(kind, rotated, residual)
    y, grad = make_batch()
    slow, _, aligned, _ = snap_slowly(grad, y, codebook, config)
    torch.testing.assert_close(send_back(make_layer(config, codebook), y, grad), slow, rtol=1e-4, atol=1e-5)
    assert aligned.any() and (fallback == "widen" or not aligned.all())


@every_shape
@every_fallback
@every_variant
def test_the_three_properties_hold_among_blocks_and_sums_turned_or_not(variant, fallback, kind, rotated, residual):
    config, codebook = make_config(variant, fallback), make_shape(kind, rotated, residual)
    y, grad = make_batch()
    grad[:3] = 0
    bent = send_back(make_layer(config, codebook), y, grad)
    assert ((grad * bent).sum(1) >= -1e-6 * grad.square().sum(1)).all()
    assert not bent[:3].any()
    _, _, aligned, pulls = snap_slowly(grad, y, codebook, config)
    turned = rotate(bent, codebook).reshape(len(y), aligned.shape[1], -1)
    for row, block in aligned.nonzero().tolist():
        step, pull = -turned[row, block], torch.tensor(pulls[row][block], dtype=y.dtype)
        toward = float(step @ pull)
        assert toward > 0
        short = 0.99 * 2 * toward / float(step @ step)
        assert (pull - short * step).norm() < pull.norm()


@every_fallback
@pytest.mark.parametrize("kind", ["pq", "rq", "lsq"])
@every_variant
def test_behind_a_rotation_the_layer_snaps_as_without_one_on_turned_rows(variant, kind, fallback):
    config, codebook = make_config(variant, fallback), make_shape(kind, rotated=True, residual=True)
    plain = Codebook(coarse=codebook.coarse, books=codebook.books, residual=True, kind=kind)
    y, grad = make_batch()
    turned = send_back(make_layer(config, plain), rotate(y, codebook), rotate(grad, codebook))
    bent = send_back(make_layer(config, codebook), y, grad)
    torch.testing.assert_close(rotate(bent, codebook), turned, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(bent, send_back(make_layer(config, plain), y, grad))


@pytest.mark.parametrize("kind", ["rq", "lsq"])
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
def test_with_one_candidate_a_whole_row_is_pulled_to_what_its_code_stands_for(kind, rotated):
    codebook = make_shape(kind, rotated, residual=True)
    y, grad = make_batch()
    bent = send_back(make_layer(make_config("norm", "zero", neighbours=1), codebook), y, grad)
    pull = quantize(y, codebook) - y
    downhill = (grad * pull).sum(1) < 0
    wanted = -grad.norm(dim=1, keepdim=True) * pull / pull.norm(dim=1, keepdim=True) * downhill[:, None]
    torch.testing.assert_close(bent, wanted, rtol=1e-4, atol=1e-5)
    assert downhill.any() and not downhill.all()


@every_shape
@pytest.mark.parametrize("variant", ["none", "add", "project", "penalty"])
def test_the_loss_sees_decoded_rows_and_the_gradient_comes_back_as_if_it_had_not(variant, kind, rotated, residual):
    codebook = make_shape(kind, rotated, residual)
    y, grad = make_batch()
    decoded, plain = (
        make_layer(make_config(variant, forward=forward), codebook) for forward in ("decoded", "identity")
    )
    torch.testing.assert_close(decoded(y), quantize(y, codebook), rtol=1e-4, atol=1e-5)
    assert plain(y) is y or torch.equal(plain(y), y)
    bent = send_back(decoded, y, grad)
    if variant == "none":
        torch.testing.assert_close(bent, grad)
    else:
        torch.testing.assert_close(bent, send_back(plain, y, grad))
        assert not torch.allclose(bent, grad)
    decoded.eval()
    assert decoded(y) is y


def test_decoded_rows_are_those_of_the_codes_that_an_index_holds():
    codebook = make_codebook(cells=4, residual=True, rotated=True)
    y, _ = make_batch(dtype=torch.float32)
    cells_N, codes = open_quantizer(codebook).encode(y, codebook)
    seen = make_layer(make_config("none", forward="decoded"), codebook)(y)
    np.testing.assert_allclose(seen, codebook.decode(cells_N.numpy(), codes.numpy()), atol=1e-5)


@pytest.mark.parametrize("reason", ["no codebook", "codebook taken away", "evaluation", "variant none"])
def test_the_layer_does_nothing(reason):
    layer = make_layer(make_config("none" if reason == "variant none" else "norm"), make_codebook())
    if reason == "no codebook":
        layer = SnappingLayer(layer.config)
    if reason == "codebook taken away":
        layer.set_codebook(None)
    if reason == "evaluation":
        layer.eval()
    y = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    passed = layer(y)
    assert passed is y and layer.take_health() is None
    passed.square().sum().backward()
    assert torch.equal(y.grad, 2 * y.detach())


def test_variant_none_gives_every_gradient_back():
    grad, y, books = make_blocks()
    bent, aligned = snap_gradient(grad, y, books, make_config("none"))
    assert torch.equal(bent, grad) and aligned.all()


def test_health_equals_figures_worked_out_by_hand():
    # Two blocks of two dims, one pair of codewords each; rows at the origin, so a pull is the codeword itself.
    books = np.array([[[1, 0], [2, 0]], [[0, 1], [0, 2]]])
    layer = make_layer(SnapConfig(variant="project"), Codebook(coarse=np.zeros((1, 4)), books=books, residual=False))
    y = torch.zeros(3, 4, requires_grad=True)
    # Row 0: (-3, 4) keeps (-3, 0); (0, -2) keeps all. Row 1: (1, 0) and (0, 1) are uphill and pass. Row 2: silent.
    layer(y).backward(torch.tensor([[-3.0, 4.0, 0.0, -2.0], [1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]))
    assert y.grad.tolist() == [[-3, 0, 0, -2], [1, 0, 0, 1], [0, 0, 0, 0]]
    health = layer.take_health()
    assert health.fallback_rate == pytest.approx((0 + 1) / 2)
    assert health.cosine == pytest.approx((13 / np.sqrt(29 * 13) + 1) / 2)
    assert health.energy == pytest.approx((13 / 29 + 1) / 2)
    assert layer.take_health() is None


def test_health_over_two_batches_is_the_mean_over_their_rows():
    layer = make_layer(make_config("add"), make_codebook())
    draw = torch.Generator().manual_seed(0)
    y, grad = torch.randn(30, 6, generator=draw), torch.randn(30, 6, generator=draw)
    parts = []
    for sizes in ([30], [10, 20]):
        for x, g in zip(y.split(sizes), grad.split(sizes), strict=True):
            layer(x.clone().requires_grad_()).backward(g)
        parts.append(layer.take_health())
    assert vars(parts[0]) == pytest.approx(vars(parts[1]))


@pytest.mark.parametrize("variant", ["none", *COUPLED])
def test_health_of_what_never_falls_back_is_that_of_whole_rows(variant):
    codebook = make_codebook("rq", rotated=True)
    y, grad = make_batch()
    layer = make_layer(SnapConfig(variant=variant, weight=5.0, forward="decoded"), codebook)
    bent, health = send_back(layer, y, grad), layer.take_health()
    assert health.fallback_rate == 0
    cosine = torch.nn.functional.cosine_similarity(bent, grad, dim=1)
    assert health.cosine == pytest.approx(float(cosine.mean()))
    assert health.energy == pytest.approx(float((bent.norm(dim=1) / grad.norm(dim=1)).square().mean()))
    assert (health.energy == pytest.approx(1)) == (variant == "none")


@every_variant
def test_health_of_sums_counts_rows_where_that_of_product_codes_counts_blocks(variant):
    y, grad = make_batch()
    for kind in ("pq", "rq"):
        config, codebook = make_config(variant, "zero"), make_shape(kind, rotated=True, residual=False)
        layer = make_layer(config, codebook)
        bent, health = send_back(layer, y, grad), layer.take_health()
        _, blocks, aligned, _ = snap_slowly(grad, y, codebook, config)
        assert aligned.shape == blocks.shape[:2] == (40, 2 if kind == "pq" else 1)
        assert health.fallback_rate == pytest.approx(1 - float(aligned.float().mean()))
        assert health.energy == pytest.approx(float((bent.norm(dim=1) / grad.norm(dim=1)).square().mean()))
