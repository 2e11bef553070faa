"""Frozen evaluation: inside a solve a loss is one fixed function, and what cannot be frozen is named."""

from bilevel.purity.findings import Fault, Finding, disturbances, randomness
from bilevel.purity.freeze import Purity

__all__ = ["Fault", "Finding", "Purity", "disturbances", "randomness"]
