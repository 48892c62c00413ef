"""One network for several modalities: what fusion moves, what it costs, and what each number learns from."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gsl_dist.encoders import FusionConfig, make_encoder
from gsl_dist.encoders.multimodal import JointNorm, Norms, shift_pixels, split_items, swap_channels
from gsl_dist.errors import ConfigError, DataError

BOTH, FIRST, SECOND = 3, 1, 2


def start_encoder(modalities=None, **settings):
    torch.manual_seed(0)
    config = FusionConfig(**{"kind": "asymfusion", "dim": 12, "channels": (20, 40)} | settings)
    modalities = modalities or {"image": 1, "edges": 1}
    return make_encoder(config, (10, 9, sum(modalities.values()) + 1), modalities)


def make_items(rows=6, *, channels=2, there=BOTH, seed=1):
    draw = torch.Generator().manual_seed(seed)
    items = torch.randint(256, (rows, 10, 9, channels + 1), generator=draw, dtype=torch.uint8)
    items[..., -1] = torch.as_tensor(there, dtype=torch.uint8).expand(rows)[:, None, None]
    return items


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_fusion_has_no_parameters():
    plain = start_encoder(shuffle=False, shift=False)
    for settings in ({}, {"shuffle": False}, {"shift": False}):
        assert start_encoder(**settings).state_dict().keys() == plain.state_dict().keys()
        assert count(start_encoder(**settings)) == count(plain)


def test_a_second_modality_costs_one_set_of_normalization_and_its_share():
    one, two = start_encoder({"image": 1}), start_encoder()
    norms = sum(2 * norm.num_features for norm in one.modules() if isinstance(norm, JointNorm))
    assert count(two) == count(one) + norms + 1  # alpha has a number more
    assert count(start_encoder(sharing="all")) == count(one) + 1
    assert count(start_encoder(sharing="none")) == 2 * (count(one) - 1) + 2


def test_swapping_twice_is_the_identity_and_once_moves_the_last_fifth():
    x1, x2 = torch.randn(2, 3, 23, 4, 5)
    y1, y2 = swap_channels(x1, x2)
    assert torch.equal(y1[:, :16], x1[:, :16]) and torch.equal(y1[:, 16:], x2[:, 16:])
    assert torch.equal(y2[:, :16], x2[:, :16]) and torch.equal(y2[:, 16:], x1[:, 16:])
    assert all(torch.equal(back, x) for back, x in zip(swap_channels(y1, y2), (x1, x2), strict=True))


@pytest.mark.parametrize("sides", [(1, 1), (4, 5), (2, 7)])
def test_the_shift_reads_the_neighbour_pixel_by_pixel(sides):
    x = torch.randn(2, 11, *sides)  # groups of 2: channels 0 to 7 move, 8 to 10 are left out
    wanted = torch.zeros_like(x)
    for channel in range(8):
        down, right = [(-1, 0), (0, -1), (0, 1), (1, 0)][channel // 2]
        for row in range(sides[0]):
            for column in range(sides[1]):
                if 0 <= row + down < sides[0] and 0 <= column + right < sides[1]:
                    wanted[:, channel, row, column] = x[:, channel, row + down, column + right]
    assert torch.equal(shift_pixels(x), wanted)


def swap_modalities(encoder):
    """Give the same network with the normalization of both modalities, and their shares, exchanged."""
    other = copy.deepcopy(encoder)
    for norms in other.modules():
        if isinstance(norms, Norms):
            norms.copies = nn.ModuleList(reversed(norms.copies))
    with torch.no_grad():
        other.backbone.alpha.copy_(other.backbone.alpha.flip(0))
    return other


@pytest.mark.parametrize("settings", [{}, {"shuffle": False}, {"shift": False}, {"normalize": False}])
def test_swapping_inputs_and_their_normalization_swaps_the_outputs(settings):
    encoder, items = start_encoder(**settings), make_items()
    with torch.no_grad():
        for parameter in encoder.parameters():  # so that the two sets of normalization differ
            parameter.add_(0.1 * torch.randn_like(parameter))
    turned = items[..., [1, 0, 2]]
    ours, theirs = encoder(items).y_VND, swap_modalities(encoder)(turned).y_VND
    torch.testing.assert_close(ours, theirs[[1, 0, 2]])
    assert (ours - encoder(turned).y_VND[[1, 0, 2]]).abs().max() > 1e-3, "the modalities do not differ"


def test_what_one_modality_shows_reaches_the_other_only_where_they_are_fused():
    items = make_items()
    changed = items.clone()
    changed[..., 1] = 255 - changed[..., 1]
    for settings, is_moved in (({}, True), ({"shift": False}, True), ({"shuffle": False}, True)):
        encoder = start_encoder(**settings).train()
        assert (not torch.equal(encoder(items).y_VND[0], encoder(changed).y_VND[0])) == is_moved
    plain = start_encoder(shuffle=False, shift=False).train()
    assert torch.equal(plain(items).y_VND[0], plain(changed).y_VND[0])


def test_alpha_learns_from_the_fused_view_alone_and_the_fused_view_teaches_alpha_alone():
    encoder, items = start_encoder(normalize=False), make_items()
    draw = torch.randn(3, 6, 12)

    def gradients(places):
        encoder.zero_grad()
        views = encoder(items)
        sum((views.y_VND[place] * draw[place]).sum() for place in places).backward()
        return {name: parameter.grad for name, parameter in encoder.named_parameters()}

    by_each = gradients((0, 1))
    assert not torch.as_tensor(0 if (alpha := by_each.pop("backbone.alpha")) is None else alpha).any()
    assert all(grad is not None and grad.abs().sum() > 0 for grad in by_each.values())
    by_fused = gradients((2,))
    alpha = by_fused.pop("backbone.alpha")
    assert alpha.abs().min() > 0
    assert all(grad is None or not grad.any() for grad in by_fused.values())


def test_the_item_vector_is_the_sum_of_both_by_their_shares():
    encoder, items = start_encoder(), make_items()
    with torch.no_grad():
        encoder.backbone.alpha.copy_(torch.tensor([0.3, -0.5]))
    encoder.eval()
    first, second, _ = encoder.backbone(items).y_VND
    share = torch.softmax(torch.tensor([0.3, -0.5]), 0)
    wanted = nn.functional.normalize(share[0] * first + share[1] * second, dim=1)
    torch.testing.assert_close(encoder(items), wanted)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(6))


def test_an_item_with_one_modality_is_what_that_modality_gives_unfused():
    encoder = start_encoder(modality_dropout=0.5).eval()
    plain = start_encoder(shuffle=False, shift=False).eval()  # the same weights: they are drawn alike
    items = make_items(there=torch.tensor([BOTH, FIRST, SECOND, BOTH, SECOND, FIRST]))
    items[[1, 5], ..., 1] = 7  # what is not there is not looked at
    y, alone = encoder(items), plain.backbone(make_items()).y_VND
    torch.testing.assert_close(y[[1, 5]], alone[0, [1, 5]])
    torch.testing.assert_close(y[[2, 4]], alone[1, [2, 4]])
    torch.testing.assert_close(y[[0, 3]], encoder(make_items())[[0, 3]])


def test_dropout_of_modalities_passes_that_share_of_items_unfused():
    encoder, plain = start_encoder(modality_dropout=0.4), start_encoder(shuffle=False, shift=False)
    encoder.train()
    items = make_items(rows=400)
    with torch.no_grad():
        there = encoder(items).there_VN
    assert there[:2].all() and abs(float(there[2].float().mean()) - 0.6) < 0.1
    plain.load_state_dict(encoder.state_dict())
    for norms in (*encoder.modules(), *plain.modules()):
        if isinstance(norms, JointNorm):  # rows by themselves: statistics of the batch would tie them together
            norms.eval()
    views = encoder(items)
    alone = ~views.there_VN[2]
    torch.testing.assert_close(views.y_VND[:2, alone], plain(items).y_VND[:2, alone])


def test_an_encoder_that_fuses_refuses_an_item_without_one_of_both():
    items = make_items(there=torch.tensor([BOTH, BOTH, FIRST, BOTH, BOTH, BOTH]))
    with pytest.raises(DataError, match=r"a row without edges.*needs both: give edges too.*modality_dropout above 0"):
        start_encoder().eval()(items)
    assert start_encoder(shuffle=False, shift=False).eval()(items).shape == (6, 12)


def test_modalities_of_different_channels_have_stems_of_their_own():
    encoder = start_encoder({"image": 3, "depth": 1})
    items = make_items(channels=4)
    assert [stem.in_channels for stem in encoder.backbone.stem.copies] == [3, 1]
    assert encoder(items).y_VND.shape == (3, 6, 12)
    images, there = split_items(items, (3, 1))
    assert [image.shape[1] for image in images] == [3, 1] and there.all()
    torch.testing.assert_close(images[1][:, 0], items[..., 3] / 127.5 - 1)


def test_three_modalities_go_without_fusion_only():
    three = {"image": 3, "depth": 1, "edges": 1}
    assert start_encoder(three, shuffle=False, shift=False)(make_items(channels=5, there=7)).y_VND.shape == (4, 6, 12)
    with pytest.raises(ConfigError, match="of 3 set shuffle and shift to false"):
        start_encoder(three)


def test_modalities_and_encoder_must_ask_for_each_other():
    from gsl_dist.encoders import CnnConfig

    with pytest.raises(ConfigError, match=r"encoder.kind: got 'asymfusion', but .* name them in corpus.modalities"):
        make_encoder(FusionConfig(kind="asymfusion"), (10, 9, 3))
    with pytest.raises(ConfigError, match=r"encoder.kind: got 'cnn', but .*image, edges.* are for asymfusion"):
        make_encoder(CnnConfig(kind="cnn"), (10, 9, 3), {"image": 1, "edges": 1})


def _normalize_part(rank, store, out):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x, grad = _maps()
    cut = slice(0, 5) if rank == 0 else slice(5, 8)
    norm, mine = JointNorm(4).train(), x[cut].clone().requires_grad_()
    y = norm(mine)
    (y * grad[cut]).sum().backward()
    torch.save([y.detach(), mine.grad, norm.running_mean, norm.running_var, norm.weight.grad], f"{out}-{rank}")
    dist.destroy_process_group()


def _maps():
    draw = torch.Generator().manual_seed(3)
    return 5 + torch.randn(8, 4, 3, 3, generator=draw), torch.randn(8, 4, 3, 3, generator=draw)


def test_two_workers_normalize_over_the_rows_of_both(tmp_path):
    torch.multiprocessing.spawn(_normalize_part, (str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    (x, grad), norm = _maps(), nn.BatchNorm2d(4)
    x.requires_grad_()
    y = norm(x)
    (y * grad).sum().backward()
    parts = [torch.load(tmp_path / f"out-{rank}") for rank in range(2)]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), y)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), x.grad, rtol=1e-4, atol=1e-5)
    for part in parts:
        torch.testing.assert_close(part[2:4], [norm.running_mean, norm.running_var])
    torch.testing.assert_close(parts[0][4] + parts[1][4], norm.weight.grad, rtol=1e-4, atol=1e-5)
