"""A tracker that fails falls silent; the run goes on."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from bilevel.trainer.callbacks import RunStart

__all__ = ["GuardedTracker"]


class GuardedTracker(ABC):
    """A callback whose exceptions never reach the run: the first one prints a sentence and ends this tracker.

    Subclasses write `start`, `step` and `end`, and may write `abandon`; the trainer calls `on_start`, `on_step` and
    `on_end`, which are not meant to be overridden. `KeyboardInterrupt` and other non-errors pass through.

    Example:
        >>> class Fragile(GuardedTracker):
        ...     name = "a fragile tracker"
        ...     def start(self, run): raise RuntimeError("no network")
        ...     def step(self, record, hparams): print("never reached")
        ...     def end(self, summary): print("never reached")
        >>> tracker = Fragile()
        >>> tracker.on_start(None)  # on stderr: Tracking by a fragile tracker stopped ... no network ...
        >>> tracker.on_step({"step": 0}, {})
    """

    name: str = "a tracker"
    _failed = False

    @abstractmethod
    def start(self, run: RunStart) -> None:
        """Open whatever the tracker writes to."""

    @abstractmethod
    def step(self, record: Mapping[str, Any], hparams: Mapping[str, Tensor]) -> None:
        """Take in one outer step."""

    @abstractmethod
    def end(self, summary: Mapping[str, Any]) -> None:
        """Take in the summary and close."""

    def abandon(self) -> None:  # noqa: B027  (optional: most trackers have nothing to let go of)
        """Let go of what a failed tracker holds; called once, and its own exceptions are dropped."""

    def on_start(self, run: RunStart) -> None:
        """Call `start`, guarded."""
        self._attempt(self.start, run)

    def on_step(self, record: Mapping[str, Any], hparams: Mapping[str, Tensor]) -> None:
        """Call `step`, guarded."""
        self._attempt(self.step, record, hparams)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Call `end`, guarded."""
        self._attempt(self.end, summary)

    def _attempt(self, call: Callable[..., None], *args: Any) -> None:
        if self._failed:
            return
        try:
            call(*args)
        except Exception as error:
            self._failed = True
            self._let_go()
            reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(" .:")
            _say(f"Tracking by {self.name} stopped, the run goes on without it ({reason}).")

    def _let_go(self) -> None:
        try:
            self.abandon()
        except Exception as error:  # the first failure is the one worth reporting; this is for a debugger's eyes
            self._failure_of_abandon = error


def _say(sentence: str) -> None:
    try:
        print(sentence, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # stderr is closed: there is nobody left to tell
        return
