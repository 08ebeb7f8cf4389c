"""Train image classifiers on data you did not collect yourself."""

from .checkpoint import load
from .data import Source, open_source
from .dataset import NABDataset
from .defended import DefendedModel
from .detectors import detectors
from .plan import load_plan
from .relabel import relabelers
from .runtime import Runtime
from .scan import Scan, scan_model
from .stamp import Stamp
from .train import TrainConfig, fit
from .types import EvalResult, NABPlan, SuspectReport

__all__ = [
    "DefendedModel", "EvalResult", "NABDataset", "NABPlan", "Runtime", "Scan", "Source", "Stamp", "SuspectReport",
    "TrainConfig", "detectors", "fit", "load", "load_plan", "open_source", "relabelers", "scan_model",
]  # fmt: skip
