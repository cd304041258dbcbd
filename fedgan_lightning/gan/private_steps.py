"""The discriminator's step under example-level privacy: a clipped gradient for every record, summed, with noise.

The real term of the loss is a mean over records, so that every record has a gradient of its own; the term of generated
samples holds no data, and is differentiated as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedgan_lightning.dp.accounting import refused
from fedgan_lightning.dp.randomness import SecretStream
from fedgan_lightning.gan.augment import Augmentation
from fedgan_lightning.gan.draws import Draws
from fedgan_lightning.gan.example_privacy import TWO_PASS_LAYERS, ExampleLevelPrivacy
from fedgan_lightning.gan.objectives import AdversarialLoss, auxiliary_classifier
from fedgan_lightning.gan.penalties import Penalty, squared_norms
from fedgan_lightning.gan.steps import DuePenalty, mean_probability, split_heads

Tensors = dict[str, Tensor]
#: Statistics that hold no data.
DATA_FREE = ("d_fake", "loss_g")


class PrivateSteps:
    """Private steps of a GAN; part of :class:`~fedgan_lightning.gan.module.GAN`."""

    _noise_streams: Sequence[SecretStream] = ()

    def begin_private_round(self, rounds: Sequence[tuple[int, int]]) -> None:
        """Take new noise for a round of these clients.

        Args:
            rounds: Of every client its number and the round.
        """
        module: Any = self
        self._noise_streams = [module.privacy.stream("noise", client, round) for client, round in rounds]

    def backward_privately(self, optimizer: Any, x: Tensor, y: Tensor) -> None:
        """Leave the gradient of a private step in the discriminator's parameters.

        Args:
            optimizer: The discriminator's.
            x: Rows of a minibatch (rows, ...); with a leading dimension of clients in a stack.
            y: Their labels, -1 where a row fills up.
        """
        module: Any = self
        present, y = y >= 0, y.clamp_min(0)
        due: list[DuePenalty] = module.due_penalties()
        draws: Draws = module.draw(y, dtype=x.dtype, mix=any(penalty.needs_mix for penalty, _ in due))
        generate, draws = module.with_given_fakes(module.generate, draws)
        with torch.no_grad():
            fake = generate(draws.z, draws.y)
        loss, stats = self._on_fakes(fake, draws, due)
        module._backward(optimizer, loss)
        module._means.add(stats, scale=1.0 / module.d_steps)
        sums = self.clipped_sums(x, y, present, fake.to(x.dtype), draws, due)
        privacy: ExampleLevelPrivacy = module.privacy
        if privacy.noise is None:
            raise refused(
                "every client must know the noise multiplier that its steps follow from",
                "model.privacy.epsilon where nobody has calibrated it",
                "set model.privacy.noise_multiplier",
            )
        std = privacy.noise * privacy.clip
        for name, parameter in module.discriminator.named_parameters():
            if name in sums:
                noised = sums[name] + std * self._noise_like(sums[name]) if std else sums[name]
                gradient = (noised / privacy.batch_size).to(parameter.dtype)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _on_fakes(self, fake: Tensor, draws: Draws, due: Sequence[DuePenalty]) -> tuple[Tensor, Tensors]:
        """Return the terms of the discriminator's loss that hold no data."""
        module: Any = self
        logits, classes = split_heads(module.discriminate(fake, draws.y, draws.sides[1]))
        total = module.vmap_over_clients(module.loss.discriminator)(torch.zeros_like(logits), logits)
        if classes is not None:
            total = total + module.auxiliary_weight * module.vmap_over_clients(auxiliary_classifier)(classes, draws.y)
        stats = {"d_fake": module.vmap_over_clients(mean_probability)(logits.detach())}

        def critic(points: Tensor) -> Tensor:
            return split_heads(module.discriminate(points, draws.y, draws.sides[1]))[0]

        for penalty, factor in due:
            if penalty.on_fake:
                with torch.autocast(device_type=fake.device.type, enabled=False):
                    term = penalty(critic, fake, fake, draws.mix, vmap_over_clients=module.vmap_over_clients)
                total = total + (term if factor is None else factor * term)
        return total, stats

    def clipped_sums(
        self,
        x: Tensor,
        y: Tensor,
        present: Tensor,
        fake: Tensor,
        draws: Draws,
        due: Sequence[DuePenalty],
    ) -> Tensors:
        """Return sum_i g_i min(1, C / |g_i|) over the records that are present, by parameter of the discriminator.

        Args:
            x: Rows (rows, ...), or (clients, rows, ...).
            y: Labels (rows,), or (clients, rows).
            present: Which rows are records.
            fake: Generated samples in the shape of ``x``, for penalties between both.
            draws: Mixing weights and numbers of an augmentation.
            due: Penalties of this step.
        """
        module: Any = self
        network: nn.Module = module.discriminator
        parameters = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}
        fixed = {n: p.detach() for n, p in network.named_parameters() if not p.requires_grad}
        fixed |= dict(network.named_buffers())
        on_real = [(penalty, factor) for penalty, factor in due if not penalty.on_fake]
        ones = torch.ones(x.shape[:1] if module.label_dims > 1 else (), device=x.device, dtype=x.dtype)
        factors = [ones if factor is None else factor.to(x.dtype) for _, factor in on_real]
        rows = {"x": x, "y": y, "present": present.to(x.dtype)}
        if on_real:
            rows["fake"] = fake
        if draws.mix is not None:
            rows["mix"] = draws.mix
        if draws.sides[0] is not None:
            rows["u"] = draws.sides[0]
        record = _Record(network, module.loss, module.auxiliary_weight, [each for each, _ in on_real], module.augment)
        clip = module.privacy.clip

        def of_client(parameters: Tensors, fixed: Tensors, rows: Tensors, factors: list[Tensor]) -> Tensors:
            if module.privacy.clipping == "two_pass":
                return two_pass_sum(record, parameters, fixed, rows, clip=clip)
            return exact_sum(record, parameters, fixed, rows, factors, clip=clip)

        size = module.privacy.chunk_size if module.privacy.clipping == "exact" else x.shape[module.label_dims - 1]
        if module.label_dims == 1:  # rows that fill up come last, and need not be computed
            count = int(present.sum())
            rows = {name: value[:count] for name, value in rows.items()}
        mapped: Callable[..., Tensors] = vmap(of_client) if module.label_dims > 1 else of_client
        total = {name: torch.zeros_like(value) for name, value in parameters.items()}
        for chunk in _chunks(rows, size, dim=module.label_dims - 1):
            found = mapped(parameters, fixed, chunk, factors)
            total = {name: value + found[name] for name, value in total.items()}
        return total

    def _noise_like(self, value: Tensor) -> Tensor:
        """Return standard normal numbers; every client of a stack draws its own."""
        module: Any = self
        shape = value.shape[1:] if module.label_dims > 1 else value.shape
        numbers = [torch.from_numpy(stream.normals(shape.numel())).reshape(shape) for stream in self._noise_streams]
        noise = torch.stack(numbers) if module.label_dims > 1 else numbers[0]
        return noise.to(value.device, value.dtype)


