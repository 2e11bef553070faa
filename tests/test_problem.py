"""What a user writes and what becomes of it: problems, plain vectors, constraints, names, minibatches, bad input."""

import doctest
from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from bilevel import check, hypergradient_at
from bilevel.batches import StepBatches
from bilevel.constraints import Bijections, Box, Positive, Real, Simplex, UnitInterval
from bilevel.data import Minibatches, Split, load_digits
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient import (
    FiniteDifference,
    ForwardMode,
    Hypergradient,
    Implicit,
    OneStep,
    Unrolled,
    find_paths,
)
from bilevel.hypergradient.paths import check_not_all_zero, check_paths
from bilevel.problem import Problem
from bilevel.receipt import Receipt
from bilevel.rng import generator, get_state, normal, seed_everything, set_state
from bilevel.solvers import LBFGS, GradientDescent, NewtonCG, TorchOptimizer
from bilevel.trainer import fit
from bilevel.trainer.setup import set_up
from bilevel.tree import Layout, detach, flatten_names, to

pytestmark = pytest.mark.usefixtures("float64")


class Ridge(Problem):
    """Two named parameters, nested hyperparameters, every task its own data where there are tasks."""

    constraints = {"penalty": Positive()}

    def __init__(self, num_tasks=None):
        self.num_tasks = num_tasks
        self.x = normal((5, 3), generator(1), torch.float64)
        self.y = normal((5,), generator(2), torch.float64)
        self.mask = torch.ones(5, dtype=torch.int64)
        self.scale = torch.nn.Linear(1, 1)

    def init_hparams(self):
        return {
            "penalty": {"weight": torch.tensor([0.5, 1.0, 2.0]), "bias": torch.tensor(0.3)},
            "shift": torch.tensor(0.0),
        }

    def init_params(self, hparams):
        return {"layer": {"weight": hparams["shift"] + torch.zeros(3)}, "bias": torch.zeros(())}

    def inner_loss(self, params, hparams, batch):
        y = self.y if batch is None else batch
        fit = (self.x @ params["layer.weight"] + params["bias"] - y).square().sum()
        weights = (hparams["penalty.weight"] * params["layer.weight"].square()).sum()
        return fit + weights + hparams["penalty.bias"] * params["bias"].square()

    def outer_loss(self, params, hparams, batch):
        return params["layer.weight"].square().sum() + params["bias"]


def natural(problem):
    return flatten_names(problem.init_hparams())


# ---------------------------------------------------------------------------------------------------------------------
# Names and vectors

shapes = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes=shapes, batch=st.lists(st.integers(1, 3), max_size=2).map(tuple))
def test_ravelling_there_and_back_changes_nothing(shapes, batch):
    tensors = {f"p{k}": torch.randn((*batch, *shape)) for k, shape in enumerate(shapes)}
    layout = Layout.of(tensors, num_batch=len(batch))
    vector = layout.ravel(tensors, num_batch=len(batch))
    assert vector.shape == (*batch, layout.size) and layout.size == sum(layout.sizes)
    back = layout.unravel(vector)
    assert list(back) == list(tensors)
    assert all(torch.equal(back[name], value) for name, value in tensors.items())
    shuffled = dict(reversed(tensors.items()))  # the layout decides the order, not the dictionary
    assert torch.equal(layout.ravel(shuffled, num_batch=len(batch)), vector)


