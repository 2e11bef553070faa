"""Features and targets for sparse linear models: genes, words, numbers at random."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.data import load_khan, load_wordnet_nouns
from bilevel.data.khan import KINDS
from bilevel.data.wordnet import CLASSES
from bilevel.errors import UsageError, nearest
from bilevel.rng import generator
from bilevel.sparse import SparseMatrix


class Design(NamedTuple):
    """Features `(N, p)`, dense in float64 or sparse, and targets `(N,)`; the names of the features where they have some."""

    x: Tensor | SparseMatrix
    y: Tensor
    names: tuple[str, ...] | None = None


class Source(ABC):
    """Where features and targets come from."""

    @abstractmethod
    def load(self) -> Design:
        """All of them."""


@dataclass(frozen=True)
class KhanDesign(Source):
    """2,308 genes of 83 tumours, each standardised; the target is 1 for one kind and -1 for the three others.

    Args:
        kind: one of `bilevel.data.khan.KINDS`.
        root: the data folder; None takes the variable BILEVEL_DATA, or a cache folder in the user's home.
    """

    kind: str = "Ewing sarcoma"
    root: str | None = None

    def load(self) -> Design:
        """All samples, those for testing too."""
        number, found = _number(self.kind, KINDS, "problem.design.kind"), load_khan(self.root)
        x = found.expressions - found.expressions.mean(0)
        return Design(x / x.std(0, correction=0), _signs(found.kinds == number))


@dataclass(frozen=True)
class GlossDesign(Source):
    """TF-IDF features of definitions of WordNet's nouns; the target is 1 for one class and -1 for the 24 others.

    Args:
        kind: one of `bilevel.data.wordnet.CLASSES`.
        num_texts: drawn from the 82,064; None takes all.
        seed: of the draw.
        root: the data folder; None takes the variable BILEVEL_DATA, or a cache folder in the user's home.
    """

    kind: str = "person"
    num_texts: int | None = 10_000
    seed: int = 0
    root: str | None = None

    def load(self) -> Design:
        """Words that are in a single text are left out."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        number = _number(self.kind, CLASSES, "problem.design.kind")
        texts, labels = load_wordnet_nouns(self.root)
        most = len(texts)
        wanted = most if self.num_texts is None else self.num_texts
        if not 2 <= wanted <= most:
            raise UsageError(f"problem.design.num_texts was expected to be from 2 to {most:,}, but is {wanted:,}.")
        order = torch.randperm(most, generator=generator(self.seed))[:wanted]
        words = TfidfVectorizer(min_df=2)
        features = words.fit_transform([texts[index] for index in order.tolist()])
        y = _signs(labels[order] == number)
        return Design(SparseMatrix.of(features, torch.float64), y, tuple(words.get_feature_names_out()))


@dataclass(frozen=True)
class RandomDesign(Source):
    """Correlated normal features, a target that a few of them make, and noise.

    Args:
        num_examples: `N`.
        num_features: `p`.
        num_relevant: features with a weight of 1.
        correlation: of neighbouring features.
        signal_to_noise: ratio of the standard deviations of what they make and of the noise.
        seed: of all.
    """

    num_examples: int = 200
    num_features: int = 1000
    num_relevant: int = 10
    correlation: float = 0.5
    signal_to_noise: float = 3.0
    seed: int = 0

    def load(self) -> Design:
        """Feature `j` is `ρ` times its left neighbour plus fresh noise, of variance one."""
        if not 1 <= self.num_relevant <= self.num_features or not 0 <= self.correlation < 1:
            raise UsageError(
                "problem.design was expected to have num_relevant from 1 to num_features and correlation from 0 to below 1, "
                f"but has {self.num_relevant}, {self.num_features} and {self.correlation}."
            )
        rng = generator(self.seed)
        fresh = torch.randn(self.num_examples, self.num_features, generator=rng, dtype=torch.float64)
        x = fresh.clone()
        for column in range(1, self.num_features):
            x[:, column] = self.correlation * x[:, column - 1] + (1 - self.correlation**2) ** 0.5 * fresh[:, column]
        chosen = torch.linspace(0, self.num_features - 1, self.num_relevant).long()
        made = x[:, chosen].sum(-1)
        noise = torch.randn(self.num_examples, generator=rng, dtype=torch.float64)
        return Design(x, made + made.std() / self.signal_to_noise * noise)


def _number(kind: str, kinds: tuple[str, ...], key: str) -> int:
    if kind not in kinds:
        hint = nearest(kind, kinds, f"choose one of {', '.join(kinds)}.")
        raise UsageError(f"{key} was expected to be a class of the data, but is '{kind}': {hint}")
    return kinds.index(kind)


def _signs(mask: Tensor) -> Tensor:
    return torch.where(mask, 1.0, -1.0).double()
