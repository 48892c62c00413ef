"""The training loop: it learns, resumes as if undisturbed, and takes the same steps with two workers as with one."""

import io
import math
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from gsl_dist.encoders import Encoder, MlpConfig, make_encoder
from gsl_dist.errors import GslError
from gsl_dist.fit import Diverged, FitConfig, Training, embed, fit, gather_rows
from gsl_dist.losses import PairwiseConfig, ProxyConfig, TripletConfig, make_loss
from gsl_dist.quantizers import (
    AdditiveConfig,
    LloydConfig,
    OptimizedConfig,
    ProductConfig,
    make_quantizer,
    train_codebook,
)
from gsl_dist.sampling import plan_epoch
from gsl_dist.snap import SnapConfig, SnappingLayer

DIM, CLASSES, ROWS = 8, 4, 256
LOSSES = {
    "proxy": ProxyConfig(kind="proxy"),
    "triplet": TripletConfig(kind="triplet"),
    "pairwise": PairwiseConfig(kind="pairwise"),
}


def make_set():
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES, size=ROWS)
    x = 2 * rng.normal(size=(CLASSES, 12))[labels] + rng.normal(size=(ROWS, 12))
    return torch.tensor(x, dtype=torch.float32), torch.tensor(labels)


def start_training(*, loss="proxy", snap=None, seed=0, **settings):
    torch.manual_seed(seed)
    config = FitConfig(**{"epochs": 4, "warmup_epochs": 2, "batch_size": 64, "learning_rate": 3e-3} | settings)
    encoder = make_encoder(MlpConfig(kind="mlp", dim=DIM, hidden=(16,)), (12,))
    return Training(
        encoder, make_loss(LOSSES[loss], classes=CLASSES, dim=DIM), SnappingLayer(snap or SnapConfig()), config
    )


class Epochs:
    """Batches of the tiny set: the rows of one of several workers."""

    def __init__(self, rank=0, workers=1, batch_size=64):
        self.items, self.labels = make_set()
        self.rank, self.workers, self.batch_size = rank, workers, batch_size

    def __call__(self, epoch):
        plan = plan_epoch(self.labels.numpy(), self.batch_size, seed=0, epoch=epoch)
        mine = np.split(plan, self.workers, axis=1)[self.rank]
        return [(self.items[rows], self.labels[rows]) for rows in torch.tensor(mine)]


def refresh(training, cells=3):
    quantizer = make_quantizer(ProductConfig(sub_vectors=2, bits=4, cells=cells), DIM)
    rows = embed(training.encoder, make_set()[0])
    return train_codebook(
        rows, quantizer, LloydConfig(iterations=4, refresh_iterations=2), seed=0, start=training.codebook
    )


def train(training=None, on_epoch=lambda training: None, **settings):
    training = training or start_training(**settings)
    fit(training, Epochs(), refresh, on_epoch)
    return training


def flatten_weights(training):
    parameters = [*training.encoder.parameters(), *training.loss.parameters()]
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def flatten_grads(training):
    """Give the gradients of the last step; weights would not tell of a wrong factor, to which Adam is blind."""
    return torch.cat([parameter.grad.flatten() for parameter in training.encoder.parameters()])


def write_state(training):
    buffer = io.BytesIO()
    torch.save(training.state(), buffer)
    return buffer.getvalue()