def test_ravelling_is_differentiable_and_empty_layouts_work():
    tensors = {"a": torch.ones(2, requires_grad=True), "b": torch.ones((), requires_grad=True)}
    layout = Layout.of(tensors)
    (layout.ravel(tensors) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert tensors["a"].grad.tolist() == [1, 2] and float(tensors["b"].grad) == 3
    assert Layout.of({}).size == 0 and Layout.of({}).unravel(torch.zeros(0)) == {}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.ones(2)}, r"missing \['b'\], not expected \[\]"),
        ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, r"missing \[\], not expected \['c'\]"),
        ({"a": torch.ones(2), "b": torch.ones(4)}, r"'b' was expected to have shape \(3,\), but has \(4,\)"),
    ],
)
def test_tensors_that_do_not_fit_the_layout_are_refused(tensors, message):
    layout = Layout.of({"a": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(UsageError, match=message):
        layout.ravel(tensors)


@pytest.mark.parametrize(
    ("nested", "message"),
    [
        ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, "two tensors have the name 'a.b': rename one"),
        ({"a": torch.ones(1), "a.b": torch.ones(1)}, "'a' is a tensor and also the group of 'a.b': rename one"),
        ({"a.b.c": torch.ones(1), "a": torch.ones(1)}, "'a' is a tensor and also the group of 'a.b.c'"),
        ({"a": {"b": 3.0}}, r"'a.b' was expected to be a tensor, but is a float: write torch.tensor"),
        ({"a": [1, 2]}, "'a' was expected to be a tensor, but is a list"),
    ],
)
def test_names_that_collide_and_values_that_are_no_tensors_are_refused(nested, message):
    with pytest.raises(UsageError, match=message):
        flatten_names(nested)


def test_dictionaries_move_and_detach_without_touching_integers():
    tensors = {"x": torch.ones(2, requires_grad=True), "n": torch.arange(3)}
    moved = to(tensors, dtype=torch.float32)
    assert moved["x"].dtype == torch.float32 and moved["n"].dtype == torch.int64
    assert not detach(tensors)["x"].requires_grad and tensors["x"].requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Constraints

INSIDE = {
    "real": (Real(), torch.tensor([-3.0, 0.0, 2.5], dtype=torch.float64)),
    "positive": (Positive(), torch.tensor([1e-12, 1.0, 3e8], dtype=torch.float64)),
    "box": (Box(-2.0, 5.0), torch.tensor([-1.999, 0.0, 4.99], dtype=torch.float64)),
    "unit interval": (UnitInterval(), torch.tensor([0.001, 0.5, 0.999], dtype=torch.float64)),
    "simplex": (Simplex(), torch.tensor([[0.2, 0.3, 0.5], [0.98, 0.01, 0.01]], dtype=torch.float64)),
}


@pytest.mark.parametrize(("constraint", "value"), INSIDE.values(), ids=INSIDE)
def test_natural_values_survive_the_way_to_raw_and_back(constraint, value):
    raw = constraint.to_raw(value)
    torch.testing.assert_close(constraint.to_natural(raw), value, rtol=1e-10, atol=1e-14)
    assert gradcheck(constraint.to_natural, (raw.clone().clamp(-3, 3).requires_grad_(),))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(raw=st.lists(st.floats(-30, 30), min_size=2, max_size=4))
def test_no_step_of_the_optimiser_leaves_the_set(raw):
    raw = torch.tensor(raw, dtype=torch.float64)
    assert bool((Positive().to_natural(raw) > 0).all())
    box = Box(-1.0, 2.0).to_natural(raw)
    assert bool((box >= -1).all()) and bool((box <= 2).all())
    simplex = Simplex().to_natural(raw)
    assert len(simplex) == len(raw) + 1 and bool((simplex >= 0).all())
    assert float(simplex.sum()) == pytest.approx(1.0, abs=1e-12)


OUTSIDE = [
    (Positive(), [1.0, 0.0], "'name' was expected to be above 0, but has values from 0 to 1: start it strictly inside"),
    (Positive(), [-1.0], "above 0, but has values from -1 to -1"),
    (Positive(), [float("inf")], "above 0, but has values from inf to inf"),
    (Real(), [float("nan")], "'name' was expected to be real"),
    (Box(0.0, 2.0), [2.0], "between 0 and 2, but has values from 2 to 2"),
    (Box(0.0, 2.0), [float("nan")], "between 0 and 2, but has values from nan to nan"),
    (UnitInterval(), [0.0, 0.5], "between 0 and 1, but has values from 0 to 0.5"),
    (Simplex(), [0.5, 0.4], "positive with sum 1 .* a sum of 0.9: divide it by its sum"),
    (Simplex(), [1.2, -0.2], "positive with sum 1 .*smallest entry -0.2"),
]


@pytest.mark.parametrize(("constraint", "value", "message"), OUTSIDE)
def test_values_outside_the_set_or_on_its_border_are_refused(constraint, value, message):
    with pytest.raises(UsageError, match=message):
        constraint.to_raw(torch.tensor(value), "name")


def test_constraints_match_names_and_groups_and_the_longest_wins():
    declared = {"penalty": Positive(), "penalty.bias": Box(0.0, 1.0)}
    matched = Bijections.of(declared, ["penalty.weight", "penalty.bias", "penalty_rate"]).constraints
    assert matched == {"penalty.weight": Positive(), "penalty.bias": Box(0.0, 1.0), "penalty_rate": Real()}
    with pytest.raises(UsageError, match=r"constraints name 'penality', but the hyperparameters are \['penalty'\]"):
        Bijections.of({"penality": Positive()}, ["penalty"])
    with pytest.raises(UsageError, match="Box needs low < high, but got 1 and 1"):
        Box(1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The problem between vectors


def test_a_flat_problem_is_the_problem():
    problem = Ridge()
    hparams = natural(problem)
    flat = FlatProblem.of(problem, hparams)
    x = normal((4,), generator(3), torch.float64)
    params = {"layer.weight": x[:3], "bias": x[3]}
    objective = flat.objective(None)
    assert torch.equal(objective.loss(x, hparams), problem.inner_loss(params, hparams, None))
    assert torch.equal(flat.outer_loss(x, hparams, None), problem.outer_loss(params, hparams, None))
    with torch.no_grad():
        gradient = objective.gradient(x, hparams)
    step, difference = 1e-6, torch.zeros(4)
    for k, e in enumerate(step * torch.eye(4)):
        difference[k] = (objective.loss(x + e, hparams) - objective.loss(x - e, hparams)) / (2 * step)
    torch.testing.assert_close(gradient, difference, rtol=1e-7, atol=1e-7)


def test_the_starting_point_keeps_its_path_to_the_hyperparameters():
    problem = Ridge()
    hparams = {name: value.requires_grad_() for name, value in natural(problem).items()}
    start = FlatProblem.of(problem, hparams).start(hparams)
    (pulled,) = torch.autograd.grad(start.sum(), hparams["shift"])
    assert float(pulled) == 3


def test_tasks_are_written_once_and_solved_together():
    problem, single = Ridge(num_tasks=4), Ridge()
    hparams = natural(problem)
    flat, alone = FlatProblem.of(problem, hparams), FlatProblem.of(single, hparams)
    data, x = normal((4, 5), generator(4), torch.float64), normal((4, 4), generator(5), torch.float64)
    assert flat.start(hparams).shape == (4, 4) and flat.num_batch == 1 and alone.num_batch == 0
    losses = flat.objective(data).loss(x, hparams)
    with torch.no_grad():
        gradients = flat.objective(data).gradient(x, hparams)
    for task in range(4):
        torch.testing.assert_close(losses[task], alone.objective(data[task]).loss(x[task], hparams))
        with torch.no_grad():
            torch.testing.assert_close(gradients[task], alone.objective(data[task]).gradient(x[task], hparams))
    assert flat.outer_loss(x, hparams, None).shape == (4,)
    assert flat.unravel(x)["layer.weight"].shape == (4, 3)


def test_outputs_output_loss_and_penalty_make_the_inner_loss():
    class FromOutputs(Ridge):
        inner_loss = Problem.inner_loss

        def outputs(self, params, hparams, batch):
            return self.x @ params["layer.weight"]

        def output_loss(self, outputs, hparams, batch):
            return (outputs - self.y).square()

    problem, hparams = FromOutputs(), natural(Ridge())
    params = {"layer.weight": torch.ones(3), "bias": torch.zeros(())}
    mean = (problem.x.sum(-1) - problem.y).square().mean()
    torch.testing.assert_close(problem.inner_loss(params, hparams, None), mean)
    FromOutputs.penalty = lambda self, params, hparams: hparams["penalty.bias"] * 2
    torch.testing.assert_close(problem.inner_loss(params, hparams, None), mean + 0.6)


def test_an_optimality_takes_the_place_of_the_loss():
    class Equilibrium(Ridge):
        def optimality(self, params, hparams, batch):
            return {"layer": {"weight": params["layer.weight"] - 1.0}, "bias": params["bias"] * hparams["penalty.bias"]}

    hparams = natural(Ridge())
    for num_tasks, shape in ((None, (4,)), (2, (2, 4))):
        objective = FlatProblem.of(Equilibrium(num_tasks), hparams).objective(None)
        value = objective.gradient(torch.full(shape, 3.0), hparams)
        torch.testing.assert_close(value, torch.tensor([2.0, 2.0, 2.0, 0.9]).expand(shape))
        assert objective.loss is None


def test_a_problem_moves_with_its_tensors_and_modules():
    problem = Ridge().to(dtype=torch.float32)
    assert problem.x.dtype == torch.float32 and problem.mask.dtype == torch.int64
    assert problem.scale.weight.dtype == torch.float32 and Ridge().metrics({}, {}) == {}


Pair = namedtuple("Pair", ["x", "label"])


def test_a_problem_moves_what_it_holds_however_it_is_nested():
    problem = Ridge()
    shared = [torch.ones(2), torch.ones(2, dtype=torch.int64)]
    problem.splits = {"train": shared, "val": (torch.ones(1), "name")}
    problem.pair, problem.named = Pair(torch.ones(1), 3), OrderedDict(a=torch.ones(1))
    problem.split, problem.networks = Split(torch.ones(2, 2), torch.arange(2)), [torch.nn.Linear(1, 1)]
    problem.to(dtype=torch.float32).to("cpu")
    assert [part.dtype for part in problem.splits["train"]] == [torch.float32, torch.int64]
    assert problem.splits["val"][0].dtype == torch.float32 and problem.splits["val"][1] == "name"
    assert isinstance(problem.pair, Pair) and problem.pair.x.dtype == torch.float32 and problem.pair.label == 3
    assert isinstance(problem.named, OrderedDict) and problem.named["a"].dtype == torch.float32
    assert problem.split.x.dtype == torch.float32 and problem.split.y.dtype == torch.int64
    assert problem.networks[0].weight.dtype == torch.float32
    assert shared[0].dtype == torch.float64  # somebody else's list stays as it was


@pytest.mark.parametrize("num_tasks", [None, 2])
def test_starting_values_and_batches_follow_the_problem_to_its_dtype(num_tasks):
    """The problem makes them in torch's default dtype, wherever it has been moved."""

    class Stubborn(NoShift):
        def inner_batches(self, step, inner_step):
            batch = {"y": [torch.zeros(5, dtype=torch.float64)], "index": torch.arange(5)}
            return (
                batch if num_tasks is None else {"y": [torch.zeros(2, 5)], "index": torch.zeros(2, dtype=torch.int64)}
            )

        def outer_batches(self, step, inner_step):
            return torch.zeros(2)

        def inner_loss(self, params, hparams, batch):
            assert batch["y"][0].dtype == params["bias"].dtype == hparams["penalty.bias"].dtype == torch.float32
            assert batch["index"].dtype == torch.int64
            return super().inner_loss(params, hparams, batch["y"][0])

    problem = Stubborn(num_tasks).to(dtype=torch.float32)
    setup, state = prepare(problem)
    assert state.params.dtype == torch.float32 and state.params.device == problem.x.device
    assert {value.dtype for value in state.raw.values()} == {torch.float32}
    assert StepBatches(problem, 0).outer.dtype == torch.float32
    result = Implicit().compute(
        setup.problem, GradientDescent(max_steps=2), state.params, setup.natural(state.raw), StepBatches(problem, 0), {}
    )
    assert result.params.dtype == torch.float32


def test_one_place_decides_the_device(monkeypatch):
    """Everything that the problem's methods return goes through `place`, which knows the device of the latest `to`."""
    problem = Mini().to("cpu").to(dtype=torch.float64)
    assert (problem._device, problem._dtype) == (torch.device("cpu"), torch.float64)
    assert (Ridge()._device, Ridge()._dtype) == (None, None)
    placed = []
    monkeypatch.setattr(Mini, "place", lambda self, value: placed.append(value) or value)
    prepare(problem)
    names = {name for value in placed for name in (value if isinstance(value, dict) else {"batch": 0})}
    assert names == {"penalty.weight", "penalty.bias", "layer.weight", "bias", "batch"}


def test_the_problem_of_the_documentation_runs_where_it_was_moved():
    names = {"torch": torch, "Problem": Problem}
    for example in doctest.DocTestParser().get_examples(Problem.__doc__):
        exec(example.source, names)
    torch.set_default_dtype(torch.float32)
    result = fit(names["Ridge"]().to(dtype=torch.float64), num_steps=3)
    assert result.hparams["penalty"].dtype == result.params["w"].dtype == torch.float64
    assert result.summary["dtype"] == "float64" and result.history[2]["outer_loss"] < result.history[0]["outer_loss"]


MISSING = {
    "init_hparams": lambda p: p.init_hparams(),
    "init_params": lambda p: p.init_params({}),
    "inner_loss": lambda p: p.inner_loss({}, {}, None),
    "outer_loss": lambda p: p.outer_loss({}, {}, None),
}


@pytest.mark.parametrize(("name", "call"), MISSING.items(), ids=MISSING)
def test_a_method_that_is_missing_is_asked_for_by_name(name, call):
    class Incomplete(Problem):
        pass

    with pytest.raises(UsageError, match=rf"Incomplete needs (a method )?{name}\(self"):
        call(Incomplete())


@pytest.mark.parametrize("num_tasks", [None, 3])
@pytest.mark.parametrize(
    ("returned", "came"), [(torch.ones(5), r"\(5,\)"), (torch.ones(1), r"\(1,\)"), (2.5, "float"), (None, "NoneType")]
)
def test_a_loss_that_is_no_scalar_is_refused(num_tasks, returned, came):
    class Wrong(Ridge):
        def inner_loss(self, params, hparams, batch):
            return returned

        outer_loss = inner_loss

    flat = FlatProblem.of(Wrong(num_tasks), natural(Ridge()))
    x = flat.start(natural(Ridge()))
    with pytest.raises(
        UsageError, match=rf"inner_loss was expected to return a scalar .* one task, but returned {came}"
    ):
        flat.objective(None).loss(x, {})
    with pytest.raises(
        UsageError, match=rf"outer_loss was expected to return a scalar .*{came}: take the mean or the sum"
    ):
        flat.outer_loss(x, {}, None)


# ---------------------------------------------------------------------------------------------------------------------
# Setting up: what is refused before the first step


def adam(leaves):
    return torch.optim.Adam(leaves, lr=0.1)


def prepare(problem, solver=None, method=None):
    return set_up(problem, solver or GradientDescent(), method or Implicit(), adam, None)


class NoShift(Ridge):
    """The ridge without the hyperparameter that only enters the starting point."""

    def init_hparams(self):
        return {"penalty": {"weight": torch.tensor([0.5, 1.0, 2.0]), "bias": torch.tensor(0.3)}}

    def init_params(self, hparams):
        return {"layer": {"weight": torch.zeros(3)}, "bias": torch.zeros(())}


def with_hparams(**hparams):
    class Changed(NoShift):
        constraints = {}

        def init_hparams(self):
            return {**super().init_hparams(), **hparams}

    return Changed()


def test_setting_up_gives_raw_leaves_and_natural_values():
    setup, state = prepare(NoShift())
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in state.raw.values())
    torch.testing.assert_close(state.raw["penalty.weight"].detach(), torch.tensor([0.5, 1.0, 2.0]).log())
    torch.testing.assert_close(setup.natural(state.raw)["penalty.bias"].detach(), torch.tensor(0.3))
    assert state.step == 0 and state.params.shape == (4,) and state.best.step == -1


class Nothing(NoShift):
    def init_hparams(self):
        return {}

    def inner_loss(self, params, hparams, batch):
        return params["bias"] ** 2


class BadStart(NoShift):
    def init_hparams(self):
        return {"penalty": {"weight": torch.tensor([0.5, 0.0, 2.0]), "bias": torch.tensor(0.3)}}


class BadTask(NoShift):
    def inner_loss(self, params, hparams, batch):
        return super().inner_loss(params, hparams, None) / batch

    def inner_batches(self, step, inner_step):
        return torch.tensor([1.0, 0.0, 2.0])


class Mini(NoShift):
    def inner_batches(self, step, inner_step):
        return torch.zeros(5)


REFUSED = {
    "no hyperparameter": (Nothing, {}, r"Nothing.init_hparams\(\) returned no hyperparameter: there is nothing to tune"),
    "on the border": (BadStart, {}, "'penalty.weight' was expected to be above 0, but has values from 0 to 2"),
    "integers": (lambda: with_hparams(k=torch.tensor(3)), {}, "'k' was expected to be floating-point, but is torch.int64"),
    "unused": (lambda: with_hparams(gamma=torch.tensor(1.0)), {}, "hyperparameter 'gamma' is used nowhere .*take it out"),
    "collision": (lambda: with_hparams(**{"penalty.bias": torch.tensor(1.0)}), {}, "two tensors have the name"),
    "initial, implicit": (Ridge, {}, "'shift' gets no hypergradient from Implicit: it only enters the starting point "
                                     ".*use hypergradient=unrolled"),
    "initial, one step": (Ridge, {"method": OneStep()}, "'shift' gets no hypergradient from OneStep"),
    "initial, warm start": (Ridge, {"method": Unrolled(warm_start=True)}, r"'shift' .*set hypergradient.warm_start=false"),
    "a solver's option": (lambda: with_hparams(rate=torch.tensor(0.1)), {"solver": GradientDescent(learning_rate="rate")},
                          "'rate' gets no hypergradient from Implicit: it is an option of the inner solver"),
    "unknown option": (NoShift, {"solver": GradientDescent(learning_rate="speed"), "method": Unrolled()},
                       "learning_rate of GradientDescent was expected to be a number or the name of a hyperparameter, but is 'speed': "
                       "give a number, or one of 'penalty.bias', 'penalty.weight'"),
    "misspelt option": (lambda: with_hparams(rate=torch.tensor(0.1)),
                        {"solver": GradientDescent(momentum="rates"), "method": Unrolled()}, "is 'rates': did you mean 'rate'"),
    "unrolled L-BFGS": (NoShift, {"solver": LBFGS(), "method": Unrolled()}, "Unrolled records the inner steps, but LBFGS is "
                                                                            "not differentiable: use GradientDescent"),
    "forward torch": (NoShift, {"solver": TorchOptimizer(), "method": ForwardMode()}, "ForwardMode records .*TorchOptimizer"),
    "one-step Newton": (NoShift, {"solver": NewtonCG(), "method": OneStep()}, "OneStep .*NewtonCG is not differentiable"),
    "minibatch L-BFGS": (Mini, {"solver": LBFGS()}, "LBFGS needs the full batch, but this problem has inner minibatches"),
    "a task that is not finite": (lambda: BadTask(num_tasks=3), {}, r"inner_loss of task 1 is inf at the starting point"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_before_the_first_step(make, options, message):
    with pytest.raises(UsageError, match=message):
        prepare(make(), **options)


def test_the_paths_of_every_hyperparameter_are_found():
    class Everything(Ridge):
        constraints = {}

        def init_hparams(self):
            return {**super().init_hparams(), "rate": torch.tensor(0.1), "weight": torch.tensor(2.0)}

        def outer_loss(self, params, hparams, batch):
            return hparams["weight"] * params["bias"] + hparams["penalty.bias"]

    problem = Everything()
    hparams = natural(problem)
    flat, solver = FlatProblem.of(problem, hparams), GradientDescent(learning_rate="rate")
    assert find_paths(flat, solver, hparams, StepBatches(problem, 0)) == {
        "penalty.weight": {"inner"},
        "penalty.bias": {"inner", "direct"},
        "shift": {"initial"},
        "rate": {"solver"},
        "weight": {"direct"},
    }
    for method in (Unrolled(), ForwardMode(warm_start=False)):
        check_paths(
            method, solver, find_paths(flat, solver, hparams, StepBatches(problem, 0))
        )  # they differentiate all four
    with pytest.raises(UsageError, match="gets no hypergradient from FiniteDifference"):
        check_paths(FiniteDifference(), solver, find_paths(flat, solver, hparams, StepBatches(problem, 0)))


def test_a_hypergradient_of_zeros_is_told_but_single_zeros_are_not(recwarn):
    def computed(linear_result="converged", **gradient):
        return Hypergradient(gradient, torch.zeros(1), {}, Receipt(linear_result=linear_result), 0.0, 0.0)

    check_not_all_zero(computed(a=torch.tensor([0.0, 1e-300]), empty=torch.zeros(0)), Implicit())
    check_not_all_zero(computed("negative_curvature", b=torch.zeros(2)), Implicit())
    assert not recwarn.list
    for result in ("converged", "budget_spent", None):
        with pytest.warns(UserWarning, match="whole hypergradient of 'b', 'c' is exactly zero.*Implicit does not move"):
            check_not_all_zero(computed(result, a=torch.ones(1), b=torch.zeros(2), c=torch.zeros(())), Implicit())


def test_a_path_through_params_ends_where_the_outer_loss_does_not_depend_on_them():
    class Apart(NoShift):
        def outer_loss(self, params, hparams, batch):
            return hparams["penalty.bias"] * 2 + params["bias"].detach()

    hparams = natural(Apart())
    paths = find_paths(FlatProblem.of(Apart(), hparams), GradientDescent(), hparams, StepBatches(Apart(), 0))
    assert paths == {"penalty.weight": set(), "penalty.bias": {"direct"}}
    with pytest.raises(UsageError, match="'penalty.weight' is used nowhere on the way to the outer loss"):
        prepare(Apart())


# ---------------------------------------------------------------------------------------------------------------------
# The first look: what the user's functions raise becomes one sentence, before anything is written


def changed(num_tasks=None, **functions):
    return type("Mine", (NoShift,), functions)(num_tasks)


def wrong_shape(self, params, hparams, batch):
    return (self.x.mT @ params["layer.weight"]).sum()


def wrong_optimality(self, params, hparams, batch):
    return {"layer": {"weight": params["layer.weight"][:2]}, "bias": params["bias"]}


def no_second_derivative(self, params, hparams, batch):
    weighted = hparams["penalty.weight"] * params["layer.weight"] * hparams["penalty.bias"]
    return torch.cdist(self.x, weighted[None], p=3.0).sum()


RAISED = {
    "a shape, inner": (lambda: changed(inner_loss=wrong_shape), RuntimeError,
                       r"Mine.inner_loss raised RuntimeError \(size mismatch.*\) at test_problem.py:\d+, given params "
                       r"\[layer.weight\(3,\) float64, bias\(\) float64\] and hparams \[penalty.weight\(3,\) float64, .*fit each"),
    "a shape, outer": (lambda: changed(outer_loss=wrong_shape), RuntimeError, "Mine.outer_loss raised RuntimeError .size mis"),
    "a shape, tasks": (lambda: changed(3, inner_loss=wrong_shape), RuntimeError, r"inner_loss raised .*given params \[layer.weight\(3,\)"),
    "a shape, batch": (lambda: changed(inner_batches=lambda self, i, k: [torch.zeros(4)]), TypeError,
                       r"Mine.inner_loss raised TypeError .* and batch \[\[0\]\(4,\) float64\]: make"),
    "a name": (lambda: changed(inner_loss=lambda self, p, h, b: p["weights"].sum()), KeyError, "inner_loss raised KeyError .'weights'"),
    "an index": (lambda: changed(outer_loss=lambda self, p, h, b: p["layer.weight"][7]), IndexError, "outer_loss raised IndexError"),
    "an argument": (lambda: changed(outer_loss=lambda self, p, h: p["bias"]), TypeError, "outer_loss raised TypeError .*positional"),
    "an attribute": (lambda: changed(init_params=lambda self, h: {"w": self.nothing}), AttributeError, "Mine.init_params raised Attr.*'nothing'"),
    "hyperparameters": (lambda: changed(init_hparams=lambda self: {"a": torch.zeros(2) + torch.zeros(3)}), RuntimeError,
                        r"Mine.init_hparams raised RuntimeError \(The size of tensor a .*\) at test_problem.py:\d+: make"),
    "a sampler": (lambda: changed(inner_batches=lambda self, i, k: self.x[9]), IndexError, "Mine.inner_batches raised IndexError"),
    "a dtype": (lambda: changed(outer_loss=lambda self, p, h, b: self.x[0].float() @ p["layer.weight"]), RuntimeError,
                "outer_loss raised RuntimeError .*dtype"),
    "a derivative": (lambda: changed(inner_loss=no_second_derivative), RuntimeError,
                     r"Mine.inner_loss or outer_loss, differentiated, raised \w+ .*cdist_backward' is not implemented"),
    "an optimality": (lambda: changed(optimality=wrong_optimality), UsageError,
                      r"optimality was expected to return a dictionary like params: 'layer.weight' .* \(3,\), but has \(2,\)"),
    "no dictionary": (lambda: changed(init_params=lambda self, h: torch.zeros(3)), None, "a dictionary of tensors was expected, but a Tensor"),
    "no parameter": (lambda: changed(init_params=lambda self, h: {"w": torch.zeros(0)}), None, "init_params was expected .*have no entry"),
    "integers": (lambda: changed(init_params=lambda self, h: {"w": torch.arange(3)}), None, "init_params .*real numbers, but they are torch.int64"),
    "tasks": (lambda: changed(0), None, "num_tasks must be an integer of at least 1, or None .*but is 0"),
    "a task dimension": (lambda: changed(3, inner_batches=lambda self, i, k: torch.zeros(4, 5)), None,
                         r"inner_batches was expected .*num_tasks=3 as its leading dimension, but has shape \(4, 5\): stack"),
    "a nested one": (lambda: changed(3, inner_batches=lambda self, i, k: {"x": (torch.zeros(3), torch.zeros(5, 3))}), None,
                     r"inner_batches\['x'\]\[1\] was expected .*but has shape \(5, 3\)"),
    "none at all": (lambda: changed(3, outer_batches=lambda self, i, k: [torch.tensor(1.0)]), None, r"outer_batches\[0\] .*has shape \(\)"),
    "a number": (lambda: changed(3, outer_batches=lambda self, i, k: 1.0), None, "outer_batches was expected .*but is a float"),
}  # fmt: skip


@pytest.mark.parametrize(
    "look", [lambda problem: prepare(problem), hypergradient_at, check], ids=["fit", "at", "check"]
)
@pytest.mark.parametrize(("make", "cause", "message"), RAISED.values(), ids=RAISED)
def test_what_does_not_fit_is_told_in_one_sentence_with_its_cause(make, cause, message, look):
    with pytest.raises(UsageError, match=message) as caught:
        look(make())
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None if cause is None else isinstance(caught.value.__cause__, cause)


def test_only_the_users_mistakes_are_blamed_on_the_user():
    def ours(self, params, hparams, batch):
        raise AssertionError("ours")

    with pytest.raises(AssertionError, match="ours"):
        prepare(changed(inner_loss=ours))


# ---------------------------------------------------------------------------------------------------------------------
# Minibatches and random numbers


@settings(max_examples=50, deadline=None, derandomize=True)
@given(num_examples=st.integers(1, 50), data=st.data(), step=st.integers(-1, 10**6), inner_step=st.integers(-1, 10**6))
def test_minibatches_are_distinct_examples_and_a_function_of_the_step(num_examples, data, step, inner_step):
    batches = Minibatches(num_examples, data.draw(st.integers(1, num_examples)), seed=3)
    indices = batches(step, inner_step)
    assert len(indices) == batches.batch_size == len(set(indices.tolist()))
    assert 0 <= int(indices.min()) and int(indices.max()) < num_examples
    torch.manual_seed(data.draw(st.integers(0, 5)))  # whoever drew before does not matter
    assert torch.equal(batches(step, inner_step), indices)


def test_minibatches_differ_between_steps_and_are_unbiased():
    batches = Minibatches(num_examples=20, batch_size=5)
    drawn = torch.stack([batches(step, inner) for step in range(40) for inner in range(50)])
    assert not torch.equal(batches(0, 1), batches(1, 0)) and not torch.equal(batches(0, 0), batches(0, -1))
    assert not torch.equal(Minibatches(20, 5, seed=1)(0, 0), batches(0, 0))
    counts = torch.bincount(drawn.flatten(), minlength=20) / len(drawn)  # each example's share is 1/4
    assert float((counts - 0.25).abs().max()) < 5 * (0.25 * 0.75 / len(drawn)) ** 0.5


@pytest.mark.parametrize("batch_size", [0, 11, -3])
def test_a_batch_size_that_cannot_be_is_refused(batch_size):
    with pytest.raises(UsageError, match=rf"between 1 and the number of examples \(10\), but is {batch_size}"):
        Minibatches(10, batch_size)


def test_the_batches_of_an_outer_step():
    class Counted(NoShift):
        def inner_batches(self, step, inner_step):
            return ("inner", step, inner_step)

        def outer_batches(self, step, inner_step):
            return ("outer", step, inner_step)

    batches = StepBatches(Counted(), 7)
    assert batches.stochastic and batches.inner(3) == ("inner", 7, 3)
    assert batches.curvature == batches.curvature == ("inner", 7, -1) and batches.outer == ("outer", 7, 0)
    batches = StepBatches(NoShift(), 7)
    assert not batches.stochastic and batches.inner(3) is batches.curvature is batches.outer is None


def test_digits_are_split_once_and_for_all_with_equal_class_shares():
    parts = load_digits(seed=1, dtype=torch.float32)
    again = load_digits(seed=1, dtype=torch.float32)
    assert [len(part.y) for part in parts] == [898, 449, 450]
    assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(parts, again, strict=True))
    assert not torch.equal(load_digits(seed=2)[0].y, parts[0].y)
    for part in parts:
        assert part.x.dtype == torch.float32 and part.y.dtype == torch.int64
        assert 0 <= float(part.x.min()) and float(part.x.max()) <= 1
        assert float((torch.bincount(part.y) / len(part.y) - 0.1).abs().max()) < 0.01
    with pytest.raises(UsageError, match=r"must be above 0 and sum to less than 1, but are 0\.5 and 0\.5"):
        load_digits(validation_fraction=0.5, test_fraction=0.5)


def test_generators_are_functions_of_their_seeds_and_the_global_ones_come_back():
    assert torch.equal(normal((3,), generator(1, 2)), normal((3,), generator(1, 2)))
    drawn = {tuple(normal((2,), generator(*seeds)).tolist()) for seeds in [(1, 2), (2, 1), (1,), (12,), (-1,)]}
    assert len(drawn) == 5
    single = normal((3,), generator(4), torch.float32)
    torch.testing.assert_close(single.double(), normal((3,), generator(4), torch.float64), rtol=1e-6, atol=0)

    import random

    import numpy as np

    def draw():
        return float(torch.rand(())), float(np.random.normal()), random.random()

    seed_everything(5)
    draw()
    state = get_state()
    expected = [draw() for _ in range(3)]
    set_state(state)
    assert [draw() for _ in range(3)] == expected
