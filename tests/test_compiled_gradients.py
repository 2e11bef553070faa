"""Compiled gradients: the eager numbers and steps in every case, one program for all points, and a sentence where there is none.

As in `test_compiled.py`, most tests run the graph as it was traced; one compiles.
"""

import gc
import weakref

import pytest
import torch
from torch.nn import functional

import bilevel.solvers.compiled as module
from bilevel import Positive, Problem
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem
from bilevel.hypergradient import Implicit, OneStep, Unrolled, hypergradient_at
from bilevel.linalg import GMRES
from bilevel.linalg.programs import MAX_CHANGES
from bilevel.solvers import (
    LBFGS,
    Adam,
    AndersonAcceleration,
    GradientDescent,
    NewtonCG,
    ProximalGradient,
    TorchOptimizer,
)
from bilevel.solvers.compiled import CompiledGradients
from bilevel.solvers.loop import RECORDED
from bilevel.solvers.objective import Anchored, Objective

DRAW = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(shape, generator=DRAW, dtype=torch.float64)


MATRIX, INPUTS, LABELS = randn(6, 6), randn(7, 3), torch.arange(7) % 2


@pytest.fixture
def graphs(monkeypatch):
    """Run graphs as traced; the list holds those that would have been compiled."""
    seen = []

    def compile(graph, example, options):
        seen.append(graph)
        return graph

    monkeypatch.setattr(torch._inductor, "compile", compile)
    return seen


# --- the numbers ------------------------------------------------------------------------------------------------------


def quartic(batch):
    return Objective(lambda x, h: h["c"] * ((x @ MATRIX.T - batch["shift"]) ** 4).sum(-1) / 12)


def anchored(batch):
    def rest(x, h):
        return (x @ MATRIX.T - batch["shift"]).tanh().sum(-1)

    term = Anchored(rest, lambda h: (h["c"].square(), h["c"].expand(6)))
    return Objective(lambda x, h: rest(x, h) + term.value(x, h), anchored=term)


def equilibrium(batch):
    return Objective(optimality=lambda x, h: (x @ MATRIX.T).sinh() - h["c"] * batch["shift"])


def own_gradient(batch):
    def optimality(x, h):
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad((h["c"] * leaf**4).sum(), leaf, create_graph=True)[0] - batch["shift"]

    return Objective(optimality=optimality)


def constant(batch):
    return Objective(lambda x, h: (h["c"] * batch["shift"] * x).sum(-1))


CASES = {
    "loss": (quartic, (6,)),
    "loss of several systems": (quartic, (3, 6)),
    "anchored loss": (anchored, (3, 6)),
    "optimality": (equilibrium, (3, 6)),
    "optimality that takes a gradient": (own_gradient, (6,)),
    "constant gradient": (constant, (3, 6)),
}


@pytest.mark.parametrize(("make", "shape"), CASES.values(), ids=CASES.keys())
def test_at_every_point_the_eager_numbers(make, shape, graphs):
    gradients = CompiledGradients()
    for _ in range(3):
        h, batch = {"c": 1 + randn().square()}, {"shift": randn(6)}
        compiled = gradients.of(make, batch)
        for _ in range(3):
            x = randn(*shape)
            with torch.no_grad():
                found = compiled(x, h)
                objective = make(batch)
                expected = objective.gradient(x, h)
            assert found is not None and compiled.fallback is None
            torch.testing.assert_close(found[1], expected, rtol=1e-12, atol=1e-12)
            if objective.loss is not None:
                torch.testing.assert_close(found[0], objective.loss(x, h), rtol=1e-12, atol=1e-12)
    assert len(graphs) == 1


