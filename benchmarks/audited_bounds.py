"""What audits find of private runs, beside what the accountant says of them: lower bounds must stay below it.

    python -m benchmarks.audited_bounds                         # both parts, then the table
    python -m benchmarks.audited_bounds --parts clients --noise 1 --seeds 0 1 2

Clients: a ring in which canary clients, in or out by a coin each, send random updates of length C in place of their
own; the orchestrator clips, sums and adds noise as ever. Records: digits at one client, with canary records in or out
by a coin. Canaries are guessed from what is released (Steinke et al. 2023: a lower bound, which may be wrong with
probability .05 a row); those of clients give an estimate too (Andrew et al. 2023), which is no bound. Noise is secret:
figures differ from run to run.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, softplus

from benchmarks.bare import bare_trainer
from fedgan_lightning import (
    GAN,
    FederatedDataModule,
    FederatedOrchestrator,
    SequentialExecutor,
    ServerModule,
    VectorizedExecutor,
)
from fedgan_lightning.aggregators import WeightedMean
from fedgan_lightning.algorithms import FedGAN, ServedGenerator
from fedgan_lightning.dp.audits.scores import logit_score, update_score
from fedgan_lightning.dp.audits.statistics import one_run_guesses
from fedgan_lightning.losses import R1
from fedgan_lightning.networks import MLPDiscriminator, MLPGenerator
from fedgan_lightning.packing import Packed
from fedgan_lightning.partitions import ClassesPerClient
from fedgan_lightning.privacy import ClientLevelPrivacy, ExampleLevelPrivacy, canary_estimate, one_run_bound
from fedgan_lightning.protocol import ClientTask, ClientUpdate
from fedgan_lightning.provenance import described
from fedgan_lightning.samplers import AllClients, PoissonSampling
from fedgan_lightning.seeding import make_generator
from fedgan_lightning.sources import Digits, Ring, Samples, Source

DELTA = 1e-4
#: Canaries, and guesses: a tenth of them, fixed before anything is seen.
CANARIES, GUESSES = 1000, 100
#: Learning rate of the discriminator of digits.
RATE = 0.1


@dataclass(frozen=True)
class Found:
    """What an audit of a run found.

    Attributes:
        attack: What was audited, and how canaries were scored.
        epsilon: The accountant's, at :data:`DELTA`.
        right: Right ones of :data:`GUESSES` guesses.
        estimate: From canary clients; ``None`` for records.
    """

    attack: str
    epsilon: float
    right: int
    estimate: float | None = None

    def row(self, *, noise: float, seed: int, seconds: float) -> str:
        """Return a row of the table."""
        bound = one_run_bound(num_canaries=CANARIES, guesses=GUESSES, right=self.right, delta=DELTA)
        estimate = "" if self.estimate is None else f"{self.estimate:.3g}"
        holds = "yes" if bound <= self.epsilon else "NO"
        known = f"{self.right}/{GUESSES} | {bound:.3g} | {self.epsilon:.4g} | {holds} | {estimate} | {seconds:.0f}"
        return f"| {self.attack} | {noise:g} | {seed} | {known} |"


# ---------------------------------------------------------------------- clients


class CanaryClients(VectorizedExecutor):
    """Clients as they are, but for canaries, which send what they are given.

    Args:
        updates: By client, an update of the discriminator as one vector.
        shapes: Shapes of the discriminator's parameters by name, in the order of that vector.
    """

    def __init__(self, updates: dict[int, Tensor], shapes: dict[str, torch.Size]) -> None:
        super().__init__(chunk_size=100)
        self.updates, self.shapes = updates, shapes

    def run(self, tasks: Iterable[ClientTask]) -> Iterator[ClientUpdate]:
        for own in super().run(tasks):
            if own.client_id not in self.updates:
                yield own
                continue
            parts = self.updates[own.client_id].split([shape.numel() for shape in self.shapes.values()])
            delta = {name: part.reshape(shape) for (name, shape), part in zip(self.shapes.items(), parts)}
            yield dataclasses.replace(own, delta=Packed.of({name: delta[name] for name in own.delta}))


class WatchedServer(ServedGenerator):
    """Keeps every total that is released, as one vector."""

    def __init__(self, names: list[str], **options: int) -> None:
        super().__init__(**options)
        self.names, self.released = names, []  # type: ignore[var-annotated]

    def server_step(self, server: ServerModule, total: Any) -> None:
        self.released.append(torch.cat([total.delta[name].detach().flatten() for name in self.names]))
        super().server_step(server, total)


def audit_clients(*, noise: float, seed: int, rounds: int, rate: float | None) -> list[Found]:
    """Train a ring with canary clients, and guess which of them were there.

    Args:
        noise: z.
        seed: Of coins, canaries and data; the noise follows from nothing.
        rounds: T.
        rate: Of Poisson sampling; ``None`` asks everybody in every round.
    """
    torch.manual_seed(seed)
    hidden, honest, clip = (128, 128), 100, 0.05  # more honest clients than that drown single canaries without noise
    gan = GAN(
        MLPGenerator(16, (2,), hidden=(64, 64), output="linear"),
        MLPDiscriminator((2,), hidden=hidden),
        penalties=[R1(0.1)],
        generator_optimizer=partial(torch.optim.Adam, lr=1e-3, betas=(0.5, 0.9)),
        discriminator_optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    shapes = {f"discriminator.{name}": value.shape for name, value in gan.discriminator.named_parameters()}
    dimension = sum(shape.numel() for shape in shapes.values())
    coins = make_generator(seed, "coins")
    canaries = torch.randn(CANARIES, dimension, generator=coins)
    canaries *= clip / canaries.norm(dim=1, keepdim=True)
    is_in = torch.rand(CANARIES, generator=coins) < 0.5
    sent = {honest + place: canaries[own] for place, own in enumerate(is_in.nonzero().flatten().tolist())}
    count = honest + len(sent)
    data = FederatedDataModule(
        Ring(modes=8, sigma=0.05, scale=1.0, num_samples=10 * count),
        partition=ClassesPerClient(1),
        num_clients=count,
        batch_size=10,
    )
    watched = WatchedServer(list(shapes), generator_steps=4, num_samples=256)
    orchestrator = FederatedOrchestrator(
        rounds=rounds,
        local_steps=1,
        algorithm=watched,
        sync={"generator": "served"},
        optimizer_state="reset",
        aggregator=WeightedMean("uniform"),
        clients=AllClients() if rate is None else PoissonSampling(rate, secret=True),
        privacy=ClientLevelPrivacy(clip=clip, noise_multiplier=noise, delta=DELTA),
        executor=CanaryClients(sent, shapes),
    )
    _fit(orchestrator, gan, data)
    everything = torch.stack(watched.released).double().sum(0)
    cosines = cosine_similarity(canaries.double(), everything.unsqueeze(0))
    guessed = one_run_guesses(cosines, is_in, guesses=GUESSES, seed=seed)
    estimate = canary_estimate(cosines[is_in], dimension=dimension, delta=DELTA)
    how = "everybody" if rate is None else f"q = {rate:g}"
    return [Found(f"clients, {rounds} round(s), {how}", _spent(orchestrator, "client"), guessed.right, estimate)]


# ---------------------------------------------------------------------- records


class Planted(Source):
    """Digits with canaries among them.

    Args:
        samples: All that is there.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples, self.sample_shape = samples, tuple(samples.x.shape[1:])
        self.class_names = tuple(str(label) for label in range(10))

    def load(self, split: str) -> Samples:
        return self.samples


