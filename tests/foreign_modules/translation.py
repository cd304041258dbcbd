"""Pictures to pictures: CycleGAN and pix2pix over dictionaries of pictures, SRGAN with a frozen network in its loss."""

from __future__ import annotations

import itertools
import random

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F

# ---------------------------------------------------------------------- CycleGAN


class ImagePool:
    """Pictures that were generated before: half of what is asked for comes from here."""

    def __init__(self, pool_size):
        self.pool_size = pool_size
        if self.pool_size > 0:
            self.num_imgs = 0
            self.images = []

    def query(self, images):
        if self.pool_size == 0:
            return images
        return_images = []
        for image in images:
            image = torch.unsqueeze(image.data, 0)
            if self.num_imgs < self.pool_size:
                self.num_imgs = self.num_imgs + 1
                self.images.append(image)
                return_images.append(image)
            elif random.uniform(0, 1) > 0.5:
                random_id = random.randint(0, self.pool_size - 1)
                tmp = self.images[random_id].clone()
                self.images[random_id] = image
                return_images.append(tmp)
            else:
                return_images.append(image)
        return torch.cat(return_images, 0)


class ResnetBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv_block = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(dim, dim, 3), nn.InstanceNorm2d(dim))

    def forward(self, x):
        return x + self.conv_block(x)


def define_g(width):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.InstanceNorm2d(width),
        nn.ReLU(True),
        ResnetBlock(width),
        nn.Conv2d(width, 1, 3, padding=1),
        nn.Tanh(),
    )


def define_d(width):
    return nn.Sequential(nn.Conv2d(1, width, 4, 2, 1), nn.LeakyReLU(0.2, True), nn.Conv2d(width, 1, 4, 1, 1))


class CycleGAN(L.LightningModule):
    """Four networks, two optimizers over chained parameters, two pools, rates that fall with the epochs."""

    def __init__(
        self,
        lr: float = 0.002,
        lambda_cycle: float = 10.0,
        pool_size: int = 4,
        width: int = 3,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.netG_A = define_g(width)
        self.netG_B = define_g(width)
        self.netD_A = define_d(width)
        self.netD_B = define_d(width)
        self.fake_A_pool = ImagePool(pool_size)
        self.fake_B_pool = ImagePool(pool_size)

    def forward(self, real_A):
        return self.netG_A(real_A)

    @staticmethod
    def set_requires_grad(nets, requires_grad=False):
        for net in nets:
            for param in net.parameters():
                param.requires_grad = requires_grad

    def gan_loss(self, prediction, target_is_real):
        target = torch.full_like(prediction, 1.0 if target_is_real else 0.0)
        return F.mse_loss(prediction, target)

    def backward_d(self, netD, real, fake):
        return 0.5 * (self.gan_loss(netD(real), True) + self.gan_loss(netD(fake.detach()), False))

    def training_step(self, batch, batch_idx):
        real_A, real_B = batch["A"], batch["B"]
        optimizer_G, optimizer_D = self.optimizers()

        self.set_requires_grad([self.netD_A, self.netD_B], False)
        fake_B = self.netG_A(real_A)
        fake_A = self.netG_B(real_B)
        cycle = F.l1_loss(self.netG_B(fake_B), real_A) + F.l1_loss(self.netG_A(fake_A), real_B)
        loss_G = self.gan_loss(self.netD_A(fake_B), True) + self.gan_loss(self.netD_B(fake_A), True)
        loss_G = loss_G + self.hparams.lambda_cycle * cycle
        optimizer_G.zero_grad()
        self.manual_backward(loss_G)
        optimizer_G.step()

        self.set_requires_grad([self.netD_A, self.netD_B], True)
        loss_D = self.backward_d(self.netD_A, real_B, self.fake_B_pool.query(fake_B))
        loss_D = loss_D + self.backward_d(self.netD_B, real_A, self.fake_A_pool.query(fake_A))
        optimizer_D.zero_grad()
        self.manual_backward(loss_D)
        optimizer_D.step()
        self.log_dict({"loss_G": loss_G, "loss_D": loss_D}, prog_bar=True)

    def on_train_epoch_end(self):
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self):
        optimizer_G = torch.optim.Adam(
            itertools.chain(self.netG_A.parameters(), self.netG_B.parameters()), lr=self.hparams.lr, betas=(0.5, 0.999)
        )
        optimizer_D = torch.optim.Adam(
            itertools.chain(self.netD_A.parameters(), self.netD_B.parameters()), lr=self.hparams.lr, betas=(0.5, 0.999)
        )
        decay_start = self.trainer.max_epochs // 2

        def gamma(epoch):
            return 1.0 - max(0, epoch - decay_start) / float(self.trainer.max_epochs - decay_start + 1)

        schedulers = [torch.optim.lr_scheduler.LambdaLR(opt, lr_lambda=gamma) for opt in (optimizer_G, optimizer_D)]
        return [optimizer_G, optimizer_D], schedulers


# ---------------------------------------------------------------------- pix2pix


class UnetGenerator(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, width, 4, 2, 1), nn.LeakyReLU(0.2))
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.Dropout(0.5)
        )
        self.up = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(2 * width, 1, 4, 2, 1), nn.Tanh())

    def forward(self, x):
        down = self.down(x)
        return self.up(torch.cat([down, self.inner(down)], 1))


