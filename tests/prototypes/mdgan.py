"""MD-GAN over the interface of algorithms: the server trains G by what private discriminators say of its samples.

Hardy, Le Merrer, Sericola 2019, algorithm 1, with k batches per round, L = K local steps of D and weights 1 / N.
"""

from __future__ import annotations

import torch

from fedgan_lightning.algorithms import FederatedAlgorithm, UpdateEntry
from fedgan_lightning.seeding import make_generator


class MDGAN(FederatedAlgorithm):
    trains = frozenset({"served"})

    def __init__(self, *, num_batches: int = 1, batch_size: int = 16, seed: int = 0) -> None:
        self.num_batches, self.batch_size, self.seed = num_batches, batch_size, seed
        self.gradients: dict[str, torch.Tensor] = {}

    def latents(self, model, round: int) -> list[torch.Tensor]:
        """The same whenever they are asked for: nothing of a round is held."""
        noise = make_generator(self.seed, "fakes", round)
        like = next(model.generator.parameters())
        draw = {"generator": noise, "device": like.device, "dtype": like.dtype}
        return [model.prior.sample(self.batch_size, model.latent_dim, **draw) for _ in range(self.num_batches)]

    def labels(self, model) -> torch.Tensor:
        return torch.arange(self.batch_size) % max(model.num_classes, 1)

    def slots(self, client_id: int) -> tuple[int, int]:
        """The batches that a client answers for, and trains against."""
        return client_id % self.num_batches, (client_id + 1) % self.num_batches

    def entries(self, context):
        shape = (self.batch_size, *context.model.sample_shape)
        dtype = next(context.model.parameters()).dtype
        return {
            "feedback": UpdateEntry(shape, dtype, rule="collect"),
            "slot": UpdateEntry((), torch.int64, rule="collect"),
        }

    def own_task(self, server, round, client_id):
        model = server.model
        made = [model.generate(z, self.labels(model)).detach() for z in self.latents(model, round)]
        answers, trains = self.slots(client_id)
        return {
            "fakes": made[answers],
            "against": made[trains],
            "labels": self.labels(model),
            "slot": torch.tensor(answers),
        }

    def work(self, visit):
        visit.fit_discriminator((visit.task["against"], visit.task["labels"]))

    def answer(self, visit):
        """F_n = d/dx of the mean over the batch of L(D_n(x)), with the D that has been trained."""
        logits, gradients = visit.feedback(visit.task["fakes"], visit.task["labels"])
        slopes = torch.vmap(self.slope)(logits) if visit.is_stacked else self.slope(logits)
        shape = (*slopes.shape[: gradients.dim() - len(visit.context.model.sample_shape)],)
        slopes = slopes.reshape(*shape, *([1] * len(visit.context.model.sample_shape)))
        return {"feedback": slopes * gradients, "slot": visit.task["slot"]}

    def slope(self, logits):
        """dL/dl of the generator's loss, averaged over the batch."""
        return torch.func.grad(self.loss)(logits)

    @staticmethod
    def loss(logits):
        return torch.nn.functional.softplus(-logits).mean()

    def server_optimizers(self, server):
        return {"generator": server.model.generator_optimizer(server.model.generator.parameters())}

    def server_step(self, server, total):
        model, arrived = server.model, len(total.collected)
        points, sums = self.latents(model, server.rounds_completed), {}
        for answer in total.collected.values():
            slot, value = int(answer["algorithm/slot"]), answer["algorithm/feedback"]
            sums[slot] = sums.get(slot, 0.0) + value / arrived
        parameters = dict(model.generator.named_parameters())
        found = {name: torch.zeros_like(own) for name, own in parameters.items()}
        for slot, feedback in sums.items():
            samples = model.generate_with_graph(points[slot], self.labels(model))
            for name, value in zip(parameters, torch.autograd.grad(samples, list(parameters.values()), feedback)):
                found[name] += value
        self.gradients = {name: value.clone() for name, value in found.items()}
        optimizer = server.optimizer_of("generator")
        for name, value in found.items():
            parameters[name].grad = value
        optimizer.step()
        optimizer.zero_grad()