def read_state(content):
    return torch.load(io.BytesIO(content), weights_only=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_tiny_network_learns(loss):
    training = train(loss=loss, epochs=6)
    losses = [record.loss for record in training.history]
    assert losses[-1] < 0.7 * losses[0]


def test_snapping_lands_nearer_to_the_codewords_than_leaving_gradients_alone():
    errors = {}
    for variant in ("none", "add"):
        training = train(epochs=10, snap=SnapConfig(variant=variant))
        errors[variant] = training.history[-1].quantization_error
    assert errors["add"] < errors["none"]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_same_seed_gives_identical_weights(loss):
    one, two, other = (flatten_weights(train(loss=loss, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("done", [1, 2, 3, 4])
@pytest.mark.parametrize("settings", [{}, {"refresh_epochs": 2}], ids=["refresh every epoch", "every second"])
def test_resume_after_any_epoch_equals_the_undisturbed_run(done, settings):
    states = []
    whole = train(on_epoch=lambda training: states.append(write_state(training)), epochs=5, **settings)
    resumed = start_training(epochs=5, seed=7, **settings)
    resumed.load_state(read_state(states[done - 1]))
    assert resumed.epoch == done
    train(resumed)
    assert torch.equal(flatten_weights(resumed), flatten_weights(whole))
    assert resumed.codebook.fingerprint == whole.codebook.fingerprint
    assert resumed.history == whole.history


def test_a_state_brings_the_random_numbers_back():
    training = start_training()
    state, drawn = read_state(write_state(training)), torch.rand(3)
    start_training(seed=5).load_state(state)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize(
    "config",
    [
        OptimizedConfig(kind="opq", sub_vectors=2, bits=3, rotation_iterations=2),
        AdditiveConfig(kind="rq", books=2, bits=3, joint_iterations=1),
    ],
    ids=["rotated", "additive"],
)
def test_a_checkpoint_keeps_the_whole_codebook(config):
    training = start_training()
    quantizer = make_quantizer(config, DIM)
    rows = embed(training.encoder, make_set()[0])
    training.codebook = train_codebook(rows, quantizer, LloydConfig(iterations=2)).codebook
    resumed = start_training()
    resumed.load_state(read_state(write_state(training)))
    assert resumed.codebook.fingerprint == training.codebook.fingerprint


def test_a_finished_training_stays_as_it_is():
    training = train()
    weights = flatten_weights(training)
    assert torch.equal(flatten_weights(train(training)), weights) and training.epoch == 4


def test_warm_up_epochs_have_no_codebook_and_no_snapping():
    asked, seen = [], []

    def note(training):
        asked.append(training.epoch)
        return refresh(training)

    fit(start_training(), Epochs(), note, lambda training: seen.append(training.codebook is not None))
    assert asked == [2, 3, 4] and seen == [False, False, True, True]


def test_the_settled_codebook_lies_nearer_to_what_the_network_gives_than_the_one_it_was_trained_with():
    before = []

    def note(training):
        before.append(training.codebook)
        return refresh(training)

    training = start_training(epochs=6)
    fit(training, Epochs(), note)
    quantizer = make_quantizer(ProductConfig(kind="pq", sub_vectors=2, bits=4, cells=3), DIM)
    rows = embed(training.encoder, make_set()[0])
    errors = [
        quantizer.assign(quantizer.prepare(rows, codebook, "books"), codebook, "books").error
        for codebook in (before[-1], training.codebook)
    ]
    assert errors[1] < errors[0]


def test_warm_up_equals_training_without_snapping_and_the_rest_does_not():
    runs = {}
    for variant in ("none", "norm"):
        runs[variant] = []
        train(on_epoch=lambda t, to=runs[variant]: to.append(flatten_weights(t)), snap=SnapConfig(variant=variant))
    same = [torch.equal(*pair) for pair in zip(*runs.values(), strict=True)]
    assert same == [True, True, False, False]


def test_without_warm_up_the_first_epoch_has_a_codebook():
    assert train(warmup_epochs=0, epochs=1).history[0].phase == "snap"


def test_the_codebook_is_refreshed_as_often_as_asked_and_settles_after_the_last_epoch():
    asked, books = [], []

    def note(training):
        asked.append(training.epoch)
        return refresh(training)

    training = start_training(epochs=6, warmup_epochs=1, refresh_epochs=2)
    fit(training, Epochs(), note, lambda training: books.append(training.codebook and training.codebook.fingerprint))
    assert asked == [1, 3, 5, 6]
    assert books[0] is None and books[1] == books[2] != books[3] == books[4] != books[5]
    assert books[5] == training.codebook.fingerprint


def test_history_records_every_epoch():
    training = train(refresh_epochs=2)
    assert [(record.epoch, record.phase) for record in training.history] == [
        (0, "warm-up"),
        (1, "warm-up"),
        (2, "snap"),
        (3, "snap"),
    ]
    warm, fresh, stale = training.history[1], training.history[2], training.history[3]
    assert (warm.quantization_error, warm.fallback_rate, warm.cosine, warm.energy) == (None,) * 4
    assert 0 < fresh.quantization_error < 1 and stale.quantization_error is None
    assert 0 <= stale.fallback_rate <= 1 and 0 < stale.cosine <= 1 and stale.energy >= 1
    assert all(math.isfinite(record.loss) for record in training.history)


def test_the_recorded_loss_is_the_mean_over_the_steps():
    training = start_training(epochs=1, warmup_epochs=0, learning_rate=1e-30, proxy_learning_rate=1e-30)
    with torch.no_grad():
        losses = [float(training.loss(training.encoder(items), labels)) for items, labels in Epochs()(0)]
    assert train(training).history[0].loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_batches_without_a_length_train_the_same():
    training = start_training()
    fit(training, lambda epoch: iter(Epochs()(epoch)), refresh)
    assert torch.equal(flatten_weights(training), flatten_weights(train()))


def test_learning_rates_fall_from_their_start_to_near_zero():
    training, rates = start_training(epochs=20, warmup_epochs=1), []
    fit(
        training,
        Epochs(),
        refresh,
        lambda training: rates.append([group["lr"] for group in training.optimizer.param_groups]),
    )
    network, proxies = np.array(rates).T
    assert (np.diff(network) < 0).all() and (np.diff(proxies) < 0).all()
    assert 0 < network[-1] < 1e-3 * 3e-3 and proxies[-1] == pytest.approx(network[-1] / 3e-3 * 1e-2)
    training.set_rates(0.0)
    assert [group["lr"] for group in training.optimizer.param_groups] == [3e-3, 1e-2]
    training.set_rates(0.5)
    assert [group["lr"] for group in training.optimizer.param_groups] == pytest.approx([1.5e-3, 5e-3])


def test_a_loss_that_is_no_number_stops_training_with_the_epoch_at_fault():
    seen = []

    def batches(epoch):
        made = Epochs()(epoch)
        return [(items * math.nan, labels) for items, labels in made] if epoch == 1 else made

    with pytest.raises(Diverged, match=r"diverged in epoch 1: .* last good state is that of epoch 0") as error:
        fit(start_training(), batches, refresh, lambda training: seen.append(training.epoch))
    assert error.value.epoch == 1 and seen == [1]


@pytest.mark.parametrize(("epoch", "checkpoint"), [(0, None), (3, None), (3, "runs/checkpoint_2")])
def test_divergence_survives_pickling(epoch, checkpoint):
    error = Diverged(epoch, checkpoint)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert isinstance(again, Diverged) and isinstance(again, GslError)
    assert again.epoch == epoch and str(again) == str(error)
    assert "-1" not in str(again) and (checkpoint or "") in str(again)


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError, match=r"warmup_epochs \(4\) must be fewer than epochs \(4\)"):
        FitConfig(epochs=4, warmup_epochs=4)


def test_embed_equals_the_encoder_in_evaluation_and_leaves_its_mode():
    encoder = Encoder(nn.Sequential(nn.Linear(12, DIM), nn.Dropout(0.5)), DIM, normalize=True)
    items = make_set()[0]
    with torch.no_grad():
        wanted = encoder.eval()(items)
    for training in (True, False):
        encoder.train(training)
        given = embed(encoder, items, batch_rows=100)
        torch.testing.assert_close(given, wanted)
        assert encoder.training == training and not given.requires_grad and not given.is_inference()


def test_views_are_what_training_sees_one_whole_set_after_another():
    encoder = Encoder(nn.Sequential(nn.Linear(12, DIM), nn.Dropout(0.5)), DIM, normalize=False).eval()
    items = make_set()[0]
    views = embed(encoder, items, batch_rows=100, views=200).unflatten(0, (200, len(items)))
    assert not torch.equal(views[0], views[1]) and not encoder.training
    # Dropout keeps the mean: of enough views it is the row itself.
    torch.testing.assert_close(views.mean(0), embed(encoder, items), atol=0.35, rtol=0.35)


def test_without_a_process_group_rows_are_gathered_from_here_alone():
    y = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    assert gather_rows(y) is y


def join_group(rank, folder, work):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        torch.save(work(rank), f"{folder}/rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_pair(folder, work):
    """Run `work(rank)` in a group of two processes and give what each gave."""
    torch.multiprocessing.spawn(join_group, (str(folder), work), nprocs=2)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


def train_pair(rank):
    """Everything that is claimed of two workers, in one group: starting processes is what takes the time."""
    given = {}
    for loss in LOSSES:
        training = start_training(loss=loss)
        fit(training, Epochs(rank, 2), refresh)
        given[loss] = {
            "weights": flatten_weights(training),
            "grads": flatten_grads(training),
            "losses": [record.loss for record in training.history],
            "books": torch.tensor(training.codebook.books),
        }
    y = torch.arange(6.0).reshape(3, 2).add(10 * rank).requires_grad_()
    gathered = gather_rows(y)
    (gathered * torch.arange(12.0).reshape(6, 2)).sum().backward()
    return given | {"gathered": gathered.detach(), "grad": y.grad, "labels": gather_rows(torch.tensor([rank, 5]))}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return run_pair(tmp_path_factory.mktemp("pair"), train_pair)


@pytest.mark.parametrize("loss", LOSSES)
def test_two_workers_train_the_network_that_one_trains(pair, loss):
    alone = train(loss=loss)
    for given in pair:
        torch.testing.assert_close(given[loss]["weights"], flatten_weights(alone), atol=1e-5, rtol=0)
        torch.testing.assert_close(given[loss]["grads"], flatten_grads(alone), atol=1e-5, rtol=1e-3)
        assert given[loss]["losses"] == pytest.approx([record.loss for record in alone.history], abs=1e-5)
        torch.testing.assert_close(given[loss]["books"], torch.tensor(alone.codebook.books), atol=1e-4, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_both_workers_hold_the_same_weights_to_the_last_bit(pair, loss):
    assert torch.equal(pair[0][loss]["weights"], pair[1][loss]["weights"])


def test_rows_are_gathered_in_the_order_of_the_ranks_and_gradients_come_back(pair):
    first = torch.arange(6.0).reshape(3, 2)
    for rank, given in enumerate(pair):
        assert torch.equal(given["gathered"], torch.cat([first, first + 10]))
        assert given["grad"].tolist() == torch.arange(12.0).reshape(6, 2)[3 * rank :][:3].tolist()
        assert given["labels"].tolist() == [0, 5, 1, 5]
