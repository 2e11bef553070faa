"""One value broadcast to hyperparameters: names, shapes, and derivatives that add up from fine to coarse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilevel import Broadcast
from bilevel.broadcast import GRANULARITIES
from bilevel.errors import UsageError
from bilevel.hypergradient import Implicit, hypergradient_at
from bilevel.linalg import DenseLU
from bilevel.problems import DigitsMLP
from bilevel.solvers import LBFGS

PARAMS = {
    "conv.weight": torch.ones(5, 3, 2, 2), "conv.bias": torch.ones(5), "block.0.weight": torch.ones(4, 5),
    "block.0.bias": torch.ones(4), "scale": torch.ones(()),
}  # fmt: skip
EXPECTED = {
    "shared": {"decay": ()},
    "per_layer": {"decay.conv": (), "decay.block.0": (), "decay.scale": ()},
    "per_tensor": {f"decay.{name}": () for name in PARAMS},
    "per_feature": {
        "decay.conv.weight": (1, 3, 1, 1), "decay.conv.bias": (1,), "decay.block.0.weight": (1, 5), "decay.block.0.bias": (1,),
        "decay.scale": (),
    },
    "per_weight": {f"decay.{name}": tuple(value.shape) for name, value in PARAMS.items()},
}  # fmt: skip


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_names_and_shapes_of_every_granularity(granularity):
    found = Broadcast.of("decay", granularity, PARAMS)
    assert found.shapes == EXPECTED[granularity]
    values = found.start(0.5, torch.zeros((), dtype=torch.float64))
    assert all(value.dtype is torch.float64 and bool((value == 0.5).all()) for value in values.values())
    expanded = found.expand(values)
    assert list(expanded) == list(PARAMS)
    for name, value in expanded.items():
        assert (value * PARAMS[name]).shape == PARAMS[name].shape


def test_groups_take_the_first_pattern_that_fits():
    found = Broadcast.of("decay", {"biases": ["*.bias", "scale"], "rest": "*"}, PARAMS)
    assert found.shapes == {"decay.rest": (), "decay.biases": ()}
    assert found.owners["scale"] == found.owners["conv.bias"] == "decay.biases"
    assert found.owners["conv.weight"] == found.owners["block.0.weight"] == "decay.rest"


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_single_tensor_needs_no_dotted_name(granularity):
    assert list(Broadcast.of("decay", granularity, {"a.weight": torch.ones(2, 3)}).shapes) == ["decay"]


@pytest.mark.parametrize(
    ("granularity", "said"),
    [
        ("per_wieght", "but is 'per_wieght': did you mean 'per_weight'"),
        ({"a": "conv.*"}, r"parameter 'block.0.weight' belongs to no group of 'decay'.*'\*' in a last group"),
        ({"a": "*", "b": "conv.*"}, "group 'b' of 'decay' fits none of the parameters"),
        ({}, "belongs to no group"),
        (["per_layer"], r"was expected to be shared, .* or groups, but is '\['per_layer'\]': did you mean 'per_layer'"),
        ([], r"but is '\[\]': choose one of them"),
        (3, "but is '3': choose one of them"),
    ],
    ids=["misspelt", "left over", "never reached", "empty", "list", "empty list", "number"],
)
def test_mistakes_are_one_sentence(granularity, said):
    with pytest.raises(UsageError, match=said):
        Broadcast.of("decay", granularity, PARAMS)


def test_no_parameters_are_refused():
    with pytest.raises(UsageError, match="but there are none"):
        Broadcast.of("decay", "shared", {})


@given(
    st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=4), st.sampled_from(sorted(GRANULARITIES))
)
def test_any_shapes_broadcast(shapes, granularity):
    params = {f"layer{index}.p{index}": torch.ones(shape) for index, shape in enumerate(shapes)}
    found = Broadcast.of("h", granularity, params)
    for name, value in found.expand(found.start(2.0)).items():
        assert torch.equal(value * params[name], 2.0 * params[name])


def gradient(granularity):
    problem = DigitsMLP(hidden=[3], start=0.05, penalty=granularity).to(dtype=torch.float64)
    torch.manual_seed(0)
    return hypergradient_at(
        problem, solver=LBFGS(max_steps=2000, atol=1e-9), method=Implicit(linear_solver=DenseLU())
    ).gradient


def test_coarse_derivatives_are_sums_of_fine_ones():
    fine = gradient("per_weight")
    by_tensor = {name: value.sum() for name, value in fine.items()}
    for name, value in gradient("per_tensor").items():
        torch.testing.assert_close(value, by_tensor[name], rtol=1e-6, atol=1e-10)
    (shared,) = gradient("shared").values()
    torch.testing.assert_close(shared, sum(by_tensor.values()), rtol=1e-6, atol=1e-10)
    for name, value in gradient("per_layer").items():
        expected = by_tensor[f"{name}.weight"] + by_tensor[f"{name}.bias"]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-10)
    features = gradient("per_feature")["penalty.layer0.weight"]
    torch.testing.assert_close(features, fine["penalty.layer0.weight"].sum(0, keepdim=True), rtol=1e-6, atol=1e-10)
    groups = gradient({"weights": "*.weight", "biases": "*.bias"})
    expected = by_tensor["penalty.layer0.bias"] + by_tensor["penalty.layer1.bias"]
    torch.testing.assert_close(groups["penalty.biases"], expected, rtol=1e-6, atol=1e-10)
