"""Training settings: one typed, strict object per trainer."""

from latentdiff.training.settings.autoencoder import AutoencoderSettings
from latentdiff.training.settings.base import Settings
from latentdiff.training.settings.classifier import ClassifierSettings
from latentdiff.training.settings.denoiser import DenoiserSettings
from latentdiff.training.settings.diffusion import DiffusionSettings
from latentdiff.training.settings.distillation import DistillationSettings
from latentdiff.training.settings.evaluation import EvaluationSettings, HeldOutSettings, LikelihoodSettings
from latentdiff.training.settings.finetune import AdaptedSettings, FinetuneSettings
from latentdiff.training.settings.pictures import Condition, DataSettings, DoctorSettings, MaskSettings
from latentdiff.training.settings.prior import PriorSettings
from latentdiff.training.settings.run import RunSettings

__all__ = [
    "AdaptedSettings",
    "AutoencoderSettings",
    "ClassifierSettings",
    "Condition",
    "DataSettings",
    "DenoiserSettings",
    "DiffusionSettings",
    "DistillationSettings",
    "DoctorSettings",
    "EvaluationSettings",
    "FinetuneSettings",
    "HeldOutSettings",
    "LikelihoodSettings",
    "MaskSettings",
    "PriorSettings",
    "RunSettings",
    "Settings",
]
