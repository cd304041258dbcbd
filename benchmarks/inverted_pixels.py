"""Finding a bug in users' data without looking: generated samples show inverted pixels (Augenstein et al. 2020).

    python -m benchmarks.inverted_pixels --root FOLDER_OF_MNIST
    python -m benchmarks.inverted_pixels --root FOLDER_OF_MNIST --users 6000 --noise 1 --scale-up 1

The images of MNIST's training split are dealt to users; a bug inverts all images of a user with probability p. A first
classifier, trained before the bug on images that no user holds, is wrong on inverted images, so that the users on whose
images it does worst are mostly inverted. GAN A is trained on the quarter of users with the highest accuracy, GAN B on
that with the lowest; clients train the discriminator, and the server the generator, with and without client-level
privacy. Scored is the share of samples whose mean pixel has the sign of inverted images. Expected for p = .5: A below
.05, B above .8; for p = 0 no difference.

Few users drown in the noise that hides one of them. Like the paper, the run with noise is that of a cohort cut to what
two cores train, with the noise on the mean that a population ``--scale-up`` times as large would have. Epsilon is given
for both: for the users of this run, and for such a population.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.bare import bare_trainer
from fedgan_lightning import GAN, FederatedDataModule, FederatedOrchestrator, ServerModule, VectorizedExecutor
from fedgan_lightning.aggregators import WeightedMean
from fedgan_lightning.algorithms import ServedGenerator
from fedgan_lightning.losses import R1
from fedgan_lightning.networks import MLPDiscriminator, MLPGenerator
from fedgan_lightning.partitions import IID
from fedgan_lightning.privacy import ClientLevelPrivacy, Release, epsilon_of
from fedgan_lightning.provenance import described
from fedgan_lightning.samplers import PoissonSampling
from fedgan_lightning.seeding import make_generator
from fedgan_lightning.sources import Samples, Source, TorchvisionImages

SIDE = 14
SAMPLES = 2000


@dataclass(frozen=True)
class Users:
    """Users' images, and what is known of each.

    Attributes:
        x: (users, images, 1, side, side), uint8.
        is_inverted: Whom the bug has met (users,).
        accuracy: The primary classifier's, by user (users,).
    """

    x: Tensor
    is_inverted: Tensor
    accuracy: Tensor

    def group(self, name: str, *, share: float) -> Tensor:
        """Return the users that train a GAN: ``A``, those with the highest accuracy; ``B``, with the lowest."""
        order = self.accuracy.argsort(descending=name == "A", stable=True)
        return order[: int(share * len(order))]


class Held(Source):
    """Images of some users, one after the other.

    Args:
        x: (images, 1, side, side), uint8.
        users: Whose each is (images,).
    """

    def __init__(self, x: Tensor, users: Tensor) -> None:
        self.samples = Samples(x, columns={"user": users.numpy()})
        self.sample_shape = tuple(x.shape[1:])

    def load(self, split: str) -> Samples:
        return self.samples


class ByUser(IID):
    """Every user is a client."""

    def assign(self, samples: Samples, *, num_clients: int, generator: Any) -> list[Any]:
        return [(samples.columns["user"] == user).nonzero()[0] for user in range(num_clients)]


def pixels(x: Tensor) -> Tensor:
    """Return images as the networks see them, in [-1, 1]."""
    return x.float() / 127.5 - 1


def primary_classifier(source: Source, *, seed: int) -> nn.Module:
    """Return a classifier that was trained before the bug, on images that no user holds."""
    torch.manual_seed(seed)
    held = source.load("test")
    assert held.y is not None
    network = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer, order = torch.optim.Adam(network.parameters(), lr=1e-3), make_generator(seed, "classifier")
    x, y = pixels(held.x), held.y
    for _ in range(15):
        for rows in torch.randperm(len(x), generator=order).split(100):
            optimizer.zero_grad()
            cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    return network


def users_of(source: Source, classifier: nn.Module, *, count: int, probability: float, seed: int) -> Users:
    """Deal images to users, let the bug loose, and measure the classifier on each user's images."""
    train = source.load("train")
    assert train.y is not None
    draws = make_generator(seed, "users")
    each = len(train.x) // count
    order = torch.randperm(len(train.x), generator=draws)[: count * each]
    is_inverted = torch.rand(count, generator=draws) < probability
    x, y = train.x[order].reshape(count, each, *train.x.shape[1:]), train.y[order].reshape(count, each)
    x = torch.where(is_inverted.reshape(-1, 1, 1, 1, 1), 255 - x, x)
    with torch.no_grad():
        right = classifier(pixels(x.flatten(0, 1))).argmax(1).reshape(count, each) == y
    return Users(x, is_inverted, right.double().mean(1))