@pytest.mark.parametrize("case", ["loss", "anchored loss"])
def test_the_gradient_is_the_derivative(case, graphs):
    make, shape = CASES[case]
    h, batch, x, way, size = {"c": 1 + randn().square()}, {"shift": randn(6)}, randn(*shape), randn(*shape), 1e-6
    compiled = CompiledGradients().of(make, batch)
    with torch.no_grad():
        ahead, behind = (compiled(x + sign * size * way, h)[0] for sign in (1, -1))
        slope = (compiled(x, h)[1] * way).sum(-1)
    torch.testing.assert_close((ahead - behind) / (2 * size), slope, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_machine_code_gives_the_eager_numbers(dtype):
    inputs = INPUTS.to(dtype)

    def make(batch):
        def loss(x, h):
            hidden = (inputs @ x[..., :6].unflatten(-1, (3, 2))).tanh() @ x[..., 6:10].unflatten(-1, (2, 2))
            labels = batch.expand(*x.shape[:-1], 7).reshape(-1)
            return functional.cross_entropy(hidden.flatten(0, -2), labels, reduction="none").reshape(
                *x.shape[:-1], 7
            ).mean(-1) + h["c"] * x.square().sum(-1)

        return Objective(loss)

    compiled, h = CompiledGradients().of(make, LABELS), {"c": torch.tensor(0.3, dtype=dtype)}
    for _ in range(3):
        x = randn(2, 10).to(dtype)
        with torch.no_grad():
            found, expected = compiled(x, h), make(LABELS).value_and_gradient(x, h)
        assert compiled.fallback is None
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


# --- problems and solvers ---------------------------------------------------------------------------------------------


class Tasks(Problem):
    """Two tasks that share a decay; minibatches, noise or a branch on a value, if they are asked for."""

    constraints = {"decay": Positive()}
    num_tasks = 2
    noise, branches, scale = 0.0, False, 1.0

    def __init__(self):
        draw = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(2, 9, 3, generator=draw), torch.randn(2, 9, generator=draw)
        self.start = torch.randn(3, 2, generator=draw)
        self.evaluations = 0

    def init_hparams(self):
        return {"decay": torch.tensor(0.1).to(self.x)}

    def init_params(self, hparams):
        return {"w": self.start.clone()}

    def inner_batches(self, step, inner_step):
        return {"x": self.x, "y": self.y}

    outer_batches = inner_batches

    def inner_loss(self, params, hparams, batch):
        self.evaluations += 1
        x = batch["x"] + self.noise * torch.randn_like(batch["x"]) if self.noise else batch["x"]
        if self.branches and params["w"].sum() > 0:
            x = 2 * x
        fit = ((x @ params["w"]).tanh().sum(-1) - batch["y"]).square().mean()
        return self.scale * fit + hparams["decay"] * params["w"].square().sum()

    def outer_loss(self, params, hparams, batch):
        return ((batch["x"] @ params["w"]).tanh().sum(-1) - 1).square().mean()


class Whole(Tasks):
    """The same without batches."""

    inner_batches = outer_batches = None

    def inner_loss(self, params, hparams, batch):
        return super().inner_loss(params, hparams, {"x": self.x, "y": self.y})

    def outer_loss(self, params, hparams, batch):
        return super().outer_loss(params, hparams, {"x": self.x, "y": self.y})


SOLVERS = {
    "gradient descent": (GradientDescent, {"learning_rate": 0.1}),
    "with decay": (GradientDescent, {"learning_rate": 0.1, "momentum": 0.5, "weight_decay": 0.2}),
    "Adam": (Adam, {"weight_decay": 0.1}),
    "proximal": (ProximalGradient, {"learning_rate": 0.05}),
    "Anderson": (AndersonAcceleration, {}),
    "LBFGS": (LBFGS, {}),
    "NewtonCG": (NewtonCG, {}),
    "torch": (TorchOptimizer, {}),
}


def found(problem, method=None, step=0, **solver):
    kind, options = SOLVERS[solver.pop("kind", "gradient descent")]
    made = kind(max_steps=20, atol=0.0, **options, **solver)
    method = method or Implicit(linear_solver=GMRES(rtol=1e-12))
    return hypergradient_at(problem, method=method, solver=made, step=step)


@pytest.mark.filterwarnings("ignore")  # twenty steps are no solution
@pytest.mark.parametrize("kind", SOLVERS)
def test_every_solver_takes_the_eager_steps(kind, graphs):
    for step in (0, 1):
        problem = Whole().to(dtype=torch.float64)
        eager, compiled = (found(problem, step=step, kind=kind, compile=compile) for compile in (False, True))
        assert compiled.receipt.fallback is None and eager.receipt.fallback is None
        assert compiled.receipt.inner_steps == eager.receipt.inner_steps
        torch.testing.assert_close(compiled.params, eager.params, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(compiled.gradient, eager.gradient, rtol=1e-7, atol=1e-9)
    assert graphs


def test_minibatches_are_inputs_and_one_program_serves_all_solves(graphs):
    problem = Tasks().to(dtype=torch.float64)
    problem.inner_batches = lambda step, inner_step: {
        "x": problem.x + inner_step / 10 + step, "y": problem.y.roll(inner_step, -1)
    }  # fmt: skip
    for step in (0, 1):
        eager, compiled = (found(problem, step=step, compile=compile) for compile in (False, True))
        torch.testing.assert_close(compiled.params, eager.params, rtol=1e-12, atol=1e-12)
    assert len(graphs) == 1


def test_in_a_solve_the_problem_is_evaluated_once_more(graphs):
    problem = Tasks().to(dtype=torch.float64)
    eager = found(problem, compile=False)
    problem.evaluations = 0
    found(problem, compile=False)
    expected, problem.evaluations = problem.evaluations, 0
    found(problem, compile=True)
    problem.evaluations = 0
    compiled = found(problem, compile=True)
    assert expected - problem.evaluations == 20 - 1  # its steps, but for the one that is compared
    torch.testing.assert_close(compiled.params, eager.params, rtol=1e-12, atol=1e-12)


def test_steps_that_are_recorded_are_eager_and_say_so(graphs):
    problem = Tasks().to(dtype=torch.float64)
    eager, compiled = (found(problem, method=Unrolled(), compile=compile) for compile in (False, True))
    assert compiled.receipt.fallback == RECORDED and eager.receipt.fallback is None and not graphs
    torch.testing.assert_close(compiled.gradient, eager.gradient, rtol=0, atol=0)
    assert found(problem, method=OneStep(), compile=True).receipt.fallback is None and graphs


def test_transforms_take_the_objective_as_it_is(graphs):
    objective = quartic(batch := {"shift": randn(6)})
    compiled = Objective(objective.loss, compiled=CompiledGradients().of(quartic, batch))
    x, h = randn(6), {"c": torch.tensor(2.0)}
    with torch.no_grad():
        hessians = [torch.func.jacrev(lambda x, of=of: of.gradient(x, h))(x) for of in (objective, compiled)]
    torch.testing.assert_close(*hessians, rtol=0, atol=0)
    assert not graphs


# --- where there is no program, or no longer the right one ------------------------------------------------------------


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [("noise", 0.1, "draws random numbers"), ("branches", True, "goes by the values of tensors")],
)
def test_what_is_no_graph_is_eager_and_says_why(attribute, value, reason, graphs):
    problem = Whole().to(dtype=torch.float64)
    problem.num_tasks = None
    problem.x, problem.y = problem.x[0], problem.y[0]
    setattr(problem, attribute, value)
    results = []
    for compile in (False, True):
        torch.manual_seed(0)
        results.append(found(problem, compile=compile))
    eager, compiled = results
    assert reason in compiled.receipt.fallback and compiled.receipt.fallback.startswith("the gradients of inner steps")
    assert eager.receipt.fallback is None and not graphs
    torch.testing.assert_close(compiled.gradient, eager.gradient, rtol=1e-12, atol=1e-12)


def test_both_reasons_are_told(graphs):
    problem = Tasks().to(dtype=torch.float64)
    problem.noise = 0.1
    result = found(problem, method=Implicit(linear_solver=GMRES(rtol=1e-12), compile=True), compile=True)
    assert "gradients of inner steps are eager" in result.receipt.fallback
    assert "the products are eager" in result.receipt.fallback


def test_held_data_changed_in_place_is_seen(graphs):
    problem = Whole().to(dtype=torch.float64)
    for _ in range(3):
        eager, compiled = (found(problem, compile=compile) for compile in (False, True))
        torch.testing.assert_close(compiled.params, eager.params, rtol=1e-12, atol=1e-12)
        problem.x += 1
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", [Tasks, Whole])
def test_a_flag_that_is_switched_is_seen_and_in_the_end_given_up(kind, graphs):
    problem = kind().to(dtype=torch.float64)
    for number in range(MAX_CHANGES + 3):
        problem.scale = 1.0 + number
        eager, compiled = (found(problem, compile=compile) for compile in (False, True))
        torch.testing.assert_close(compiled.params, eager.params, rtol=1e-12, atol=1e-12)
        if number > MAX_CHANGES:
            assert "reads something that changes" in compiled.receipt.fallback
        else:
            assert compiled.receipt.fallback is None and len(graphs) == number + 1


def test_an_optimality_that_changes_is_seen_at_its_root(graphs):
    factor = [1.0]
    gradients, h, x = CompiledGradients(), {"c": torch.tensor(2.0)}, torch.zeros(6, dtype=torch.float64)

    def make(batch):
        return Objective(optimality=lambda x, h: factor[0] * h["c"] * x)

    with torch.no_grad():
        for factor[0] in (1.0, 3.0):
            compiled = gradients.of(make, None)
            compiled(x, h)
            torch.testing.assert_close(compiled(x + 1, h)[1], factor[0] * 2 * (x + 1))
    assert gradients.programs.changes == 1


def test_a_root_is_no_change(graphs):
    gradients, h = CompiledGradients(), {"c": torch.tensor(1.0, dtype=torch.float64)}
    batch = {"shift": randn(6)}
    root = torch.linalg.solve(MATRIX, (h["c"] * batch["shift"]).asinh())
    with torch.no_grad():
        for _ in range(3):
            assert gradients.of(equilibrium, batch)(root, h) is not None
    assert gradients.programs.changes == 0 and len(graphs) == 1


def test_the_first_numbers_are_the_programs_own(monkeypatch):
    """Machine code rounds otherwise than eager operations: a run that is resumed has its first numbers in mid-run."""
    monkeypatch.setattr(
        module, "compile_graph", lambda graph, example: lambda *tensors: [x * (1 + 1e-12) for x in graph(*tensors)]
    )
    batch, x, h = {"shift": randn(6)}, randn(3, 6), {"c": randn().square()}
    compiled = CompiledGradients().of(quartic, batch)
    with torch.no_grad():
        first, second, eager = compiled(x, h), compiled(x, h), quartic(batch).value_and_gradient(x, h)
    for one, other, rounded in zip(first, second, eager, strict=True):
        assert one.equal(other) and not one.equal(rounded)


@pytest.mark.parametrize(("place", "what"), [(0, "values"), (1, "gradients")])
def test_a_wrong_program_is_found_out(place, what, monkeypatch):
    def spoilt(graph, example):
        def run(*tensors):
            results = list(graph(*tensors))
            results[place] = results[place] * 1.001
            return results

        return run

    monkeypatch.setattr(module, "compile_graph", spoilt)
    problem = Whole().to(dtype=torch.float64)
    eager, compiled = (found(problem, compile=compile) for compile in (False, True))
    assert f"their {what} differ from the eager ones by 1.0e-03" in compiled.receipt.fallback
    torch.testing.assert_close(compiled.params, eager.params, rtol=0, atol=0)


def test_a_wrong_program_is_found_out_at_a_root(monkeypatch):
    monkeypatch.setattr(
        module, "compile_graph", lambda graph, example: lambda *tensors: [2 * r for r in graph(*tensors)]
    )
    compiled = CompiledGradients().of(lambda batch: Objective(optimality=lambda x, h: h["c"] * x), None)
    with torch.no_grad():
        assert compiled(torch.zeros(6), {"c": torch.tensor(2.0)}) is None
    assert "differ from the eager ones by 1.0e+00" in compiled.fallback


def test_an_error_of_the_compiler_is_one_sentence(monkeypatch):
    def broken(graph, example):
        raise RuntimeError("no compiler here.\nwith a long log")

    monkeypatch.setattr(module, "compile_graph", broken)
    fallback = found(Whole().to(dtype=torch.float64), compile=True).receipt.fallback
    assert fallback.endswith("because they could not be compiled (RuntimeError: no compiler here).")


def test_a_point_that_is_not_finite_settles_nothing(graphs):
    gradients, h = CompiledGradients(), {"c": torch.tensor(1.0, dtype=torch.float64)}

    def make(batch):
        return Objective(lambda x, h: (h["c"] * x.log()).sum(-1))

    compiled, x = gradients.of(make, None), torch.ones(6, dtype=torch.float64)
    with torch.no_grad():
        assert compiled(-x, h) is None and "not finite" in compiled.fallback
        torch.testing.assert_close(compiled(2 * x, h)[1], x / 2)
        torch.testing.assert_close(compiled(4 * x, h)[1], x / 4)
        assert bool(compiled(-x, h)[0].isnan().all())  # the program says it as well
    assert compiled.fallback is None and len(graphs) == 1


def test_errors_of_the_function_are_its_own(graphs):
    def make(batch):
        return Objective(lambda x, h: x @ x.new_ones(5))

    with torch.no_grad(), pytest.raises(RuntimeError, match="size"):
        CompiledGradients().of(make, None)(randn(6), {})


def test_the_problem_is_not_kept(graphs):
    problem = Whole().to(dtype=torch.float64)
    found(problem, compile=True)
    assert graphs
    gone = weakref.ref(problem)
    del problem
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("kind", [kind for kind, _ in SOLVERS.values()])
def test_compile_is_true_or_false(kind):
    with pytest.raises(UsageError, match=f"{kind.__name__} needs compile to be true or false, but got 'yes'"):
        kind(compile="yes")


def test_an_objective_of_no_problem_is_evaluated_as_it_is(graphs):
    flat = FlatProblem.of(problem := Whole().to(dtype=torch.float64), {"decay": torch.tensor(0.1)})
    assert flat.objective(None).compiled is None and flat.compiled_objective(None).compiled is not None
    assert problem.evaluations == 0 and not graphs


# --- the outer gradient -----------------------------------------------------------------------------------------------


class Direct(Tasks):
    """With a hyperparameter in the outer loss as well."""

    def outer_loss(self, params, hparams, batch):
        return super().outer_loss(params, hparams, batch) * hparams["decay"].exp()


@pytest.mark.parametrize("tasks_at_once", [None, 1])
def test_the_outer_gradient_is_the_eager_one(tasks_at_once, graphs):
    problem = Direct().to(dtype=torch.float64)
    problem.tasks_at_once = tasks_at_once
    for step in (0, 1):
        eager, compiled = (
            found(problem, method=Implicit(linear_solver=GMRES(rtol=1e-12), compile=compile), step=step)
            for compile in (False, True)
        )
        assert compiled.receipt.fallback is None and compiled.outer_loss == pytest.approx(eager.outer_loss, rel=1e-12)
        torch.testing.assert_close(compiled.gradient, eager.gradient, rtol=1e-9, atol=1e-12)
    assert len(graphs) == 3  # of the outer loss, and two of the products


@pytest.mark.parametrize("tasks_at_once", [None, 1])
def test_an_outer_loss_that_cannot_be_compiled_says_so_once(tasks_at_once, graphs):
    problem = Tasks().to(dtype=torch.float64)
    problem.tasks_at_once = tasks_at_once
    problem.outer_loss = lambda params, hparams, batch: params["w"].sum() * torch.rand(())
    torch.manual_seed(0)
    eager = found(problem)
    torch.manual_seed(0)
    compiled = found(problem, method=Implicit(linear_solver=GMRES(rtol=1e-12), compile=True))
    assert compiled.receipt.fallback.startswith(
        "the gradients of the outer loss are eager, not compiled, because the func"
    )
    assert compiled.receipt.fallback.count("the gradients of the outer loss") == 1
    torch.testing.assert_close(compiled.gradient, eager.gradient, rtol=1e-9, atol=1e-12)


def test_an_outer_loss_that_changes_is_seen(graphs):
    problem = Direct().to(dtype=torch.float64)
    method = Implicit(linear_solver=GMRES(rtol=1e-12), compile=True)
    found(problem, method=method)
    outer_loss, problem.outer_loss = problem.outer_loss, lambda *args: 3 * outer_loss(*args)
    compiled, eager = found(problem, method=method), found(problem)
    torch.testing.assert_close(compiled.gradient, eager.gradient, rtol=1e-9, atol=1e-12)
