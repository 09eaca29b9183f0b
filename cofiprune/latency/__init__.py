"""Time as a cost: what blocks of each size take on this device, measured, and a model of any shape by their sum."""

from cofiprune.latency.cost import LatencyCost
from cofiprune.latency.table import Conditions, LatencyTable

__all__ = ["Conditions", "LatencyCost", "LatencyTable"]
