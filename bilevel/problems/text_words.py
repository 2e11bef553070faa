"""What penalties of words have come to: the words that speak most for each class, the penalties of rare and common ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from bilevel.data.wordnet import CLASSES
from bilevel.errors import UsageError
from bilevel.problems.text_penalties import TextPenalties


class TextWords:
    """A callback that puts words into the summary, for the report to show.

    `summary["words"]` has for each class the words of largest weight at the best step, each with its penalty; and, for words
    in one training text, in two or three, in four to seven, ..., the quartiles of their penalties.

    Args:
        num_words: of each class.
    """

    def __init__(self, num_words: int = 6) -> None:
        """Check the number."""
        if num_words < 1:
            raise UsageError(f"TextWords needs num_words >= 1, but got {num_words}.")
        self.num_words = num_words

    def on_start(self, run: Any) -> None:
        """Look whether there are words."""
        problem = run.setup.problem.problem
        if not isinstance(problem, TextPenalties):
            raise UsageError(f"TextWords belongs to TextPenalties, but the problem is {type(problem).__name__}.")
        self.run, self.problem = run, problem

    def on_step(self, record: dict[str, Any], hparams: dict[str, Tensor]) -> None:
        """Nothing to do."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """Count and rank; not where a run was cut short, which will go on."""
        if not summary["finished"] or not summary["best"]:
            return
        problem, best = self.problem, self.run.best()
        weight = self.run.setup.problem.unravel(best.params)["weight"]  # (25, D)
        penalty = problem.broadcast.expand(best.hparams)["weight"].expand_as(weight)
        value, index = weight.topk(min(self.num_words, weight.shape[1]), -1)
        summary["words"] = {
            "classes": {
                name: [
                    {"word": problem.words[word], "weight": float(large), "penalty": float(penalty[row, word])}
                    for large, word in zip(value[row], index[row].tolist(), strict=True)
                ]
                for row, name in enumerate(CLASSES)
            },
            "by_frequency": _by_frequency(penalty, problem.x.columns.crow_indices().diff()),
        }


def _by_frequency(penalty: Tensor, num_texts: Tensor) -> list[dict[str, float]]:
    """Quartiles of the penalties `(25, D)` of words that are in 1, 2 to 3, 4 to 7, ... texts `(D,)`."""
    group, found = num_texts.clamp(min=1).double().log2().floor(), []
    for power in group.unique().tolist():
        members = (
            penalty[:, group == power].flatten().cpu().numpy()
        )  # torch's quantile takes 16 million numbers at most
        low, median, high = np.quantile(members, [0.25, 0.5, 0.75]).tolist()
        words = int((group == power).sum())
        found.append({"texts": 2.0**power, "words": words, "low": low, "median": median, "high": high})
    return found
