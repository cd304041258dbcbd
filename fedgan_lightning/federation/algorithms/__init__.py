"""Federated algorithms, one file each."""

from fedgan_lightning.federation.algorithms.fedgan import FedGAN
from fedgan_lightning.federation.algorithms.fedprox import FedProx
from fedgan_lightning.federation.algorithms.forgiving import F2A, F2U
from fedgan_lightning.federation.algorithms.iflgan import IFLGAN
from fedgan_lightning.federation.algorithms.mdgan import MDGAN
from fedgan_lightning.federation.algorithms.mean_discriminator import MeanDiscriminator
from fedgan_lightning.federation.algorithms.scaffold import Scaffold
from fedgan_lightning.federation.algorithms.served_generator import ServedGenerator
from fedgan_lightning.federation.algorithms.uagan import UAGAN

__all__ = [
    "F2A",
    "F2U",
    "IFLGAN",
    "MDGAN",
    "UAGAN",
    "FedGAN",
    "FedProx",
    "MeanDiscriminator",
    "Scaffold",
    "ServedGenerator",
]
