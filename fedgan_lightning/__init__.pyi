"""The names at top level; ``__init__.py`` reads them from here, and loads each when it is first used."""

from fedgan_lightning.api import Federation as Federation
from fedgan_lightning.checkpoints import BestCheckpoint as BestCheckpoint
from fedgan_lightning.checkpoints import LastCheckpoint as LastCheckpoint
from fedgan_lightning.data.datamodule import FederatedDataModule as FederatedDataModule
from fedgan_lightning.errors import CheckpointError as CheckpointError
from fedgan_lightning.errors import ClientError as ClientError
from fedgan_lightning.errors import ConfigurationError as ConfigurationError
from fedgan_lightning.errors import DataError as DataError
from fedgan_lightning.errors import FedGANError as FedGANError
from fedgan_lightning.errors import QuorumError as QuorumError
from fedgan_lightning.errors import UpdateError as UpdateError
from fedgan_lightning.evaluation.callback import Evaluation as Evaluation
from fedgan_lightning.federation.executors import AutoExecutor as AutoExecutor
from fedgan_lightning.federation.executors import SequentialExecutor as SequentialExecutor
from fedgan_lightning.federation.executors import VectorizedExecutor as VectorizedExecutor
from fedgan_lightning.federation.orchestrator import FederatedOrchestrator as FederatedOrchestrator
from fedgan_lightning.federation.rules import RoundRules as RoundRules
from fedgan_lightning.federation.rules import UpdateValidator as UpdateValidator
from fedgan_lightning.federation.secure import SecureAggregation as SecureAggregation
from fedgan_lightning.federation.server import ServerModule as ServerModule
from fedgan_lightning.federation.warm_start import StartFrom as StartFrom
from fedgan_lightning.gan.module import GAN as GAN
from fedgan_lightning.gan.text import LanguageModel as LanguageModel
from fedgan_lightning.version import __version__ as __version__
from fedgan_lightning.visuals.samples import SamplePictures as SamplePictures

__all__: list[str]
SUBMODULES: tuple[str, ...]
