"""Purifiers by name: `purify(model, clean, purifiers.create("ibau"), ...)`."""

from . import clp, distill, finetune, ft_sam, ibau, polarizer, rnp  # noqa: F401  (imported to register)
from .base import Purifier, purifiers
from .run import PurifyResult, check_known, purify

__all__ = ["Purifier", "PurifyResult", "check_known", "purifiers", "purify"]
