"""Purifiers by name: `purify(model, clean, purifiers.create("ibau"), ...)`."""

from . import clp, distill, finetune, ft_sam, ibau, polarizer, rnp  # noqa: F401  (imported to register)
from .base import Purifier, check_known, purifiers
from .run import PurifyResult, purify

__all__ = ["Purifier", "PurifyResult", "check_known", "purifiers", "purify"]
