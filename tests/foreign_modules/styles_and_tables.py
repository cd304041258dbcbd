"""A small StyleGAN2 with its lazy regularisers, and a GAN of tables after CTGAN."""

from __future__ import annotations

import math

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F

# ---------------------------------------------------------------------- StyleGAN


class ExponentialMovingAverage:
    """Shadow parameters that follow a network's."""

    def __init__(self, parameters, decay):
        self.decay = decay
        self.num_updates = 0
        self.shadow_params = [p.clone().detach() for p in parameters if p.requires_grad]
        self.collected_params = None

    @torch.no_grad()
    def update(self, parameters):
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for s_param, param in zip(self.shadow_params, parameters):
            s_param.sub_((1.0 - decay) * (s_param - param.to(s_param.device)))

    def copy_to(self, parameters):
        for s_param, param in zip(self.shadow_params, parameters):
            param.data.copy_(s_param.data)


class EqualLinear(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.c = 1 / math.sqrt(in_features)

    def forward(self, x):
        return F.linear(x, self.weight * self.c, bias=self.bias)


class StyleGenerator(nn.Module):
    """Two layers, each with a style of its own and with noise."""

    def __init__(self, d_latent):
        super().__init__()
        self.const = nn.Parameter(torch.randn(1, 4, 4, 4))
        self.to_style = nn.ModuleList([EqualLinear(d_latent, 4), EqualLinear(d_latent, 4)])
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)])
        self.noise_scale = nn.Parameter(torch.zeros(2))
        self.to_rgb = nn.Conv2d(4, 1, 1)

    def forward(self, w):
        x = self.const.expand(w.shape[1], -1, -1, -1)
        for layer, (to_style, conv) in enumerate(zip(self.to_style, self.convs)):
            if layer == 1:
                x = F.interpolate(x, scale_factor=2)
            x = conv(x * (1 + to_style(w[layer]))[:, :, None, None])
            x = x + self.noise_scale[layer] * torch.randn(x.shape[0], 1, *x.shape[2:], device=x.device)
            x = F.leaky_relu(x, 0.2)
        return self.to_rgb(x)


class StyleGAN(L.LightningModule):
    """Gradient penalty on every fourth minibatch, path lengths on every second, mixed styles."""

    def __init__(
        self,
        d_latent: int = 4,
        learning_rate: float = 0.002,
        style_mixing_prob: float = 0.9,
        lazy_gradient_penalty_interval: int = 4,
        lazy_path_penalty_interval: int = 2,
        gamma: float = 10.0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.mapping_network = nn.Sequential(EqualLinear(d_latent, d_latent), nn.LeakyReLU(0.2))
        self.generator = StyleGenerator(d_latent)
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), EqualLinear(64, 1)
        )
        self.register_buffer("pl_mean", torch.zeros(()))
        self.ema = ExponentialMovingAverage(self.generator.parameters(), decay=0.99)

    def get_w(self, batch_size):
        if torch.rand(()).item() < self.hparams.style_mixing_prob:
            cross_over_point = int(torch.rand(()).item() * 2)
            z1 = torch.randn(batch_size, self.hparams.d_latent, device=self.device)
            z2 = torch.randn(batch_size, self.hparams.d_latent, device=self.device)
            w1, w2 = self.mapping_network(z1), self.mapping_network(z2)
            return torch.stack([w1 if layer < cross_over_point else w2 for layer in range(2)])
        z = torch.randn(batch_size, self.hparams.d_latent, device=self.device)
        return self.mapping_network(z)[None, :, :].expand(2, -1, -1)

    def gradient_penalty(self, real):
        real = real.detach().requires_grad_(True)
        (gradients,) = torch.autograd.grad(self.discriminator(real).sum(), real, create_graph=True)
        return gradients.square().sum([1, 2, 3]).mean()

    def path_length_penalty(self, w, x):
        y = torch.randn(x.shape, device=x.device) / math.sqrt(x.shape[2] * x.shape[3])
        (gradients,) = torch.autograd.grad((x * y).sum(), w, create_graph=True)
        norm = gradients.square().sum(2).mean(0).sqrt()
        mean = self.pl_mean + 0.01 * (norm.mean().detach() - self.pl_mean)
        self.pl_mean.copy_(mean)
        return (norm - mean).square().mean()

    def training_step(self, batch, batch_idx):
        real, _ = batch
        opt_g, opt_d = self.optimizers()

        opt_d.zero_grad()
        fake = self.generator(self.get_w(len(real)))
        d_loss = F.softplus(self.discriminator(fake.detach())).mean() + F.softplus(-self.discriminator(real)).mean()
        if batch_idx % self.hparams.lazy_gradient_penalty_interval == 0:
            gp = self.gradient_penalty(real)
            self.log("r1", gp)
            d_loss = d_loss + 0.5 * self.hparams.gamma * gp * self.hparams.lazy_gradient_penalty_interval
        self.manual_backward(d_loss)
        opt_d.step()

        opt_g.zero_grad()
        w = self.get_w(len(real))
        fake = self.generator(w)
        g_loss = F.softplus(-self.discriminator(fake)).mean()
        if batch_idx % self.hparams.lazy_path_penalty_interval == 0:
            g_loss = g_loss + self.path_length_penalty(w, fake)
        self.manual_backward(g_loss)
        opt_g.step()
        self.ema.update(self.generator.parameters())
        self.log_dict({"g_loss": g_loss, "d_loss": d_loss, "pl_mean": self.pl_mean}, prog_bar=True)

    def configure_optimizers(self):
        lr = self.hparams.learning_rate
        generator = [*self.generator.parameters(), *self.mapping_network.parameters()]
        opt_g = torch.optim.Adam(generator, lr=lr, betas=(0.0, 0.99))
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=lr, betas=(0.0, 0.99))
        return opt_g, opt_d