class WatchedClient(FedGAN):
    """Keeps the discriminator of every round, and what its update holds beside the part of generated samples.

    Whoever sees updates has the generator, too, and subtracts that part, which otherwise hides canaries.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rounds: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def server_step(self, server: ServerModule, total: Any) -> None:
        gan: Any = server.model
        fakes, labels = gan.sample(500, raw=True), torch.arange(500) % gan.num_classes
        known = dict(gan.discriminator.named_parameters())
        loss = softplus(gan.discriminator(fakes, labels)).mean()
        gradients = dict(zip(known, torch.autograd.grad(loss, list(known.values()))))
        before = {name: value.detach().clone() for name, value in gan.discriminator.state_dict().items()}
        # Of the first layer alone: only there have records directions of their own.
        first = next(name for name, value in known.items() if value.dim() == 2 and value.shape[1] == fakes[0].numel())
        moved = {first: total.delta[f"discriminator.{first}"] + RATE * gradients[first]}
        self.rounds.append((before, moved))
        super().server_step(server, total)


def audit_records(*, noise: float, seed: int, rounds: int, kind: str) -> list[Found]:
    """Train on digits at one client with canary records, and guess which of them were there.

    Args:
        noise: z.
        seed: Of coins, canaries and networks; noise and minibatches follow from nothing.
        rounds: Steps of the discriminator.
        kind: ``digits``: canaries are records as they are; ``random pixels``: nothing like them.
    """
    torch.manual_seed(seed)
    coins = make_generator(seed, "coins")
    loaded = Digits().load("train")
    x, y = loaded.x.float() / 127.5 - 1, loaded.y
    assert y is not None
    # Each pixel a block: with so many of them random canaries are nearly orthogonal.
    x = x.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    order = torch.randperm(len(x), generator=coins)
    x, y = x[order], y[order]
    if kind == "digits":
        canaries, rest = (x[:CANARIES], y[:CANARIES]), (x[CANARIES:], y[CANARIES:])
    else:
        # As much white as black in every block that is one pixel of a digit: nothing else lies in their directions.
        blocks = 2.0 * (torch.rand(CANARIES, 1, 8, 8, 16, generator=coins).argsort(-1) < 8) - 1
        pixels = blocks.unflatten(-1, (4, 4)).transpose(3, 4).reshape(CANARIES, 1, 32, 32)
        canaries, rest = (pixels, torch.randint(10, (CANARIES,), generator=coins)), (x, y)
    is_in = torch.rand(CANARIES, generator=coins) < 0.5
    held = [torch.cat([of_rest, own[is_in]]) for of_rest, own in zip(rest, canaries)]
    data = FederatedDataModule(Planted(Samples(held[0], held[1])), num_clients=1, batch_size=128)
    gan = GAN(
        MLPGenerator(32, (1, 32, 32), hidden=(128, 128), num_classes=10),
        MLPDiscriminator((1, 32, 32), hidden=(64, 64), num_classes=10, conditioning="projection"),
        generator_optimizer=partial(torch.optim.Adam, lr=1e-3, betas=(0.5, 0.999)),
        discriminator_optimizer=partial(torch.optim.SGD, lr=RATE),
        fake_labels="all",
        privacy=ExampleLevelPrivacy(clip=1.0, batch_size=128, noise_multiplier=noise, delta=DELTA, clipping="two_pass"),
    )
    watched = WatchedClient()
    orchestrator = FederatedOrchestrator(
        rounds=rounds, local_steps=1, optimizer_state="average", algorithm=watched, executor=SequentialExecutor()
    )
    _fit(orchestrator, gan, data)
    epsilon = _spent(orchestrator, "example")
    scores = {
        "last logit": logit_score(gan.discriminator),
        "all updates": update_score(gan.discriminator, watched.rounds, measure="product"),
    }
    found = []
    for name, score in scores.items():
        guessed = one_run_guesses(score(*canaries).cpu(), is_in, guesses=GUESSES, seed=seed)
        found.append(Found(f"records, {rounds} steps, {kind}, {name}", epsilon, guessed.right))
    return found


def _fit(orchestrator: FederatedOrchestrator, gan: GAN, data: FederatedDataModule) -> None:
    """Train, with a ledger of its own: one that is found is added to."""
    with tempfile.TemporaryDirectory() as folder:
        bare_trainer(orchestrator, default_root_dir=folder).fit(ServerModule(gan), datamodule=data)


def _spent(orchestrator: FederatedOrchestrator, unit: str) -> float:
    """Return the accountant's epsilon of what the run released."""
    assert orchestrator.keeper is not None
    found = [own for own in orchestrator.keeper.guarantees() if own.release.unit == unit]
    return float(found[0].epsilon)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["clients", "records"], choices=["clients", "records"])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0], help="noise multipliers z")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=20, help="rounds of a ring with sampled cohorts")
    parser.add_argument("--steps", type=int, default=100, help="steps of the discriminator of digits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{described()}\n\nm = {CANARIES}, r = {GUESSES}, delta = {DELTA:g}, p = .05\n")
    print("| canaries | z | seed | right | lower bound | accountant | holds | estimate | s |")
    print("|---" * 9 + "|")
    runs: list[Any] = []
    if "clients" in options.parts:
        runs += [partial(audit_clients, rounds=1, rate=None), partial(audit_clients, rounds=options.rounds, rate=0.2)]
    if "records" in options.parts:
        runs += [partial(audit_records, rounds=options.steps, kind=kind) for kind in ("digits", "random pixels")]
    for run in runs:
        for noise in options.noise:
            for seed in options.seeds:
                started = time.perf_counter()
                for found in run(noise=noise, seed=seed):
                    row = found.row(noise=noise, seed=seed, seconds=time.perf_counter() - started)
                    print(row, flush=True)


if __name__ == "__main__":
    main()