class _Record:
    """The terms of the discriminator's loss that one record enters."""

    def __init__(
        self,
        network: nn.Module,
        loss: AdversarialLoss,
        auxiliary_weight: float,
        penalties: Sequence[Penalty],
        augment: Augmentation | None,
    ) -> None:
        self.network, self.loss, self.auxiliary_weight = network, loss, auxiliary_weight
        self.penalties, self.augment = penalties, augment

    def output(self, values: Tensors, x: Tensor, y: Tensor, u: Tensor | None) -> Any:
        """Return what the discriminator says of samples."""
        seen = x if self.augment is None or u is None else self.augment.transform(x, u)
        return functional_call(self.network, values, (seen, y))

    def of_logits(self, output: Any, y: Tensor) -> Tensor:
        """Return the loss of one record's logits; the term of generated samples is a constant."""
        logits, classes = split_heads(output)
        value = self.loss.discriminator(logits, torch.zeros_like(logits))
        if classes is not None:
            value = value + self.auxiliary_weight * auxiliary_classifier(classes, y)
        return value

    def __call__(self, parameters: Tensors, fixed: Tensors, row: Tensors, factors: Sequence[Tensor]) -> Tensor:
        """Return the loss of one record, penalties included."""
        values = {**parameters, **fixed}
        one = {name: value.unsqueeze(0) for name, value in row.items()}
        x, y, u = one["x"], one["y"], one.get("u")
        total = self.of_logits(self.output(values, x, y, u), y)

        def critic(points: Tensor) -> Tensor:
            return split_heads(self.output(values, points, y, u))[0].sum()

        for penalty, factor in zip(self.penalties, factors):
            mix = (one["mix"],) if penalty.needs_mix else ()
            points = penalty.points(x, one.get("fake", x), *mix)
            norms = squared_norms(grad(critic)(points))
            total = total + factor * penalty.interval * penalty.value(norms)
        return total


