"""Undeclared families: their tables are derived from a model, proved on it, and can be written to a file."""

from cofiprune.derivation.derive import Derived, derive, derived_adapter

__all__ = ["Derived", "derive", "derived_adapter"]
