"""Functions recorded on the GPU: one launch for a whole product, where each of its kernels would wait for the processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Run = Callable[[Tensor], Sequence[Tensor]]


class Replayed:
    """A function of one vector as a CUDA graph: run at its first call, recorded at its second, replayed from then on.

    A small network's product is some fifty kernels of a few microseconds each, and starting one from Python takes longer
    than running it. A recording starts all of them at once. It reads and writes the same memory at every replay, so the
    vector is copied in and the results are copied out; what else the function reads has to stay where it is.

    A function that cannot be recorded (it waits for a value on the processor, say) is run as it is.

    Args:
        run: of a vector, always of the same layout; to a sequence of tensors. Without side effects.
    """

    def __init__(self, run: Run) -> None:
        """Nothing is recorded yet."""
        self._run = run
        self._calls = 0
        self._replay: Run | None = None

    def __call__(self, vector: Tensor) -> Sequence[Tensor]:
        """The function's results, which nothing else writes to."""
        if self._replay is not None:
            return self._replay(vector)
        self._calls += 1
        # The first call is not recorded: it may be the only one, and it loads kernels, which a recording must not.
        if self._calls == 2 and not torch.cuda.is_current_stream_capturing():
            try:
                self._replay = _record(self._run, vector)
            except RuntimeError:
                # Nothing has been run, and torch has ended the recording, but not for its random generators: they refuse
                # to draw from then on. Any recording that succeeds sets them right.
                _record(lambda vector: [vector + 1], vector)
            else:
                return self._replay(vector)
        return self._run(vector)


def replayed(run: Run, device: torch.device) -> Run:
    """The function with its kernels recorded, on a CUDA device; as it is on any other."""
    return Replayed(run) if device.type == "cuda" else run


def _record(run: Run, vector: Tensor) -> Run:
    graph, place = torch.cuda.CUDAGraph(), vector.clone()
    # Other threads may go on using the device: only this one's calls are recorded.
    with torch.cuda.device(vector.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = run(place)

    def replay(vector: Tensor) -> Sequence[Tensor]:
        place.copy_(vector)
        graph.replay()
        return [result.clone() for result in results]

    return replay
