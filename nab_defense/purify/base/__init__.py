"""What purifiers share."""

from .centring import recentred
from .choice import LEAST_GAIN, Choice, hardly_turned, may_keep
from .hardening import Attacked, Hardening, hardened, missed, rate_for
from .inputs import answers, count_outputs
from .judge import Judge
from .known import check_known, frozen_pixels
from .loops import FineTuning, Stepping, due, fine_tuned, keep, stepped, taken_up
from .protocol import Candidates, Notes, Purifier, check_finite, divergence, frozen, norms, purifiers, train_norms
from .settings import in_range

__all__ = [
    "LEAST_GAIN", "Attacked", "Candidates", "Choice", "FineTuning", "Hardening", "Judge", "Notes",
    "Purifier", "Stepping", "answers", "check_finite", "check_known", "count_outputs", "divergence", "due",
    "fine_tuned", "frozen", "frozen_pixels", "hardened", "hardly_turned", "in_range", "keep", "may_keep",
    "missed", "norms", "purifiers", "rate_for", "recentred", "stepped", "taken_up", "train_norms",
]  # fmt: skip
