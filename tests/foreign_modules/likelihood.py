"""One loss, automatic optimization: a VAE, a diffusion model, an energy-based model and an autoencoder."""

from __future__ import annotations

import random

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

# ---------------------------------------------------------------------- VAE


class VAE(L.LightningModule):
    """The weight of its divergence grows with the epochs, its rate goes one cycle over the whole training."""

    def __init__(self, latent_dim: int = 3, max_lr: float = 0.01, warmup_epochs: int = 2):
        super().__init__()
        self.save_hyperparameters()
        self.latent_dim = latent_dim
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.LeakyReLU())
        self.fc_mu = nn.Linear(8, latent_dim)
        self.fc_var = nn.Linear(8, latent_dim)
        self.decoder = nn.Sequential(nn.Linear(latent_dim, 8), nn.LeakyReLU(), nn.Linear(8, 64), nn.Tanh())

    def decode(self, z):
        return self.decoder(z).view(-1, 1, 8, 8)

    def reparameterize(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return eps * std + mu

    def forward(self, x):
        hidden = self.encoder(x)
        mu, log_var = self.fc_mu(hidden), self.fc_var(hidden)
        z = self.reparameterize(mu, log_var)
        return self.decode(z), mu, log_var

    def training_step(self, batch, batch_idx):
        x, _ = batch
        recons, mu, log_var = self(x)
        recons_loss = F.mse_loss(recons, x)
        kld_loss = torch.mean(-0.5 * torch.sum(1 + log_var - mu**2 - log_var.exp(), dim=1), dim=0)
        beta = min(1.0, self.current_epoch / self.hparams.warmup_epochs)
        loss = recons_loss + beta * kld_loss
        self.log_dict({"train_loss": loss, "recon_loss": recons_loss, "kl": kld_loss, "beta": beta}, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.max_lr)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.hparams.max_lr, total_steps=self.trainer.estimated_stepping_batches
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def sample(self, num_samples: int, current_device: int):
        z = torch.randn(num_samples, self.latent_dim).to(current_device)
        return self.decode(z)

    def generate(self, x):
        return self.forward(x)[0]


# ---------------------------------------------------------------------- DDPM


class EMACallback(L.Callback):
    """Keeps a moving average of the weights, which is used while the model is validated."""

    def __init__(self, decay: float = 0.9):
        super().__init__()
        self.decay = decay
        self.num_updates = 0
        self.shadow = {}
        self.backup = {}

    def on_train_start(self, trainer, pl_module):
        if not self.shadow:
            self.shadow = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, param in pl_module.named_parameters():
            self.shadow[name].mul_(decay).add_(param.detach().to(self.shadow[name].device), alpha=1 - decay)

    def on_validation_start(self, trainer, pl_module):
        if self.shadow:
            self.backup = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
            self._copy_to(pl_module, self.shadow)

    def on_validation_end(self, trainer, pl_module):
        if self.backup:
            self._copy_to(pl_module, self.backup)
            self.backup = {}

    @torch.no_grad()
    def _copy_to(self, pl_module, weights):
        for name, param in pl_module.named_parameters():
            param.copy_(weights[name])

    def state_dict(self):
        return {"num_updates": self.num_updates, "shadow": self.shadow}

    def load_state_dict(self, state_dict):
        self.num_updates = state_dict["num_updates"]
        self.shadow = state_dict["shadow"]


def extract(a, t, x_shape):
    return a.gather(-1, t).reshape(t.shape[0], *((1,) * (len(x_shape) - 1)))


class DenoisingDiffusion(L.LightningModule):
    """Predicts the noise that was added."""

    def __init__(self, timesteps: int = 10, image_size: int = 8, channels: int = 1, lr: float = 0.003):
        super().__init__()
        self.save_hyperparameters()
        self.num_timesteps, self.image_size, self.channels = timesteps, image_size, channels
        self.time_embed = nn.Embedding(timesteps, 6)
        self.model = nn.Sequential(nn.Linear(image_size**2 * channels + 6, 8), nn.SiLU(), nn.Linear(8, 64 * channels))

        betas = torch.linspace(0.01, 0.4, timesteps)
        alphas = 1.0 - betas
        alphas_cumprod = torch.cumprod(alphas, dim=0)
        self.register_buffer("betas", betas)
        self.register_buffer("alphas_cumprod", alphas_cumprod)
        self.register_buffer("sqrt_alphas_cumprod", torch.sqrt(alphas_cumprod))
        self.register_buffer("sqrt_one_minus_alphas_cumprod", torch.sqrt(1.0 - alphas_cumprod))
        self.register_buffer("sqrt_recip_alphas", torch.sqrt(1.0 / alphas), persistent=False)

    def forward(self, x, t):
        return self.model(torch.cat([x.flatten(1), self.time_embed(t)], dim=1)).view_as(x)

    def q_sample(self, x_start, t, noise):
        return (
            extract(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
            + extract(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * noise
        )

    def p_losses(self, x_start, t):
        noise = torch.randn_like(x_start)
        x_noisy = self.q_sample(x_start, t, noise)
        return F.mse_loss(self(x_noisy, t), noise)

    def shared_step(self, batch):
        x, _ = batch
        t = torch.randint(0, self.num_timesteps, (x.shape[0],), device=self.device).long()
        return self.p_losses(x, t)

    def training_step(self, batch, batch_idx):
        loss = self.shared_step(batch)
        self.log("train/loss_simple", loss, prog_bar=True, logger=True, on_step=True, on_epoch=True)
        self.log("global_step", float(self.global_step), prog_bar=True, logger=True, on_step=True, on_epoch=False)
        return loss

    @torch.no_grad()
    def validation_step(self, batch, batch_idx):
        self.log("val/loss_simple_ema", self.shared_step(batch), on_step=False, on_epoch=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)

    @torch.no_grad()
    def p_sample(self, x, t, t_index):
        mean = extract(self.sqrt_recip_alphas, t, x.shape) * (
            x - extract(self.betas, t, x.shape) * self(x, t) / extract(self.sqrt_one_minus_alphas_cumprod, t, x.shape)
        )
        if t_index == 0:
            return mean
        return mean + torch.sqrt(extract(self.betas, t, x.shape)) * torch.randn_like(x)

    @torch.no_grad()
    def sample(self, batch_size=16, return_intermediates=False):
        img = torch.randn((batch_size, self.channels, self.image_size, self.image_size), device=self.device)
        intermediates = [img]
        for i in reversed(range(self.num_timesteps)):
            img = self.p_sample(img, torch.full((batch_size,), i, device=self.device, dtype=torch.long), i)
            intermediates.append(img)
        return (img, intermediates) if return_intermediates else img


# ---------------------------------------------------------------------- energy-based model


class Sampler:
    """Draws from the model by Langevin steps that begin, mostly, where earlier ones ended."""

    def __init__(self, model, img_shape, sample_size, max_len=64):
        super().__init__()
        self.model = model
        self.img_shape = img_shape
        self.sample_size = sample_size
        self.max_len = max_len
        self.examples = [(torch.rand((1, *img_shape)) * 2 - 1) for _ in range(self.sample_size)]

    def sample_new_exmps(self, steps=60, step_size=10):
        n_new = np.random.binomial(self.sample_size, 0.05)
        rand_imgs = torch.rand((n_new, *self.img_shape)) * 2 - 1
        old_imgs = torch.cat(random.choices(self.examples, k=self.sample_size - n_new), dim=0)
        inp_imgs = torch.cat([rand_imgs, old_imgs], dim=0).detach()
        inp_imgs = inp_imgs.to(next(self.model.parameters()).device)

        inp_imgs = Sampler.generate_samples(self.model, inp_imgs, steps=steps, step_size=step_size)

        self.examples = list(inp_imgs.to(torch.device("cpu")).chunk(self.sample_size, dim=0)) + self.examples
        self.examples = self.examples[: self.max_len]
        return inp_imgs

    @staticmethod
    def generate_samples(model, inp_imgs, steps=60, step_size=10):
        is_training = model.training
        model.eval()
        for p in model.parameters():
            p.requires_grad = False
        inp_imgs.requires_grad = True

        had_gradients_enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        noise = torch.randn(inp_imgs.shape, device=inp_imgs.device)
        for _ in range(steps):
            noise.normal_(0, 0.005)
            inp_imgs.data.add_(noise.data)
            inp_imgs.data.clamp_(min=-1.0, max=1.0)

            out_imgs = -model(inp_imgs)
            out_imgs.sum().backward()
            inp_imgs.grad.data.clamp_(-0.03, 0.03)

            inp_imgs.data.add_(-step_size * inp_imgs.grad.data)
            inp_imgs.grad.detach_()
            inp_imgs.grad.zero_()
            inp_imgs.data.clamp_(min=-1.0, max=1.0)

        for p in model.parameters():
            p.requires_grad = True
        model.train(is_training)
        torch.set_grad_enabled(had_gradients_enabled)
        return inp_imgs


class DeepEnergyModel(L.LightningModule):
    """Its sampler holds the network and a list of pictures, and is no part of the state dict."""

    def __init__(
        self,
        batch_size: int = 4,
        alpha: float = 0.1,
        lr: float = 1e-3,
        beta1: float = 0.0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, 4, 4, 2, 1), nn.SiLU(), nn.Conv2d(4, 4, 4, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(16, 1)
        )
        self.sampler = Sampler(self.cnn, img_shape=(1, 8, 8), sample_size=batch_size, max_len=16)

    def forward(self, x):
        return self.cnn(x).squeeze(dim=-1)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr, betas=(self.hparams.beta1, 0.999))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.97)
        return [optimizer], [scheduler]

    def training_step(self, batch, batch_idx):
        real_imgs, _ = batch
        small_noise = torch.randn_like(real_imgs) * 0.005
        real_imgs = real_imgs.clone().add_(small_noise).clamp_(min=-1.0, max=1.0)
        fake_imgs = self.sampler.sample_new_exmps(steps=3, step_size=10)

        inp_imgs = torch.cat([real_imgs, fake_imgs], dim=0)
        real_out, fake_out = self.forward(inp_imgs).chunk(2, dim=0)
        reg_loss = self.hparams.alpha * (real_out**2 + fake_out**2).mean()
        cdiv_loss = fake_out.mean() - real_out.mean()
        loss = reg_loss + cdiv_loss

        self.log("loss", loss)
        self.log("loss_regularization", reg_loss)
        self.log("loss_contrastive_divergence", cdiv_loss)
        self.log("metrics_avg_real", real_out.mean())
        self.log("metrics_avg_fake", fake_out.mean())
        return loss


# ---------------------------------------------------------------------- autoencoder


class AutoEncoder(L.LightningModule):
    """Its rate is halved when the validation does not get much better."""

    def __init__(self, latent_dim: int = 3, lr: float = 0.01, threshold: float = 0.5):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.GELU(), nn.Linear(8, latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, 8), nn.GELU(), nn.Linear(8, 64), nn.Tanh())

    def forward(self, x):
        return self.decoder(self.encoder(x)).view_as(x)

    def _get_reconstruction_loss(self, batch):
        x, _ = batch
        loss = F.mse_loss(self.forward(x), x, reduction="none")
        return loss.sum(dim=[1, 2, 3]).mean(dim=[0])

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="min", factor=0.5, patience=0, threshold=self.hparams.threshold, min_lr=1e-5
        )
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss"}

    def training_step(self, batch, batch_idx):
        loss = self._get_reconstruction_loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = self._get_reconstruction_loss(batch)
        self.log("val_loss", loss)
