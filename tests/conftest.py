"""One thread for each test process: small tensors gain nothing from more, and parallel test processes would fight for cores."""

import torch

torch.set_num_threads(1)
