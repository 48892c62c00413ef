"""Training by stages: each a whole schedule with a new optimizer, resumed anywhere, and the same on two workers."""

import io

import numpy as np
import pytest
import torch
import torch.distributed as dist

from gsl_dist.config import check_config
from gsl_dist.encoders import MlpConfig, Progression, make_encoder
from gsl_dist.encoders.lowbit import IncrementalConfig, StochasticConfig, export_weights
from gsl_dist.fit import FitConfig, Training, embed, fit
from gsl_dist.losses import ProxyConfig, make_loss
from gsl_dist.quantizers import LloydConfig, ProductConfig, make_quantizer, train_codebook
from gsl_dist.sampling import plan_epoch
from gsl_dist.snap import SnapConfig, SnappingLayer

DIM, CLASSES, ROWS = 8, 4, 256
STOCHASTIC = {"kind": "ternary", "ratios": [0.5, 0.75, 1.0]}
INCREMENTAL = {"kind": "power", "bits": 4, "ratios": [0.5, 0.75, 1.0], "epochs": 2}
METHODS = {"stochastic": STOCHASTIC, "incremental": INCREMENTAL}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def make_set():
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES, size=ROWS)
    x = 2 * rng.normal(size=(CLASSES, 12))[labels] + rng.normal(size=(ROWS, 12))
    return torch.tensor(x, dtype=torch.float32), torch.tensor(labels)


def start_training(lowbit, *, seed=0, **settings):
    torch.manual_seed(seed)
    config = FitConfig(**{"epochs": 2, "warmup_epochs": 1, "batch_size": 64, "learning_rate": 1e-2} | settings)
    encoder = make_encoder(MlpConfig(kind="mlp", dim=DIM, hidden=(16,)), (12,))
    progression = None
    if lowbit:
        kind = IncrementalConfig if lowbit["kind"] == "power" else StochasticConfig
        progression = Progression(encoder, check_config(kind, lowbit), seed=0)
    loss = make_loss(ProxyConfig(kind="proxy"), classes=CLASSES, dim=DIM)
    return Training(encoder, loss, SnappingLayer(SnapConfig()), config, progression=progression)


def give_batches(epoch, rank=0, workers=1):
    items, labels = make_set()
    steps = torch.tensor(np.split(plan_epoch(labels.numpy(), 64, seed=0, epoch=epoch), workers, axis=1)[rank])
    return [(items[rows], labels[rows]) for rows in steps]


def refresh(training):
    quantizer = make_quantizer(ProductConfig(sub_vectors=2, bits=4, cells=3), DIM)
    lloyd = LloydConfig(iterations=4, refresh_iterations=2)
    return train_codebook(embed(training.encoder, make_set()[0]), quantizer, lloyd, seed=0, start=training.codebook)


def train(training, on_epoch=lambda training: None):
    fit(training, give_batches, refresh, on_epoch)
    return training


def write_state(training):
    buffer = io.BytesIO()
    torch.save(training.state(), buffer)
    return buffer.getvalue()


def read_state(content):
    return torch.load(io.BytesIO(content), weights_only=True)


def weights_of(training):
    return {name: tensor.clone() for name, tensor in training.encoder.state_dict().items()}


def test_history_tells_stage_and_ratio_of_every_epoch():
    history = train(start_training(INCREMENTAL)).history
    stages = [(1, 0.0), (1, 0.0), (2, 0.5), (2, 0.5), (3, 0.75), (3, 0.75)]
    assert [(record.stage, record.ratio) for record in history] == stages
    assert [record.phase for record in history] == ["warm-up"] + ["snap"] * 5
    assert {(record.stage, record.ratio) for record in train(start_training(None)).history} == {(None, None)}


@every_method
def test_a_low_bit_network_learns_and_lands_on_the_codebook_of_what_it_gives(method):
    training = train(start_training(method, epochs=6))
    assert training.history[-1].loss < 0.6 * training.history[0].loss
    settled = refresh(training)
    assert settled.relative_error < 0.3 and training.codebook is not None
    assert any(name.endswith(".codes") for name in export_weights(training.encoder)[0])


