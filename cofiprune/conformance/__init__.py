"""The laws of the masks as a battery that an adapter's author runs: `check_adapter`."""

from cofiprune.conformance.battery import Report, check_adapter

__all__ = ["Report", "check_adapter"]