class PatchGAN(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(2, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 1, 3, 1, 1),
        )

    def forward(self, x, y):
        return self.model(torch.cat([x, y], dim=1))


class Pix2Pix(L.LightningModule):
    """Pairs of pictures; noise comes from dropout alone."""

    def __init__(self, learning_rate: float = 0.002, lambda_recon: float = 100.0, width: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.gen = UnetGenerator(width)
        self.patch_gan = PatchGAN(width)
        self.adversarial_criterion = nn.BCEWithLogitsLoss()
        self.recon_criterion = nn.L1Loss()

    def forward(self, x):
        return self.gen(x)

    def _gen_step(self, real_images, conditioned_images):
        fake_images = self.gen(conditioned_images)
        disc_logits = self.patch_gan(fake_images, conditioned_images)
        adversarial_loss = self.adversarial_criterion(disc_logits, torch.ones_like(disc_logits))
        recon_loss = self.recon_criterion(fake_images, real_images)
        return adversarial_loss + self.hparams.lambda_recon * recon_loss

    def _disc_step(self, real_images, conditioned_images):
        fake_images = self.gen(conditioned_images).detach()
        fake_logits = self.patch_gan(fake_images, conditioned_images)
        real_logits = self.patch_gan(real_images, conditioned_images)
        fake_loss = self.adversarial_criterion(fake_logits, torch.zeros_like(fake_logits))
        real_loss = self.adversarial_criterion(real_logits, torch.ones_like(real_logits))
        return (real_loss + fake_loss) / 2

    def training_step(self, batch, batch_idx):
        real, condition = batch["B"], batch["A"]
        gen_opt, disc_opt = self.optimizers()

        disc_loss = self._disc_step(real, condition)
        disc_opt.zero_grad()
        self.manual_backward(disc_loss)
        disc_opt.step()
        self.log("PatchGAN Loss", disc_loss)

        gen_loss = self._gen_step(real, condition)
        gen_opt.zero_grad()
        self.manual_backward(gen_loss)
        gen_opt.step()
        self.log("Generator Loss", gen_loss)

    def configure_optimizers(self):
        lr = self.hparams.learning_rate
        gen_opt = torch.optim.Adam(self.gen.parameters(), lr=lr)
        disc_opt = torch.optim.Adam(self.patch_gan.parameters(), lr=lr)
        return gen_opt, disc_opt


# ---------------------------------------------------------------------- SRGAN


class PerceptualLoss(nn.Module):
    """Compares what a network that is trained already sees in two pictures."""

    def __init__(self):
        super().__init__()
        self.vgg = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1)
        )
        self.vgg.eval()
        for p in self.vgg.parameters():
            p.requires_grad = False

    def forward(self, fake, real):
        return F.mse_loss(self.vgg(fake), self.vgg(real).detach())


class SRGAN(L.LightningModule):
    """Pictures of twice the size; in the first epochs by their pixels alone."""

    def __init__(self, learning_rate: float = 0.002, pretrain_epochs: int = 1, width: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.PReLU(), nn.Conv2d(width, 4, 3, padding=1), nn.PixelShuffle(2)
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(16 * width, 1), nn.Sigmoid()
        )
        self.perceptual = PerceptualLoss()

    def forward(self, lr_image):
        return self.generator(lr_image)

    def training_step(self, batch, batch_idx):
        hr_image, lr_image = batch
        opt_disc, opt_gen = self.optimizers()

        if self.current_epoch < self.hparams.pretrain_epochs:
            content_loss = F.mse_loss(self(lr_image), hr_image)
            opt_gen.zero_grad()
            self.manual_backward(content_loss)
            opt_gen.step()
            self.log("loss/pretrain", content_loss)
            return

        disc_loss = self._disc_loss(hr_image, lr_image)
        opt_disc.zero_grad()
        self.manual_backward(disc_loss)
        opt_disc.step()
        self.log("loss/disc", disc_loss, on_step=True, on_epoch=True)

        gen_loss = self._gen_loss(hr_image, lr_image)
        opt_gen.zero_grad()
        self.manual_backward(gen_loss)
        opt_gen.step()
        self.log("loss/gen", gen_loss, on_step=True, on_epoch=True)

    def _disc_loss(self, hr_image, lr_image):
        real_pred = self.discriminator(hr_image)
        # labels are noisy, so that the discriminator does not win
        real_loss = F.binary_cross_entropy(real_pred, 1 - 0.1 * torch.rand_like(real_pred))
        fake_pred = self.discriminator(self(lr_image).detach())
        return 0.5 * (real_loss + F.binary_cross_entropy(fake_pred, 0.1 * torch.rand_like(fake_pred)))

    def _gen_loss(self, hr_image, lr_image):
        fake = self(lr_image)
        fake_pred = self.discriminator(fake)
        adv_loss = F.binary_cross_entropy(fake_pred, torch.ones_like(fake_pred))
        return self.perceptual(fake, hr_image) + 0.001 * adv_loss

    def configure_optimizers(self):
        opt_disc = torch.optim.Adam(self.discriminator.parameters(), lr=self.hparams.learning_rate)
        opt_gen = torch.optim.Adam(self.generator.parameters(), lr=self.hparams.learning_rate)
        return [opt_disc, opt_gen], []
