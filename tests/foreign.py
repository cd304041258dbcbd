"""A GAN by somebody else: manual optimization, its own attribute names, and nothing of ours imported."""

import lightning
import torch
from torch import nn


class SomebodysGAN(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.critic = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        self.bias = nn.Parameter(torch.zeros(2))

    def configure_optimizers(self):
        critic = torch.optim.SGD(self.critic.parameters(), lr=0.02)
        decoder = torch.optim.SGD([*self.decoder.parameters(), self.bias], lr=0.01)
        return [critic, decoder]

    def training_step(self, batch, batch_idx):
        points, _ = batch
        critic, decoder = self.optimizers()
        fake = self.decoder(torch.randn(len(points), 3)) + self.bias
        loss = nn.functional.softplus(self.critic(fake.detach())).mean()
        loss = loss + nn.functional.softplus(-self.critic(points)).mean()
        critic.zero_grad()
        self.manual_backward(loss)
        critic.step()
        loss_decoder = nn.functional.softplus(-self.critic(fake)).mean()
        decoder.zero_grad()
        self.manual_backward(loss_decoder)
        decoder.step()
        self.log("critic_loss", loss)
