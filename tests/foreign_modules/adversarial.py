"""Noise to pictures: the GAN of Lightning's tutorials, a DCGAN as in Lightning Bolts, a WGAN with gradient penalty."""

from __future__ import annotations

import lightning as L
import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

# ---------------------------------------------------------------------- the tutorial


class Generator(nn.Module):
    def __init__(self, latent_dim, img_shape):
        super().__init__()
        self.img_shape = img_shape

        def block(in_feat, out_feat, normalize=True):
            layers = [nn.Linear(in_feat, out_feat)]
            if normalize:
                layers.append(nn.BatchNorm1d(out_feat, 0.8))
            layers.append(nn.LeakyReLU(0.01, inplace=True))
            return layers

        self.model = nn.Sequential(
            *block(latent_dim, 8, normalize=False),
            *block(8, 8),
            nn.Linear(8, int(np.prod(img_shape))),
            nn.Tanh(),
        )

    def forward(self, z):
        return self.model(z).view(z.size(0), *self.img_shape)


class Discriminator(nn.Module):
    def __init__(self, img_shape):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(int(np.prod(img_shape)), 8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(8, 1),
            nn.Sigmoid(),
        )

    def forward(self, img):
        return self.model(img.view(img.size(0), -1))


class TutorialGAN(L.LightningModule):
    """The GAN of Lightning's tutorials."""

    def __init__(
        self,
        channels: int = 1,
        width: int = 8,
        height: int = 8,
        latent_dim: int = 4,
        lr: float = 0.002,
        b1: float = 0.5,
        b2: float = 0.999,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False

        data_shape = (channels, width, height)
        self.generator = Generator(latent_dim=self.hparams.latent_dim, img_shape=data_shape)
        self.discriminator = Discriminator(img_shape=data_shape)

        self.validation_z = torch.randn(8, self.hparams.latent_dim)
        self.example_input_array = torch.zeros(2, self.hparams.latent_dim)

    def forward(self, z):
        return self.generator(z)

    def adversarial_loss(self, y_hat, y):
        return F.binary_cross_entropy(y_hat, y)

    def training_step(self, batch):
        imgs, _ = batch
        optimizer_g, optimizer_d = self.optimizers()

        z = torch.randn(imgs.shape[0], self.hparams.latent_dim)
        z = z.type_as(imgs)

        # train generator
        self.toggle_optimizer(optimizer_g)
        self.generated_imgs = self(z)

        sample_imgs = self.generated_imgs[:6]
        grid = torchvision.utils.make_grid(sample_imgs)
        self.logger.experiment.add_image("train/generated_images", grid, self.current_epoch)

        valid = torch.ones(imgs.size(0), 1).type_as(imgs)
        g_loss = self.adversarial_loss(self.discriminator(self.generated_imgs), valid)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)

        # train discriminator
        self.toggle_optimizer(optimizer_d)
        real_loss = self.adversarial_loss(self.discriminator(imgs), valid)
        fake = torch.zeros(imgs.size(0), 1).type_as(imgs)
        fake_loss = self.adversarial_loss(self.discriminator(self.generated_imgs.detach()), fake)
        d_loss = (real_loss + fake_loss) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        self.manual_backward(d_loss)
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        lr = self.hparams.lr
        b1 = self.hparams.b1
        b2 = self.hparams.b2

        opt_g = torch.optim.Adam(self.generator.parameters(), lr=lr, betas=(b1, b2))
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=lr, betas=(b1, b2))
        return [opt_g, opt_d], []

    def on_validation_epoch_end(self):
        z = self.validation_z.type_as(self.generator.model[0].weight)
        sample_imgs = self(z)
        grid = torchvision.utils.make_grid(sample_imgs)
        self.logger.experiment.add_image("validation/generated_images", grid, self.current_epoch)


# ---------------------------------------------------------------------- DCGAN


