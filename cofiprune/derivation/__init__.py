"""Families that nobody has declared: their tables are derived from a model, proved on it, and can be written down."""

from cofiprune.derivation.adapter import derived_adapter
from cofiprune.derivation.derive import Derived, derive

__all__ = ["Derived", "derive", "derived_adapter"]