def inverted_share(x: Tensor, options: argparse.Namespace, *, noise: float | None) -> float:
    """Train a GAN on users' images (users, images, ...), and return the share of its samples that are inverted.

    Args:
        x: The images.
        options: Rounds, rate of sampling and seed.
        noise: z of client-level privacy; ``None`` trains without it.
    """
    torch.manual_seed(options.seed)
    shape = tuple(x.shape[2:])
    gan = GAN(
        MLPGenerator(32, shape, hidden=(128, 128)),
        MLPDiscriminator(shape, hidden=(64, 32)),
        penalties=[R1(0.1)],
        generator_optimizer=partial(torch.optim.Adam, lr=1e-3, betas=(0.5, 0.9)),
        discriminator_optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    whose = torch.arange(len(x)).repeat_interleave(x.shape[1])
    data = FederatedDataModule(
        Held(x.flatten(0, 1), whose), partition=ByUser(), num_clients=len(x), batch_size=x.shape[1]
    )
    # The looser accountant: the tight one takes minutes a round for as little noise as a small cohort has.
    privacy = None
    if noise is not None:
        privacy = ClientLevelPrivacy(clip=options.clip, noise_multiplier=noise, accountant="rdp")
    orchestrator = FederatedOrchestrator(
        rounds=options.rounds,
        local_steps=1,
        algorithm=ServedGenerator(generator_steps=4, num_samples=128),
        sync={"generator": "served"},
        optimizer_state="reset",
        aggregator=WeightedMean("uniform"),
        clients=PoissonSampling(options.rate, secret=noise is not None),
        privacy=privacy,
        executor=VectorizedExecutor(chunk_size=100),
    )
    server = ServerModule(gan, optimizer=partial(torch.optim.Adam, lr=3e-3, betas=(0.0, 0.99)))
    with tempfile.TemporaryDirectory() as folder:  # a ledger that lies there is added to
        bare_trainer(orchestrator, default_root_dir=folder).fit(server, datamodule=data)
    samples = gan.sample(SAMPLES, generator=make_generator(options.seed, "samples"))
    return float((samples.flatten(1).mean(1) > 0).double().mean())


def epsilons(options: argparse.Namespace) -> str:
    """Return in words what the noise hides of one of the users, and of one of a larger population."""
    found = []
    for factor in (1, options.scale_up):
        population = int(options.group * options.users) * factor
        delta = population**-1.1
        release = Release("client", "poisson", options.noise * factor, count=options.rounds, rate=options.rate)
        accountant: Any = "pld" if release.noise_multiplier >= 0.5 else "rdp"
        epsilon = epsilon_of([release], delta=delta, accountant=accountant)
        found.append(
            f"{population} users a GAN, z = {release.noise_multiplier:g}: epsilon {epsilon:.4g} at delta {delta:.2g} "
            f"({accountant})"
        )
    return "; with the same noise on the mean, ".join(dict.fromkeys(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of MNIST")
    parser.add_argument("--users", type=int, default=2000, help="users that the images are dealt to")
    parser.add_argument("--group", type=float, default=0.25, help="share of the users that trains each of the two GANs")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--rate", type=float, default=0.2, help="probability of a user in a round")
    parser.add_argument("--clip", type=float, default=0.1, help="bound C on an update")
    parser.add_argument("--noise", type=float, default=0.1, help="noise multiplier z of this run")
    parser.add_argument("--scale-up", type=int, default=20, help="how many times as large the other population is")
    parser.add_argument("--probabilities", type=float, nargs="+", default=[0.0, 0.5], help="of the bug, by user")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = TorchvisionImages("MNIST", options.root, image_size=SIDE)
    classifier = primary_classifier(source, seed=options.seed)
    print(f"{described()}\n\nWith privacy: {epsilons(options)}.\n")
    print("| p | GAN | users inverted | accuracy on them | privacy | samples inverted | s |\n" + "|---" * 7 + "|")
    for probability in options.probabilities:
        users = users_of(source, classifier, count=options.users, probability=probability, seed=options.seed)
        for name in ("A", "B"):
            group = users.group(name, share=options.group)
            low, high = (float(own(users.accuracy[group])) for own in (torch.min, torch.max))
            known = f"| {probability:g} | {name} | {float(users.is_inverted[group].double().mean()):.3f}"
            for noise in (None, options.noise):
                started = time.perf_counter()
                found = inverted_share(users.x[group], options, noise=noise)
                words = "none" if noise is None else f"z = {noise:g}"
                seconds = time.perf_counter() - started
                print(f"{known} | {low:.2f} to {high:.2f} | {words} | {found:.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
