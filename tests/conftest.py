"""Settings and fixtures of all tests; the environment is set before any library reads it."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nab_defense.scan import Scan

torch.set_num_threads(2)


@pytest.fixture
def make_scan() -> Callable[..., Scan]:
    """make_scan(features (N, D), labels (N,), logits (N, K) or None) -> Scan; without logits the network only guesses."""

    def make(features: Any, labels: Any, logits: Any = None) -> Scan:
        labels = np.asarray(labels, dtype=np.int64)
        if logits is None:
            logits = np.zeros((len(labels), int(labels.max()) + 1))
        logits = np.asarray(logits, dtype=np.float32)
        losses = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels), reduction="none").numpy()
        return Scan(labels, losses, logits, np.asarray(features, dtype=np.float32), fingerprint="synthetic")

    return make