# ---------------------------------------------------------------------- a GAN of tables


class Residual(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.fc = nn.Linear(i, o)
        self.bn = nn.BatchNorm1d(o)

    def forward(self, x):
        return torch.cat([F.relu(self.bn(self.fc(x))), x], dim=1)


class PacDiscriminator(nn.Module):
    """Judges ``pac`` rows at once."""

    def __init__(self, input_dim, pac):
        super().__init__()
        self.pac, self.pacdim = pac, input_dim * pac
        self.seq = nn.Sequential(nn.Linear(self.pacdim, 8), nn.LeakyReLU(0.2), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, rows):
        return self.seq(rows.view(-1, self.pacdim))


class TableGAN(L.LightningModule):
    """Rows of numbers and one category; which category is generated is asked for, more often where it is rare."""

    def __init__(
        self,
        num_numbers: int = 2,
        num_categories: int = 8,
        embedding_dim: int = 4,
        pac: int = 2,
        lr: float = 0.002,
        noise_steps: int = 20,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        row = num_numbers + num_categories
        self.generator = nn.Sequential(Residual(embedding_dim + num_categories, 8), nn.Linear(20, row))
        self.discriminator = PacDiscriminator(row + num_categories, pac)
        self.register_buffer("category_counts", torch.zeros(num_categories, dtype=torch.long))
        self.register_buffer("steps_done", torch.tensor(0))

    def apply_activate(self, data):
        numbers, logits = data.split([self.hparams.num_numbers, self.hparams.num_categories], dim=1)
        return torch.cat([torch.tanh(numbers), F.gumbel_softmax(logits, tau=0.2)], dim=1), logits

    def sample_condvec(self, batch):
        weights = torch.log1p(self.category_counts.float()) + 1.0
        category = torch.multinomial(weights, batch, replacement=True)
        return category, F.one_hot(category, self.hparams.num_categories).float()

    def generate(self, batch):
        category, condition = self.sample_condvec(batch)
        z = torch.randn(batch, self.hparams.embedding_dim, device=self.device)
        rows, logits = self.apply_activate(self.generator(torch.cat([z, condition], dim=1)))
        return rows, logits, category, condition

    def training_step(self, batch, batch_idx):
        numbers, labels = batch
        opt_g, opt_d = self.optimizers()
        one_hot = F.one_hot(labels, self.hparams.num_categories)
        self.category_counts += one_hot.sum(0)
        self.steps_done += 1
        real = torch.cat([numbers, one_hot.float(), one_hot.float()], dim=1)
        noise = 0.1 * max(0.0, 1 - self.steps_done.item() / self.hparams.noise_steps)
        real = real + noise * torch.randn_like(real)

        rows, _, _, condition = self.generate(len(numbers))
        y_fake = self.discriminator(torch.cat([rows.detach(), condition], dim=1))
        y_real = self.discriminator(real)
        loss_d = -(torch.mean(y_real) - torch.mean(y_fake)) + 0.1 * (y_real.square().mean() + y_fake.square().mean())
        opt_d.zero_grad(set_to_none=False)
        self.manual_backward(loss_d)
        opt_d.step()

        rows, logits, category, condition = self.generate(len(numbers))
        y_fake = self.discriminator(torch.cat([rows, condition], dim=1))
        loss_g = -torch.mean(y_fake) + F.cross_entropy(logits, category)
        opt_g.zero_grad(set_to_none=False)
        self.manual_backward(loss_g)
        opt_g.step()
        self.log_dict({"loss_g": loss_g, "loss_d": loss_d})

    def configure_optimizers(self):
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=self.hparams.lr, betas=(0.5, 0.9), weight_decay=1e-6)
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=self.hparams.lr, betas=(0.5, 0.9))
        return opt_g, opt_d
