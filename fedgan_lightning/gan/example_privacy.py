"""Example-level differential privacy inside a client: DP-SGD on the discriminator."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal

from torch import nn

from fedgan_lightning.dp.accounting import Accountant, Release, check_accountant, check_target, refused
from fedgan_lightning.dp.randomness import SecretStream, new_key
from fedgan_lightning.errors import ConfigurationError
from fedgan_lightning.gan.augment import Augmentation
from fedgan_lightning.gan.penalties import Penalty
from fedgan_lightning.gan.steps import shares_passes
from fedgan_lightning.options import checked

#: Probability of a sample that is larger than the rows of a minibatch, at most: a million steps at epsilon 20 change
#: delta by 1e-10 then, so that such samples need no accountant of their own.
NEVER = 1e-25
#: Layers that two passes know the gradients of.
TWO_PASS_LAYERS = (nn.Linear, nn.Embedding)


class ExampleLevelPrivacy:
    """Hides every single record of a client: the discriminator learns of real samples through noised gradients alone.

    A minibatch holds every record on its own with probability q = B / N_k. For each record i of it the gradient g_i of
    the discriminator's loss on that real sample, its penalties included, is cut to g_i min(1, C / |g_i|); the step uses
    (sum_i of these + N(0, (z C)^2)) / B, plus the gradient on generated samples, which holds no data. The generator
    sees data through the discriminator alone, and costs nothing. More discriminator steps per generator step
    (``model.d_steps``) are what a private GAN needs most (Bie, Kamath, Zhang 2023).

    Source: Abadi et al. 2016, algorithm 1; the order of clipping and the split of the loss as in Bie et al. 2023.

    Args:
        clip: The bound C on a record's gradient, > 0.
        batch_size: B: expected records of a minibatch, and what every sum is divided by; the same at all clients.
        noise_multiplier: z: the noise's standard deviation over C. Exactly one of it and ``epsilon`` is given.
        epsilon: What all steps together may cost the client that pays most; z is calibrated to it.
        budget: With ``noise_multiplier``: the run ends before a round that would bring epsilon above it.
        delta: Probability with which the guarantee may fail; below one over the number of a client's records.
        capacity: Rows of a minibatch: samples that are larger are cut, which is accounted for; default so many that
            none ever is (one in 10^25).
        clipping: ``exact`` keeps a gradient for every record; ``two_pass`` computes its norm from activations (linear
            layers and embeddings, no penalties on real samples), in a fraction of time and memory.
        chunk_size: Records whose gradients are kept at a time.
        accountant: ``pld``, or ``rdp``, which is looser.
        public_test_data: Whether the data that metrics compare with are public, so that a checkpoint may be chosen by
            them.
        testing_seed: Makes noise and minibatches repeatable. Then nothing is private, and every output says so.

    Raises:
        ConfigurationError: If options contradict each other.
    """

    @checked(
        "model.privacy",
        clip="(0, inf)",
        batch_size="[1, inf)",
        noise_multiplier="[0, inf)",
        epsilon="(0, inf)",
        budget="(0, inf)",
        delta="(0, 1)",
        capacity="[1, inf)",
        chunk_size="[1, inf)",
        testing_seed="[0, inf)",
    )
    def __init__(
        self,
        *,
        clip: float = 1.0,
        batch_size: int = 64,
        noise_multiplier: float | None = None,
        epsilon: float | None = None,
        budget: float | None = None,
        delta: float = 1e-5,
        capacity: int | None = None,
        clipping: Literal["exact", "two_pass"] = "exact",
        chunk_size: int = 16,
        accountant: Literal["pld", "rdp", "gdp"] = "pld",
        public_test_data: bool = False,
        testing_seed: int | None = None,
    ) -> None:
        check_accountant(accountant)
        check_target(noise_multiplier, epsilon, budget, where="model.privacy")
        self.clip, self.batch_size, self.noise_multiplier, self.epsilon = clip, batch_size, noise_multiplier, epsilon
        self.budget, self.delta, self.capacity, self.clipping = budget, delta, capacity, clipping
        self.chunk_size, self.public_test_data, self.testing_seed = chunk_size, public_test_data, testing_seed
        self.accountant: Accountant = accountant  # type: ignore[assignment] # gdp is refused above
        #: z, once it is known: calibration needs the number of all steps.
        self.noise: float | None = noise_multiplier

    @property
    def rows(self) -> int:
        """Rows of a minibatch: records, and what fills up."""
        if self.capacity is not None:
            return self.capacity
        return _room_for(self.batch_size)

    def rate(self, num_examples: int) -> float:
        """Return q = B / N_k, at most 1."""
        return min(1.0, self.batch_size / num_examples)

    def release(self, num_examples: int, *, noise_multiplier: float, count: int = 1) -> Release:
        """Return what ``count`` steps of the discriminator release of a client with so many records."""
        rate, rows = self.rate(num_examples), self.rows
        common: dict[str, Any] = {"unit": "example", "noise_multiplier": noise_multiplier, "count": count}
        common |= {"rate": rate, "clip": float(self.clip)}
        if _exceeds(rows, num_examples, rate) <= NEVER:
            return Release(sampling="poisson" if rate < 1 else "all", **common)
        return Release(sampling="truncated_poisson", population=num_examples, most=rows, **common)

    def stream(self, *purpose: object) -> SecretStream:
        """Return a stream of random numbers for a purpose; for tests the same one for the same purpose."""
        return SecretStream(new_key(self.testing_seed, "example", *purpose))

    def for_trial(self) -> ExampleLevelPrivacy:
        """Return the same with repeatable noise, for a trial of which nothing is released."""
        found = ExampleLevelPrivacy.__new__(ExampleLevelPrivacy)
        vars(found).update(vars(self), testing_seed=0)
        return found


def check_gan(gan: Any) -> None:
    """Refuse a GAN in which one record's gradient is not its own, or data reach the generator in another way.

    Raises:
        ConfigurationError: If it is one; names the option and the fix.
    """
    privacy: ExampleLevelPrivacy = gan.privacy
    mixes = "example-level privacy needs a gradient for every record; {} mixes records"
    reals = "under example-level privacy the generator must see no real samples and no labels of them"
    augment, norms = gan.augment, shares_passes(gan.discriminator)
    on_reals = [each for each in gan.penalties if not each.on_fake]
    own_call = [each for each in gan.penalties if type(each).__call__ is not Penalty.__call__]
    discriminator = type(gan.discriminator).__name__
    two_pass = privacy.clipping == "two_pass"
    cases: list[tuple[bool, str, object, str]] = [
        (
            not norms,
            mixes.format("a layer or pass of the discriminator (BatchNorm, spectral norm, dropout, minibatch-stddev)"),
            discriminator,
            "set the discriminator's norm to group or none, and per_sample = True on one of your own",
        ),
        (gan.loss.pairs_real, mixes.format(type(gan.loss).__name__), type(gan.loss).__name__, "use NonSaturating"),
        (
            augment is not None and augment.probability is not None,
            mixes.format(f"the probability of {type(augment).__name__}"),
            type(augment).__name__,
            "set model.augment to null, or DiffAugment",
        ),
        (
            augment is not None
            and type(augment).transform is not Augmentation.transform
            and augment.probability is None
            and not _is_ours(augment),
            mixes.format(type(augment).__name__),
            type(augment).__name__,
            "set model.augment to null",
        ),
        (gan.anchor is not None, mixes.format(type(gan.anchor).__name__), "LeCam", "set model.anchor to null"),
        (gan.condition is not None, reals, type(gan.condition).__name__, "set model.condition to null"),
        (
            bool(gan.num_classes) and gan.fake_labels != "all",
            reals,
            f"fake_labels={gan.fake_labels}",
            "set model.fake_labels to all: labels to generate are drawn uniformly from all classes",
        ),
        (
            gan.updates == "simultaneous",
            "a private discriminator must step before its generator",
            "updates=simultaneous",
            "set model.updates to alternating",
        ),
        (
            two_pass and bool(on_reals),
            "clipping in two passes knows no penalties on real samples",
            type(on_reals[0]).__name__ if on_reals else "",
            "set model.privacy.clipping to exact",
        ),
        (
            bool(own_call),
            mixes.format("a penalty with a __call__ of its own"),
            _names(own_call),
            "override points and value",
        ),
        (
            two_pass and bool(_unknown_layers(gan.discriminator)),
            "clipping in two passes knows linear layers and embeddings alone",
            ", ".join(_unknown_layers(gan.discriminator)),
            "set model.privacy.clipping to exact",
        ),
    ]
    for is_wrong, rule, received, fix in cases:
        if is_wrong:
            raise refused(rule, received, fix)


@lru_cache
def _room_for(batch_size: int) -> int:
    """Return the rows that no sample of so many expected records exceeds."""
    from scipy.stats import poisson

    rows = 2 * batch_size
    while poisson.sf(rows, batch_size) > NEVER:  # which bounds the binomial's: samples without replacement vary less
        rows += 1
    return rows


@lru_cache
def _exceeds(rows: int, num_examples: int, rate: float) -> float:
    """Return how likely a sample is that is larger than so many rows."""
    from scipy.stats import binom

    return float(binom.sf(rows, num_examples, rate))


def alone() -> ConfigurationError:
    """Return what is said to a private GAN that is trained by itself."""
    return refused(
        "example-level privacy must draw every minibatch itself, and count what it releases",
        "a GAN with privacy in a Trainer without a federation",
        "train a ServerModule with a FederatedOrchestrator; a single client with all data is one",
    )


def _is_ours(augment: Augmentation) -> bool:
    return type(augment).__module__.startswith("fedgan_lightning.")


def _names(values: Iterable[object]) -> str:
    return ", ".join(type(value).__name__ for value in values)


def _unknown_layers(network: nn.Module) -> list[str]:
    """Return the kinds of layers with parameters that two passes do not know."""
    layers = [layer for layer in network.modules() if list(layer.parameters(recurse=False))]
    return sorted({type(layer).__name__ for layer in layers if type(layer) not in TWO_PASS_LAYERS})
