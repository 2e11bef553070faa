"""Data sets, splits, minibatches and few-shot tasks; knows no problem."""

from bilevel.data.episodes import ClassEpisodes, Episode, Examples, TaskSource
from bilevel.data.fashion_mnist import FashionMNIST, load_fashion_mnist
from bilevel.data.khan import Khan, load_khan
from bilevel.data.labels import mislabelled
from bilevel.data.minibatches import Minibatches, Partition
from bilevel.data.omniglot import Omniglot, load_omniglot
from bilevel.data.prefetch import Prefetched
from bilevel.data.root import data_root
from bilevel.data.sinusoid import Sinusoid
from bilevel.data.tabular import Split, load_digits
from bilevel.data.wordnet import Glosses, load_wordnet_nouns

__all__ = [
    "ClassEpisodes",
    "Episode",
    "Examples",
    "FashionMNIST",
    "Glosses",
    "Khan",
    "Minibatches",
    "Omniglot",
    "Partition",
    "Prefetched",
    "Sinusoid",
    "Split",
    "TaskSource",
    "data_root",
    "load_digits",
    "load_fashion_mnist",
    "load_khan",
    "load_omniglot",
    "load_wordnet_nouns",
    "mislabelled",
]