def test_every_stage_runs_the_whole_schedule_with_a_new_optimizer():
    training, seen = start_training(STOCHASTIC, epochs=4), []
    set_rates = training.set_rates

    def watch(step):
        set_rates(step)
        first = training.optimizer.param_groups[0]["params"][0]
        seen.append((step, len(training.optimizer.state.get(first, {}))))

    training.set_rates = watch
    train(training)
    places = [step for step, _ in seen]
    assert len(places) == 3 * 4 * 4 and places == places[:16] * 3 and places[:16] == [step / 16 for step in range(16)]
    assert [place for place, (_, known) in enumerate(seen) if not known] == [0, 16, 32]


@every_method
@pytest.mark.parametrize("done", range(1, 7))
def test_a_training_resumed_after_any_epoch_ends_as_the_undisturbed_one(method, done):
    states = []
    whole = train(start_training(method), lambda training: states.append(write_state(training)))
    resumed = start_training(method, seed=7)
    resumed.load_state(read_state(states[done - 1]))
    if done == len(states):
        embed(resumed.encoder, make_set()[0])  # finished: it may be looked at before anything else is done
    train(resumed)
    wanted, given = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(wanted[name], given[name]) for name in wanted)
    assert resumed.codebook.fingerprint == whole.codebook.fingerprint and resumed.history == whole.history


def test_a_control_of_one_stage_is_plain_training_and_one_of_three_takes_three_times_its_steps():
    plain, control = (train(start_training(lowbit)) for lowbit in (None, STOCHASTIC | {"ratios": [1], "control": True}))
    wanted, given = weights_of(plain), export_weights(control.encoder)
    assert given[1] == {} and set(given[0]) == set(wanted)
    assert all(torch.equal(given[0][name], wanted[name]) for name in wanted)
    longer = train(start_training(STOCHASTIC | {"control": True}))
    assert longer.epoch == 3 * control.epoch and not export_weights(longer.encoder)[1]


def watch_steps(training):
    """Give a list that gets, of every step, its epoch and which weights of the first layer are quantized in it."""
    layer, seen = training.encoder.backbone[1], []

    def note(encoder, given):
        if torch.is_grad_enabled():
            seen.append((training.epoch, layer.weight != layer.parametrizations["weight"].original))

    training.encoder.register_forward_pre_hook(note)
    return seen


def test_the_codebook_is_refitted_to_the_network_as_its_next_step_has_it():
    training, looked = start_training(STOCHASTIC), {}
    steps, layer = watch_steps(training), training.encoder.backbone[1]

    def note(training):
        looked[training.epoch] = layer.weight != layer.parametrizations["weight"].original
        return refresh(training)

    fit(training, give_batches, note)
    first = {epoch: mask for epoch, mask in reversed(steps)}
    assert set(looked) == {1, 2, 3, 4, 5, 6} and 0 < looked[1].sum() < looked[1].numel()
    assert all(torch.equal(looked[epoch], first[epoch]) for epoch in range(1, 6))
    assert looked[6].float().mean() > 0.9


def join_group(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        given = {}
        for kind, method in METHODS.items():
            training = start_training(method)
            steps = watch_steps(training)
            fit(training, lambda epoch: give_batches(epoch, rank, 2), refresh)
            given[kind] = {"masks": torch.stack([mask for _, mask in steps]), "weights": weights_of(training)}
        torch.save(given, f"{folder}/rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    torch.multiprocessing.spawn(join_group, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_workers_draw_the_same_in_every_step(pair):
    one, two = (given["stochastic"]["masks"] for given in pair)
    assert torch.equal(one, two) and len(one) == 24
    # 16 filters: 8, 12 and 16 of them, others in every step but of the last stage.
    assert one.any(2).sum(1).tolist() == [8] * 8 + [12] * 8 + [16] * 8
    assert len({tuple(mask.any(1).tolist()) for mask in one[:16]}) > 12


@pytest.mark.parametrize("kind", METHODS)
def test_two_workers_train_the_low_bit_network_that_one_trains(pair, kind):
    one, two = (given[kind]["weights"] for given in pair)
    assert all(torch.equal(one[name], two[name]) for name in one)
    alone = weights_of(train(start_training(METHODS[kind])))
    for name in one:
        torch.testing.assert_close(one[name].float(), alone[name].float(), atol=1e-4, rtol=0)
