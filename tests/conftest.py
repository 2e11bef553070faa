"""One thread for each test process: small tensors gain nothing from more, and parallel test processes would fight for cores."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _default_dtype():
    """The default dtype that a test found, after it: commands set that of their process."""
    found = torch.get_default_dtype()
    yield
    torch.set_default_dtype(found)