class DCGAN(L.LightningModule):
    """Convolutions, weights drawn by ``apply``, metrics with a slash in their names."""

    def __init__(
        self,
        beta1: float = 0.5,
        feature_maps: int = 4,
        image_channels: int = 1,
        latent_dim: int = 4,
        learning_rate: float = 0.002,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = self._get_generator()
        self.discriminator = self._get_discriminator()
        self.criterion = nn.BCELoss()

    def _get_generator(self):
        width, channels = self.hparams.feature_maps, self.hparams.image_channels
        generator = nn.Sequential(
            nn.ConvTranspose2d(self.hparams.latent_dim, width, 4, 1, 0, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
            nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False),
            nn.Tanh(),
        )
        generator.apply(self._weights_init)
        return generator

    def _get_discriminator(self):
        width, channels = self.hparams.feature_maps, self.hparams.image_channels
        discriminator = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, 1, 4, 1, 0, bias=False),
            nn.Sigmoid(),
        )
        discriminator.apply(self._weights_init)
        return discriminator

    @staticmethod
    def _weights_init(m):
        classname = m.__class__.__name__
        if classname.find("Conv") != -1:
            nn.init.normal_(m.weight, 0.0, 0.02)
        elif classname.find("BatchNorm") != -1:
            nn.init.normal_(m.weight, 1.0, 0.02)
            nn.init.zeros_(m.bias)

    def configure_optimizers(self):
        lr, betas = self.hparams.learning_rate, (self.hparams.beta1, 0.999)
        opt_disc = torch.optim.Adam(self.discriminator.parameters(), lr=lr, betas=betas)
        opt_gen = torch.optim.Adam(self.generator.parameters(), lr=lr, betas=betas)
        return [opt_disc, opt_gen]

    def forward(self, noise):
        noise = noise.view(*noise.shape, 1, 1)
        return self.generator(noise)

    def training_step(self, batch, batch_idx):
        real, _ = batch
        opt_disc, opt_gen = self.optimizers()

        opt_disc.zero_grad()
        disc_loss = self._get_disc_loss(real)
        self.manual_backward(disc_loss)
        opt_disc.step()
        self.log("loss/disc", disc_loss, on_epoch=True)

        opt_gen.zero_grad()
        gen_loss = self._get_gen_loss(real)
        self.manual_backward(gen_loss)
        opt_gen.step()
        self.log("loss/gen", gen_loss, on_epoch=True)

    def _get_disc_loss(self, real):
        real_pred = self.discriminator(real).view(-1)
        real_loss = self.criterion(real_pred, torch.ones_like(real_pred))
        fake_pred = self._get_fake_pred(real)
        fake_loss = self.criterion(fake_pred, torch.zeros_like(fake_pred))
        return real_loss + fake_loss

    def _get_gen_loss(self, real):
        fake_pred = self._get_fake_pred(real)
        return self.criterion(fake_pred, torch.ones_like(fake_pred))

    def _get_fake_pred(self, real):
        noise = self._get_noise(len(real), self.hparams.latent_dim)
        return self.discriminator(self(noise)).view(-1)

    def _get_noise(self, n_samples, latent_dim):
        return torch.randn(n_samples, latent_dim, device=self.device)


# ---------------------------------------------------------------------- WGAN-GP


class WGANGP(L.LightningModule):
    """The generator steps by ``global_step``; the penalty is taken at points that NumPy draws."""

    def __init__(
        self,
        latent_dim: int = 4,
        lr: float = 0.002,
        n_critic: int = 5,
        lambda_gp: float = 10.0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(latent_dim, 8), nn.LeakyReLU(0.2), nn.Linear(8, 64), nn.Tanh())
        self.critic = nn.Sequential(nn.Linear(64, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def forward(self, z):
        return self.generator(z).view(-1, 1, 8, 8)

    def compute_gradient_penalty(self, real_samples, fake_samples):
        alpha = torch.Tensor(np.random.random((real_samples.size(0), 1, 1, 1))).to(self.device)
        interpolates = (alpha * real_samples + ((1 - alpha) * fake_samples)).requires_grad_(True)
        d_interpolates = self.critic(interpolates.flatten(1))
        fake = torch.ones(real_samples.shape[0], 1, device=self.device)
        gradients = torch.autograd.grad(
            outputs=d_interpolates,
            inputs=interpolates,
            grad_outputs=fake,
            create_graph=True,
            retain_graph=True,
            only_inputs=True,
        )[0]
        gradients = gradients.view(gradients.size(0), -1)
        return ((gradients.norm(2, dim=1) - 1) ** 2).mean()

    def training_step(self, batch, batch_idx):
        imgs, _ = batch
        opt_g, opt_c = self.optimizers()
        z = torch.randn(imgs.shape[0], self.hparams.latent_dim).type_as(imgs)

        fake_imgs = self(z).detach()
        gradient_penalty = self.compute_gradient_penalty(imgs, fake_imgs)
        real_validity = self.critic(imgs.flatten(1)).mean()
        fake_validity = self.critic(fake_imgs.flatten(1)).mean()
        c_loss = -real_validity + fake_validity + self.hparams.lambda_gp * gradient_penalty
        opt_c.zero_grad()
        self.manual_backward(c_loss)
        opt_c.step()
        self.log_dict({"c_loss": c_loss, "wasserstein": real_validity - fake_validity}, prog_bar=True)

        if self.global_step % self.hparams.n_critic == 0:
            g_loss = -self.critic(self(z).flatten(1)).mean()
            opt_g.zero_grad()
            self.manual_backward(g_loss)
            opt_g.step()
            self.log("g_loss", g_loss, prog_bar=True)

    def configure_optimizers(self):
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=self.hparams.lr, betas=(0.0, 0.9))
        opt_c = torch.optim.Adam(self.critic.parameters(), lr=self.hparams.lr, betas=(0.0, 0.9))
        return opt_g, opt_c
