"""What a tracker or a user's own code can hook into: start, each outer step, end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bilevel.trainer.setup import Setup
from bilevel.trainer.state import Best, TrainState
from bilevel.tree import TensorDict


@dataclass(frozen=True)
class RunStart:
    """What is known when a run starts.

    Attributes:
        config: the resolved configuration; empty for `bilevel.fit`.
        directory: the run directory; None for `bilevel.fit`.
        step: number of the first outer step; above 0 when the run is resumed.
        num_steps: number of the last outer step plus one.
        hparams: starting hyperparameters in natural units.
        setup: the problem between vectors, the inner solver with its options fitted to it, and the method.
        latest: the hyperparameters of the next step in natural units, whenever it is called.
        best: the best step so far, its hyperparameters and its inner solution, whenever it is called.
    """

    config: dict[str, Any]
    directory: Path | None
    step: int
    num_steps: int
    hparams: dict[str, Tensor] = field(repr=False)
    setup: Setup = field(repr=False)
    latest: Callable[[], TensorDict] = field(repr=False)
    best: Callable[[], Best] = field(repr=False)

    @classmethod
    def of(
        cls,
        setup: Setup,
        state: TrainState,
        num_steps: int,
        config: dict[str, Any] | None = None,
        directory: Path | None = None,
    ) -> RunStart:
        """At the state before the first step."""

        def latest() -> TensorDict:
            with torch.no_grad():
                return setup.natural(state.raw)

        return cls(config or {}, directory, state.step, num_steps, latest(), setup, latest, lambda: state.best)


class Callback(Protocol):
    """Does nothing; override what is wanted (anything that has the three methods will do).

    Example:
        >>> class Print(Callback):
        ...     def on_step(self, record, hparams):
        ...         print(record["step"], record["outer_loss"])
    """

    def on_start(self, run: RunStart) -> None:
        """Before the first step."""

    def on_step(self, record: dict[str, Any], hparams: dict[str, Tensor]) -> None:
        """After each outer step.

        Args:
            record: flat, JSON-able figures of the step.
            hparams: natural units, the ones that the step's figures belong to (before the update).
        """

    def on_end(self, summary: dict[str, Any]) -> None:
        """After the last step, however the run ended (`finished` and `stopped_because` in the summary); may add entries."""
