"""One thread for each test process: small tensors gain nothing from more, and parallel test processes would fight for cores."""

import os

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _default_dtype():
    """Every test starts in the default dtype of a fresh process: commands and fixtures of a module set that of theirs."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def float64():
    """For modules whose problems are all to be in float64: `pytestmark = pytest.mark.usefixtures("float64")`."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def without_report(monkeypatch):
    """For runs in this process whose report nobody reads: drawing it takes longer than the run."""
    monkeypatch.setattr("bilevel.report.write_report", lambda directory: None)


@pytest.fixture(scope="session")
def omniglot_root():
    """The data folder, if Omniglot is in it: CI says that it has to be (BILEVEL_REQUIRE_DATA=1)."""
    from bilevel.data import data_root
    from bilevel.data.omniglot import FILE

    if not (data_root() / FILE).is_file() and os.environ.get("BILEVEL_REQUIRE_DATA") != "1":
        pytest.skip(
            f"{FILE} is not in {data_root()}: `python -m experiments.train experiment=imaml_omniglot` downloads it"
        )
    return str(data_root())


@pytest.fixture(scope="session")
def fashion_mnist():
    """Fashion-MNIST, if it is on this machine: CI says that it has to be (BILEVEL_REQUIRE_DATA=1)."""
    from bilevel.data import data_root, load_fashion_mnist
    from bilevel.data.fashion_mnist import DEBIAN, FOLDER

    if not any(folder.is_dir() for folder in (data_root() / FOLDER, DEBIAN)):
        if os.environ.get("BILEVEL_REQUIRE_DATA") != "1":
            pytest.skip(f"Fashion-MNIST is neither in {data_root() / FOLDER} nor installed (dataset-fashion-mnist)")
    return load_fashion_mnist()


@pytest.fixture(scope="session")
def wordnet():
    """WordNet's nouns, if they are on this machine: CI says that they have to be (BILEVEL_REQUIRE_DATA=1)."""
    from bilevel.data import data_root, load_wordnet_nouns
    from bilevel.data.wordnet import DEBIAN, FOLDER

    if not DEBIAN.is_file() and not (data_root() / FOLDER).is_dir():
        if os.environ.get("BILEVEL_REQUIRE_DATA") != "1":
            pytest.skip(f"WordNet's nouns are neither in {data_root() / FOLDER} nor installed (wordnet-base)")
    return load_wordnet_nouns()
