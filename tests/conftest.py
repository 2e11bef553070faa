"""One thread for each test process: small tensors gain nothing from more, and parallel test processes would fight for cores."""

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