def exact_sum(
    record: _Record, parameters: Tensors, fixed: Tensors, rows: Tensors, factors: Sequence[Tensor], *, clip: float
) -> Tensors:
    """Return the clipped sum over rows from a gradient of each.

    Args:
        record: Loss of one record.
        parameters: Trained parameters of the discriminator.
        fixed: Its other parameters, and its buffers.
        rows: Samples, labels and what else differs by record, (rows, ...) each; ``present`` is 1 for records, else 0.
        factors: 1 for penalties that are due on this client.
        clip: The bound C.
    """
    per_record = vmap(grad(record), in_dims=(None, None, 0, None))
    inputs = {name: value for name, value in rows.items() if name != "present"}
    gradients: Tensors = per_record(parameters, fixed, inputs, list(factors))
    squares = sum(value.flatten(1).square().sum(1) for value in gradients.values())
    weights = _weights(squares, rows["present"], clip)  # type: ignore[arg-type]
    return {
        name: torch.einsum("b,b...->...", weights.to(each.dtype), _finite(each)) for name, each in gradients.items()
    }


def two_pass_sum(record: _Record, parameters: Tensors, fixed: Tensors, rows: Tensors, *, clip: float) -> Tensors:
    """Return the same from two passes: norms from activations first, a weighted gradient after that.

    For a linear layer with input a and gradient d at its output |g|^2 = |a|^2 |d|^2, and |d|^2 more for its bias; for
    an embedding |g|^2 = |d|^2 (Goodfellow 2015).
    """
    layers = {name: each for name, each in record.network.named_modules() if type(each) in TWO_PASS_LAYERS}
    x, y, u = rows["x"], rows["y"], rows.get("u")

    def losses(parameters: Tensors) -> Tensor:
        output = record.output({**parameters, **fixed}, x, y, u)
        one = vmap(lambda each, label: record.of_logits(_rows(each), label.unsqueeze(0)))
        found: Tensor = one(output, y)
        return found

    def at_outputs(offsets: Tensors) -> tuple[Tensor, Tensors]:
        inputs: Tensors = {}
        with _Offsets(layers, offsets, inputs):
            return losses(parameters).sum(), inputs

    shapes = _output_shapes(layers, lambda: losses(parameters))
    offsets = {name: x.new_zeros(shape) for name, shape in shapes.items()}
    slopes, inputs = grad(at_outputs, has_aux=True)(offsets)
    squares = x.new_zeros(len(x))
    for name, layer in layers.items():
        of_output = slopes[name].square().sum(1)
        if isinstance(layer, nn.Linear):
            if f"{name}.weight" in parameters:
                squares = squares + inputs[name].square().sum(1) * of_output
            if f"{name}.bias" in parameters:
                squares = squares + of_output
        elif f"{name}.weight" in parameters:
            squares = squares + of_output
    weights = _weights(squares, rows["present"], clip)
    found: Tensors = grad(lambda each: (losses(each) * weights).sum())(parameters)
    return found


class _Offsets:
    """Adds offsets to the outputs of layers, and notes their inputs, inside a ``with``."""

    def __init__(self, layers: dict[str, nn.Module], offsets: Tensors, inputs: Tensors) -> None:
        self.layers, self.offsets, self.inputs = layers, offsets, inputs
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name)))

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            self.inputs[name] = inputs[0]
            return output + self.offsets[name]

        return hook

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def _output_shapes(layers: dict[str, nn.Module], run: Callable[[], Any]) -> dict[str, torch.Size]:
    """Return the shapes of the outputs of layers in a pass."""
    shapes: dict[str, torch.Size] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            shapes[name] = output.shape

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _rows(output: Any) -> Any:
    """Return one record's heads as those of a minibatch of one."""
    return tuple(each.unsqueeze(0) for each in output) if isinstance(output, tuple) else output.unsqueeze(0)


def _weights(squares: Tensor, present: Tensor, clip: float) -> Tensor:
    """Return min(1, C / |g|) of records, and 0 where there is none, or its gradient is no number."""
    norms = squares.sqrt()
    factors = (clip / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors)) * present


def _finite(gradients: Tensor) -> Tensor:
    """Return gradients with zeros for what is no number: its record's weight is 0, and 0 times NaN is NaN."""
    return torch.nan_to_num(gradients, nan=0.0, posinf=0.0, neginf=0.0)


def _chunks(rows: Tensors, size: int, *, dim: int) -> list[Tensors]:
    """Return rows in parts of at most ``size``; none of none."""
    if not rows["x"].shape[dim]:
        return []
    parts = {name: value.split(size, dim=dim) for name, value in rows.items()}
    return [dict(zip(parts, each)) for each in zip(*parts.values())]
