"""Classifying short texts: how strongly to penalise which word, for which class, chosen on a validation split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bilevel.broadcast import Broadcast
from bilevel.constraints import Constraint, Positive
from bilevel.data import load_wordnet_nouns
from bilevel.data.wordnet import CLASSES
from bilevel.errors import UsageError
from bilevel.problem import Problem
from bilevel.rng import generator
from bilevel.sparse import SparseMatrix
from bilevel.tree import TensorDict

Tensors = Mapping[str, Tensor]
INTERCEPT = 1e-6  # penalty of intercepts: far below the curvature of a class that has texts


class TextPenalties(Problem):
    r"""Definitions of WordNet's nouns in 25 classes: `mean CE(X Wᵀ + b) + Σ λ w² / 2`, `X` sparse; convex.

    Words are those of the training texts, and `X` has their TF-IDF features: what a word's share of a text is worth, less
    where many texts have it. Adding a constant to all intercepts changes no prediction, so the first one is fixed at 0; the
    others are as good as unpenalised (by 1e-6, which a class without a training text needs to have a finite one).

    Args:
        penalty: one penalty (`shared`), one for each word (`per_feature`, 35,616) or for each word and class (`per_weight`,
            890,400); see `bilevel.broadcast.Broadcast`.
        start: starting value of every penalty.
        num_texts: texts that are used, drawn from the 82,064; None takes all.
        validation_fraction: share of the texts by which penalties are chosen.
        test_fraction: share of the texts for testing.
        holdout: share of the validation texts that the outer loss leaves out; the metric `holdout_loss` is theirs.
        root: the data folder; None takes the variable BILEVEL_DATA, or a cache folder in the user's home.
        split_seed: of the draw and the split.

    Raises:
        UsageError: there are not so many texts, or a number is out of its range.
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {"penalty": Positive()}

    def __init__(
        self,
        penalty: str = "shared",
        start: float = 1e-5,
        num_texts: int | None = None,
        validation_fraction: float = 0.2,
        test_fraction: float = 0.2,
        holdout: float = 0.1,
        root: str | None = None,
        split_seed: int = 0,
    ) -> None:
        """Load, split and count words."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        if not start > 0:
            raise UsageError(f"problem.start is the starting penalty and must be above 0, but is {start}.")
        texts, labels = load_wordnet_nouns(root)
        parts = _split(len(texts), num_texts, validation_fraction, test_fraction, holdout, split_seed)
        self.start_penalty = start
        self.y, self.y_validation, self.y_holdout, self.y_test = (labels[part] for part in parts)
        words = TfidfVectorizer().fit([texts[number] for number in parts[0].tolist()])
        features = words.transform(texts)
        self.x, self.x_validation, self.x_holdout, self.x_test = (
            SparseMatrix.of(features[part.numpy()], torch.float32) for part in parts
        )
        self.words = tuple(words.get_feature_names_out())
        self.broadcast = Broadcast.of("penalty", penalty, {"weight": self.init_params({})["weight"]})

    def init_hparams(self) -> TensorDict:
        """The penalties."""
        return self.broadcast.start(self.start_penalty, self.x.rows)

    def init_params(self, hparams: Tensors) -> TensorDict:
        """Zeros: the problem is convex."""
        shapes = {"weight": (len(CLASSES), self.x.shape[1]), "bias": (len(CLASSES) - 1,)}
        return {
            name: torch.zeros(shape, dtype=self.x.rows.dtype, device=self.x.rows.device)
            for name, shape in shapes.items()
        }

    def anchor(self, hparams: Tensors) -> tuple[TensorDict, TensorDict]:
        """The penalties, towards 0."""
        centre = self.init_params(hparams)
        bias = torch.full_like(centre["bias"], INTERCEPT)
        return {"weight": self.broadcast.expand(hparams)["weight"], "bias": bias}, centre

    def outputs(self, params: Tensors, hparams: Tensors, batch: None) -> Tensor:
        """Scores of the training texts."""
        return self.scores(params, self.x)

    def output_loss(self, outputs: Tensor, hparams: Tensors, batch: None) -> Tensor:
        """Cross-entropy of each text, `(N,)`."""
        return cross_entropy(outputs, self.y, reduction="none")

    def outer_loss(self, params: Tensors, hparams: Tensors, batch: None) -> Tensor:
        """Mean cross-entropy of the validation texts."""
        return cross_entropy(self.scores(params, self.x_validation), self.y_validation)

    def scores(self, params: Tensors, x: SparseMatrix) -> Tensor:
        """Of the classes, `(N, 25)`."""
        bias = torch.cat([params["bias"].new_zeros(1), params["bias"]])
        return x @ params["weight"].mT + bias

    def metrics(self, params: Tensors, hparams: Tensors) -> dict[str, float]:
        """Test loss, accuracy on the held-out splits, and the loss of the validation texts that the outer loss leaves out."""
        found = {}
        with torch.no_grad():
            for name, x, y in (
                ("validation", self.x_validation, self.y_validation),
                ("holdout", self.x_holdout, self.y_holdout),
                ("test", self.x_test, self.y_test),
            ):
                if len(y):
                    scores = self.scores(params, x)
                    found[f"{name}_loss"] = float(cross_entropy(scores, y))
                    found[f"{name}_accuracy"] = float((scores.argmax(-1) == y).double().mean())
        return found


def _split(
    available: int, wanted: int | None, validation: float, test: float, holdout: float, seed: int
) -> list[Tensor]:
    """Numbers of the texts for training, validation, those that validation leaves out, and testing."""
    number = available if wanted is None else wanted
    if not 1 <= number <= available:
        raise UsageError(f"problem.num_texts was expected to be from 1 to {available:,}, or null, but is {number:,}.")
    if not (0 < validation and 0 < test and validation + test < 1 and 0 <= holdout < 1):
        raise UsageError(
            "problem.validation_fraction and problem.test_fraction were expected to be above 0 with a sum below 1, and "
            f"problem.holdout a share from 0 to below 1, but they are {validation}, {test} and {holdout}."
        )
    order = torch.randperm(available, generator=generator(seed))[:number]
    num_validation, num_test = round(validation * number), round(test * number)
    num_holdout = round(holdout * num_validation)
    sizes = [number - num_validation - num_test, num_validation - num_holdout, num_holdout, num_test]
    if min(sizes[0], sizes[1], sizes[3]) < 1:
        raise UsageError(f"problem.num_texts={number} is too few for all splits: take more.")
    return list(order.split(sizes))
