"""The snapping layer against loops written from its formulas, and the three properties that it claims."""

import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from reference import place_in_loops, snap_in_loops, spring_in_loops

from gsl_dist.codebook import Codebook
from gsl_dist.quantizers import AdditiveConfig, decode, make_quantizer, open_quantizer, rotate
from gsl_dist.quantizers.product import find_codewords
from gsl_dist.snap import SnapConfig, SnappingLayer
from gsl_dist.snap import snap_gradient as snap_near

ON_THE_LINE = ("project", "norm", "clamp", "rescale")
VARIANTS = (*ON_THE_LINE, "blend", "add")
COUPLED = ("penalty", "surgery")
FORCES = (*COUPLED, "spring")
FALLBACKS = ("pass", "zero", "widen", "orthogonal")
SHAPES = [
    (kind, rotated, residual) for kind in ("pq", "rq", "lsq") for rotated in (False, True) for residual in (False, True)
]
SHAPES += [("vlq", rotated, True) for rotated in (False, True)]
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_coupling = pytest.mark.parametrize("variant", COUPLED)
every_force = pytest.mark.parametrize("variant", FORCES)
every_fallback = pytest.mark.parametrize("fallback", FALLBACKS)
every_shape = pytest.mark.parametrize(
    ("kind", "rotated", "residual"),
    SHAPES,
    ids=[f"{kind}{' rotated' * rotated}{' residual' * residual}" for kind, rotated, residual in SHAPES],
)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def make_config(variant, fallback="pass", **settings):
    return SnapConfig(variant=variant, fallback=fallback, **{"beta": 0.6, "step": 2.0, "neighbours": 3} | settings)


def make_blocks(*, rows=24, parts=3, words=8, dims=4, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(rows, parts, dims), (rows, parts, dims), (parts, words, dims)]
    return [torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes]


def make_codebook(kind="pq", rotated=False, *, dim=6, parts=2, words=8, cells=1, residual=False, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(cells, dim)) * 3 if cells > 1 else np.zeros((1, dim))
    books = rng.normal(size=(parts, words, dim // parts if kind in ("pq", "vlq") else dim))
    rotation = np.linalg.qr(rng.normal(size=(dim, dim)))[0] if rotated else None
    lines = {}
    if kind == "vlq":
        ends = np.stack([np.delete(np.arange(cells), cell) for cell in range(cells)])
        lines = {"edges": ends, "levels": np.linspace(0, 0.6, 256), "feet": np.full(ends.shape, 0.3)}
    return Codebook(coarse, books, residual, kind, rotation=rotation, **lines)


def make_shape(kind, rotated, residual):
    """Give a codebook of few enough sums that the beam of a snapping layer holds them all."""
    return make_codebook(kind, rotated, words=4, cells=3 if residual else 1, residual=residual)


def make_batch(rows=40, dim=6, *, dtype=torch.float64, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, dim, generator=draw, dtype=dtype) for _ in range(2)]


def send_back(layer, y, grad):
    """Give the gradient that reaches y when `grad` comes back."""
    y = y.clone().requires_grad_()
    layer(y).backward(grad)
    return y.grad


def quantize(y, codebook):
    """Give what the nearest code of each row stands for, with a search that drops nothing."""
    config = AdditiveConfig(kind="rq", books=codebook.sub_vectors, bits=codebook.bits)
    quantizer = make_quantizer(config, codebook.dim) if codebook.additive else open_quantizer(codebook)
    cells_N, codes = quantizer.encode(y, codebook)
    return decode(cells_N, codes, codebook).to(y.dtype)


def list_candidates(codebook):
    """Give the codewords of each block: those of each book, or all the sums."""
    if not codebook.additive:
        return codebook.books.tolist()
    return [[np.sum(words, axis=0).tolist() for words in itertools.product(*codebook.books.astype(np.float64))]]


def snap_slowly(grad, y, codebook, config):
    """Bend the gradients of a batch in loops: turned, without what the cell explains, block by block, turned back."""
    turned, rest = rotate(grad, codebook), rotate(y, codebook)
    if codebook.residual:
        rest = torch.stack([torch.tensor(leave_slowly(row, codebook), dtype=y.dtype) for row in rest])
    blocks = (1 if codebook.additive else codebook.sub_vectors, -1)
    bent, aligned, pulls = snap_in_loops(
        turned.unflatten(1, blocks).tolist(), rest.unflatten(1, blocks).tolist(), list_candidates(codebook), config
    )
    bent = torch.tensor(bent, dtype=y.dtype).flatten(1)
    back = bent if codebook.rotation is None else bent @ torch.tensor(codebook.rotation, dtype=y.dtype)
    return back, turned.unflatten(1, blocks), torch.tensor(aligned), pulls


def leave_slowly(row, codebook):
    """Give what the nearest cell, or its nearest line, leaves of a row."""
    row, coarse = row.tolist(), codebook.coarse.astype(np.float64)
    cell = int(np.square(coarse - row).sum(1).argmin())
    if codebook.edges is None:
        return row - coarse[cell]
    return place_in_loops(row, cell, coarse.tolist(), codebook.edges.tolist(), codebook.levels.tolist())[2]


def snap_gradient(grad, y, books, config):
    """Snap among the codewords of product books."""
    return snap_near(grad, y, lambda k: find_codewords(y, books, k), config)


def make_layer(config, codebook, *, workers=1):
    layer = SnappingLayer(config, workers=workers)
    layer.set_codebook(codebook)
    return layer


def find_pulls(grad, y, books, config):
    """Give the pulls to the chosen codewords, zero where none was aligned, and who was aligned."""
    _, aligned, pulls = snap_in_loops(grad.tolist(), y.tolist(), books.tolist(), config)
    zeros = [0.0] * y.shape[2]
    return torch.tensor([[d or zeros for d in row] for row in pulls], dtype=y.dtype), torch.tensor(aligned)


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
