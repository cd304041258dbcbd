"""Federated algorithms, one file each."""

from fedgan_lightning.federation.algorithms.fedgan import FedGAN
from fedgan_lightning.federation.algorithms.fedprox import FedProx
from fedgan_lightning.federation.algorithms.scaffold import Scaffold
from fedgan_lightning.federation.algorithms.served_generator import ServedGenerator

__all__ = ["FedGAN", "FedProx", "Scaffold", "ServedGenerator"]
