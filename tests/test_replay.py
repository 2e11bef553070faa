"""Functions recorded on a GPU; the order of things everywhere, and the recording itself where there is a GPU."""

import pytest
import torch

import bilevel.linalg.replay as module
from bilevel.linalg.compiled import CompiledDerivatives
from bilevel.linalg.differentiate import differentiate
from bilevel.linalg.replay import Replayed, replayed

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Counted:
    """Twice a vector; knows how often it was run."""

    def __init__(self):
        self.runs = 0

    def __call__(self, vector):
        self.runs += 1
        return [2 * vector]


@pytest.fixture
def pretended(monkeypatch):
    """A GPU for what is run on none."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return monkeypatch


def test_on_the_processor_nothing_is_recorded():
    run = Counted()
    assert replayed(run, torch.device("cpu")) is run


def test_the_first_call_runs_the_second_records_and_the_others_replay(pretended):
    recorded = []

    def record(run, vector):
        recorded.append(vector)
        return lambda vector: [3 * vector]

    pretended.setattr(module, "_record", record)
    run = Counted()
    function = Replayed(run)
    assert [float(function(torch.tensor(float(n)))[0]) for n in range(1, 5)] == [2.0, 6.0, 9.0, 12.0]
    assert run.runs == 1 and [float(vector) for vector in recorded] == [2.0]


def test_what_cannot_be_recorded_is_run_and_tried_once(pretended):
    tried, run = [], Counted()

    def record(function, vector):
        tried.append(function)
        if function is run:
            raise RuntimeError("operation not permitted when stream is capturing")

    pretended.setattr(module, "_record", record)
    function = Replayed(run)
    assert [float(function(torch.tensor(float(n)))[0]) for n in range(1, 5)] == [2.0, 4.0, 6.0, 8.0]
    assert run.runs == 4 and tried.count(run) == 1


@GPU
def test_a_recording_gives_what_the_function_gives_and_keeps_its_results():
    weight = torch.randn(50, 50, device="cuda")
    run = Counted()
    function = Replayed(lambda vector: [weight @ vector, run(vector)[0]])
    vectors = torch.randn(6, 50, device="cuda").unbind()
    results = [function(vector) for vector in vectors]
    assert run.runs == 2  # once as it is, once recorded
    for vector, (image, double) in zip(vectors, results, strict=True):
        torch.testing.assert_close(image, weight @ vector)
        assert torch.equal(double, 2 * vector)


@GPU
def test_a_function_that_waits_for_a_value_is_run_as_it_is():
    function = Replayed(lambda vector: [vector * float(vector.sum())])
    for number in range(1, 5):
        vector = torch.full((2,), float(number), device="cuda")
        assert function(vector)[0].tolist() == [2.0 * number**2] * 2
    torch.randn(3, device="cuda")  # a recording that has failed leaves the random generators as they were


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (3,)], ids=["one system", "a batch"])
def test_compiled_products_are_the_eager_ones_at_every_point(batch, dtype):
    inputs = torch.randn(40, 8, device="cuda", dtype=dtype)

    def loss(x, args, data):
        return (inputs @ x.unsqueeze(-1)).squeeze(-1).tanh().square().mean(-1) + (args["c"] * x.square()).sum(-1)

    compiled = CompiledDerivatives()
    args = {"c": torch.rand(8, device="cuda", dtype=dtype)}
    points = [torch.randn(*batch, 8, device="cuda", dtype=dtype) for _ in range(3)]
    found = [compiled.at(loss, point, args) for point in points]
    for point, here in zip(points, found, strict=True):  # each point keeps its own recording
        expected = differentiate(loss, point, args)
        assert here.fallback is None
        for _ in range(4):
            vector = torch.randn(*batch, 8, device="cuda", dtype=dtype)
            torch.testing.assert_close(here.operator.mv(vector), expected.operator.mv(vector), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(here.mixed(vector)["c"], expected.mixed(vector)["c"], rtol=1e-4, atol=1e-5)
