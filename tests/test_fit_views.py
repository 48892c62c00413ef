"""The training loop over items of several modalities: every view is learned from, each worker sees its rows."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from gsl_dist.encoders import FusionConfig, make_encoder
from gsl_dist.encoders.multimodal import Views
from gsl_dist.fit import FitConfig, Training, embed, fit
from gsl_dist.fit import _sum_views as sum_views
from gsl_dist.losses import PairwiseConfig, ProxyConfig, make_loss
from gsl_dist.quantizers import LloydConfig, ProductConfig, make_quantizer, train_codebook
from gsl_dist.sampling import plan_epoch
from gsl_dist.snap import SnapConfig, SnappingLayer

DIM, CLASSES, ROWS = 8, 4, 96
LOSSES = {"proxy": ProxyConfig(kind="proxy"), "pairwise": PairwiseConfig(kind="pairwise")}


def make_items(*, lacking=False):
    draw = torch.Generator().manual_seed(2)
    labels = torch.randint(CLASSES, (ROWS,), generator=draw)
    items = torch.randint(60, (ROWS, 6, 6, 3), generator=draw, dtype=torch.uint8)
    items[..., 0] += (120 * (labels % 2)).to(torch.uint8)[:, None, None]
    items[..., 1] += (120 * (labels // 2)).to(torch.uint8)[:, None, None]
    items[..., 2] = 3
    if lacking:
        items[::5, ..., 2], items[1::7, ..., 2] = 1, 2
    return items, labels


def start_training(*, loss="proxy", epochs=3, snap=None, **encoder):
    torch.manual_seed(0)
    config = FitConfig(epochs=epochs, warmup_epochs=1, batch_size=32, learning_rate=3e-3)
    settings = FusionConfig(**{"kind": "asymfusion", "dim": DIM, "channels": (20,)} | encoder)
    network = make_encoder(settings, (6, 6, 3), {"image": 1, "edges": 1})
    snapping = SnappingLayer(snap or SnapConfig(variant="spring"))
    return Training(network, make_loss(LOSSES[loss], classes=CLASSES, dim=DIM), snapping, config)


def train(training, rank=0, workers=1, *, lacking=False):
    items, labels = make_items(lacking=lacking)

    def batches(epoch):
        planned = plan_epoch(labels.numpy(), 32, seed=0, epoch=epoch)
        return [(items[rows], labels[rows]) for rows in torch.tensor(np.split(planned, workers, axis=1)[rank])]

    def refresh(training):
        quantizer = make_quantizer(ProductConfig(sub_vectors=2, bits=3, cells=2), DIM)
        y_ND = embed(training.encoder, items)
        return train_codebook(y_ND, quantizer, LloydConfig(iterations=3), seed=0, start=training.codebook)

    fit(training, batches, refresh)
    return training


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_the_sum_over_all_views_and_the_fused_one_leaves_the_proxies_alone(loss):
    training = start_training(loss=loss)
    draw = torch.Generator().manual_seed(1)
    y_VND = torch.randn(3, 12, DIM, generator=draw).requires_grad_()
    labels = torch.arange(12) % CLASSES
    there = torch.ones(3, 12, dtype=torch.bool)
    there[0, :3], there[2, 1:6] = False, False
    found = sum_views(training, Views(y_VND, there), labels)
    parts = [training.loss(y[here], labels[here]) for y, here in zip(y_VND, there, strict=True)]
    torch.testing.assert_close(found, sum(parts))
    proxies = list(training.loss.parameters())
    if proxies:
        alone = torch.autograd.grad(parts[0] + parts[1], proxies, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(found, proxies, retain_graph=True), alone)
    assert not torch.autograd.grad(found, y_VND)[0][~there].any()


def test_views_without_rows_add_nothing():
    y_VND = torch.randn(3, 12, DIM, requires_grad=True)
    there = torch.ones(3, 12, dtype=torch.bool)
    there[1:] = False
    training = start_training()
    labels = torch.arange(12) % CLASSES
    found = sum_views(training, Views(y_VND, there), labels)
    torch.testing.assert_close(found, training.loss(y_VND[0], labels))
    found.backward()


@pytest.mark.parametrize("lacking", [False, True])
def test_a_network_learns_from_whole_items_and_from_parts(lacking):
    training = train(start_training(epochs=8, modality_dropout=0.3), lacking=lacking)
    losses = [record.loss for record in training.history]
    assert losses[-1] < 0.6 * losses[0]
    items, labels = make_items()
    y_ND = embed(training.encoder, items)
    nearest = (y_ND @ y_ND.T).fill_diagonal_(-2).argmax(1)
    assert (labels[nearest] == labels).float().mean() > 0.8


def train_pair(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    given = {}
    for name, lacking in (("whole", False), ("parts", True)):
        # Without fusion an item may lack a modality, and nothing is drawn at random: workers can be compared.
        training = train(start_training(shuffle=not lacking, shift=not lacking), rank, 2, lacking=lacking)
        given[name] = list(training.encoder.state_dict().values())
    torch.save(given, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_train_the_network_that_one_does(tmp_path):
    torch.multiprocessing.spawn(train_pair, (str(tmp_path),), nprocs=2)
    pair = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]
    for name, lacking in (("whole", False), ("parts", True)):
        training = train(start_training(shuffle=not lacking, shift=not lacking), lacking=lacking)
        wanted = list(training.encoder.state_dict().values())
        for given in pair:
            for mine, theirs in zip(given[name], wanted, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-3, check_dtype=False)
