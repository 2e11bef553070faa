"""Compiled derivatives: the eager numbers in every case, one program for all points, and a sentence where there is none.

Compiling takes seconds, so most tests run the graph as it was traced and split, which is all that is ours; a few compile.
"""

import gc
import math
import weakref

import pytest
import torch
from torch.nn import functional

import bilevel.linalg.program as module
from bilevel import Positive, Problem, fit
from bilevel.errors import UsageError
from bilevel.hypergradient import Implicit, hypergradient_at
from bilevel.linalg import (
    MINRES,
    POSITIVE_DEFINITE,
    ConjugateGradient,
    DiagonalOperator,
    MatrixOperator,
    Tag,
    as_matrix,
    linear_solve,
)
from bilevel.linalg.compiled import CompiledDerivatives
from bilevel.linalg.differentiate import differentiate
from bilevel.linalg.fused import Fused, fused
from bilevel.linalg.programs import MAX_CHANGES, MAX_PROGRAMS
from bilevel.linalg.recycling import WatchedOperator
from bilevel.linalg.tracing import split, trace
from bilevel.solvers import GradientDescent

DRAW = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(shape, generator=DRAW, dtype=torch.float64)


MATRIX, INDEX, LABELS = randn(6, 6), torch.tensor([0, 2, 2, 5]), torch.arange(7) % 2
INPUTS, TOKENS = randn(7, 3), torch.tensor([0, 1, 1, 2])


def quartic(x, args, data):
    return args["c"] * ((x @ MATRIX.T) ** 4).sum(-1) / 12


def mlp(x, args, data):
    inputs, labels = (INPUTS, LABELS) if data is None else (data["inputs"], data["labels"])
    hidden = (inputs @ x[:6].reshape(3, 2)).tanh()
    hidden = (hidden @ x[6:10].reshape(2, 2)).tanh()
    return functional.cross_entropy(hidden @ x[10:14].reshape(2, 2), labels) + (args["decay"] * x**2).sum()


def normalised(x, args, data):
    hidden = functional.batch_norm(INPUTS * x[:3], None, None, x[3:6], training=True)
    return (functional.layer_norm(hidden, (3,)) ** 3 * args["c"]).sum()


def tasks(x, args, data):
    def one(row, target):
        return args["c"] * ((MATRIX @ row - target) ** 4).sum() + row.exp().sum()

    return torch.vmap(one)(x, data[0])


def gathered(x, args, data):
    return (x[INDEX] ** 3).sum() * args["c"] + (functional.embedding(TOKENS, x.reshape(3, 2)) ** 4).sum()


def written(x, args, data):
    """Changes tensors of its own in place, which is its own business."""
    y = x * args["c"]
    y.add_(1.0)
    return (y.clone().mul_(y) ** 2).sum()


def equilibrium(x, args, data):
    return torch.tanh(x @ MATRIX.T) * args["c"] + x**2


def own_gradient(x, args, data):
    y = x if x.requires_grad else x.detach().requires_grad_()
    (slope,) = torch.autograd.grad((y**4 * args["c"]).sum(), y, create_graph=True)
    return slope + x.sin().roll(1)


def tall(x, args, data):
    return torch.cat([x * args["c"], x**3], dim=-1)


C = {"c": torch.tensor(0.7, dtype=torch.float64)}
CASES = {  # function, point, args, data
    "loss": (quartic, randn(6), C, None),
    "loss of a batch of systems": (quartic, randn(3, 6), C, None),
    "network, one decay a weight": (mlp, randn(14), {"decay": randn(14).abs()}, None),
    "data in a dictionary": (mlp, randn(14), {"decay": randn(14).abs()}, {"inputs": randn(5, 3), "labels": LABELS[:5]}),
    "normalisation layers": (normalised, randn(6), {"c": randn(7, 3)}, None),
    "vmapped tasks": (tasks, randn(3, 6), C, [randn(3, 6)]),
    "gathers and embeddings": (gathered, randn(6), C, None),
    "own tensors changed in place": (written, randn(6), C, None),
    "linear loss": (lambda x, args, data: (args["c"] * x).sum(-1), randn(6), C, None),
    "constant gradient": (lambda x, args, data: x.sum(-1), randn(6), C, None),
    "argument without effect": (quartic, randn(6), {**C, "unused": randn(2)}, None),
    "no arguments": (lambda x, args, data: (x**4).sum(-1), randn(6), {}, None),
    "optimality": (equilibrium, randn(6), C, None),
    "optimality of a batch of systems": (equilibrium, randn(2, 6), C, None),
    "optimality that takes a gradient": (own_gradient, randn(6), C, None),
    "optimality with more equations than unknowns": (tall, randn(6), C, None),
}
case = pytest.mark.parametrize(("function", "point", "args", "data"), CASES.values(), ids=CASES.keys())


@pytest.fixture
def graphs(monkeypatch):
    """Run graphs as traced; the list holds those of products that would have been compiled."""
    seen, true = [], module._compile

    def compile(part, kept, vector):
        seen.append(part.graph)
        return true(part, kept, vector)

    monkeypatch.setattr(module, "_compile", compile)
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, example, options: graph)
    return seen


def relative(found, expected):
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


def close(found, expected, tolerance=1e-12):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert relative(found, expected) <= tolerance


def agree(found, expected, tolerance=1e-12):
    """All that two `Derivatives` can be asked gives the same numbers."""
    assert found.operator.shape == expected.operator.shape and found.operator.tags == expected.operator.tags
    assert found.operator.batch_shape == expected.operator.batch_shape
    assert found.operator.transpose().shape == expected.operator.transpose().shape
    close(found.value, expected.value, tolerance)
    close(found.optimality, expected.optimality, tolerance)
    batch, (m, n) = expected.operator.batch_shape, expected.operator.shape
    v, u = randn(*batch, n).to(expected.value.dtype), randn(*batch, m).to(expected.value.dtype)
    close(found.operator.mv(v), expected.operator.mv(v), tolerance)
    close(found.operator.transpose().mv(u), expected.operator.transpose().mv(u), tolerance)
    mixed, wanted = found.mixed(u), expected.mixed(u)
    assert list(mixed) == list(wanted)
    for name in wanted:
        close(mixed[name], wanted[name], tolerance)


# --- the numbers ------------------------------------------------------------------------------------------------------


@case
def test_at_every_point_the_eager_numbers(function, point, args, data, graphs):
    compiled = CompiledDerivatives()
    for factor in (1.0, 0.5, -2.0):
        moved = {name: factor * value for name, value in args.items()}
        found = compiled.at(function, factor * point, moved, data)
        assert found.fallback is None
        assert not found.value.requires_grad and not found.optimality.requires_grad
        agree(found, differentiate(function, factor * point, moved, data))
    assert len(graphs) == (1 if Tag.symmetric in found.operator.tags else 2)  # traced once, for all points


@case
def test_the_numbers_are_derivatives(function, point, args, data, graphs):
    compiled, step = CompiledDerivatives(), 1e-5
    found = compiled.at(function, point, args, data)
    v, u = randn(*point.shape), randn(*found.optimality.shape)

    def optimality(x, theta):
        return compiled.at(function, x, theta, data).optimality

    slope = (optimality(point + step * v, args) - optimality(point - step * v, args)) / (2 * step)
    assert (found.operator.mv(v) - slope).norm() <= 1e-6 * (1 + slope.norm())
    pulled = (found.operator.transpose().mv(u) * v).sum()
    assert math.isclose(float(pulled), float((found.operator.mv(v) * u).sum()), rel_tol=1e-10, abs_tol=1e-12)
    for name, part in found.mixed(u).items():
        direction = randn(*part.shape)
        up, down = ({**args, name: args[name] + sign * step * direction} for sign in (1, -1))
        slope = ((optimality(point, up) - optimality(point, down)) * u).sum() / (2 * step)
        assert math.isclose(float((part * direction).sum()), float(slope), rel_tol=1e-6, abs_tol=1e-7)


def test_the_hessian_in_closed_form(graphs):
    x = randn(6)
    hessian = C["c"] * MATRIX.T @ torch.diag((MATRIX @ x) ** 2) @ MATRIX
    close(as_matrix(CompiledDerivatives().at(quartic, x, C).operator), hessian)


def test_vectors_of_every_layout(graphs):
    point = randn(3, 6)
    found, expected = (at(quartic, point, C).operator for at in (CompiledDerivatives().at, differentiate))
    for vectors in (randn(4, 2, 3, 6), randn(6, 3).T, randn(1, 6).expand(3, 6), randn(2, 3, 12)[..., ::2]):
        close(found.mv(vectors), expected.mv(vectors))


def test_a_product_repeats_nothing_of_the_forward_pass(graphs):
    function, point, args, _ = CASES["network, one decay a weight"]
    CompiledDerivatives().at(function, point, args)
    (product,) = graphs
    names = [str(node.target) for node in product.graph.nodes]
    # Three layers: two matrix products for the first, whose inputs do not change, and six for each of the others.
    assert sum(name in ("aten.mm.default", "aten.addmm.default") for name in names) == 2 + 6 + 6
    assert not any("tanh.default" in name or "log_softmax.default" in name for name in names)
    assert not any(node.op == "get_attr" for node in product.graph.nodes)  # data is an input, not compiled in


def test_what_does_not_depend_on_the_vector_is_kept():
    graph = trace(lambda x, v: (x.exp(), [x.exp().permute(1, 0) @ v + x.sin().sum()]), [randn(3, 3), randn(3, 3)])
    setup, (part,) = split(graph)
    x, v = randn(3, 3), randn(3, 3)
    value, *kept = setup(x)
    close(value, x.exp())
    close(part.graph(*(kept[index] for index in part.reads), v)[0], x.exp().T @ v + x.sin().sum())
    names = {str(node.target) for node in part.graph.graph.nodes if node.op == "call_function"}
    assert names == {
        "aten.permute.default",
        "aten.mm.default",
        "aten.add.Tensor",
    }  # a view is made again, the rest is not


def test_a_solve_with_compiled_products(graphs):
    function, point, args, _ = CASES["network, one decay a weight"]
    args = {"decay": args["decay"] + 5.0}
    operator = CompiledDerivatives().at(function, point, args).operator
    rhs = randn(14)
    solution = linear_solve(operator, rhs, ConjugateGradient(rtol=1e-12))
    dense = torch.autograd.functional.hessian(lambda x: function(x, args, None), point)
    close(solution.value, torch.linalg.solve(dense, rhs), 1e-9)


# --- compiled in earnest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("network, one decay a weight", torch.float64),
        ("network, one decay a weight", torch.float32),
        ("vmapped tasks", torch.float64),
        ("optimality", torch.float64),
    ],
)
def test_machine_code_gives_the_eager_numbers(name, dtype, monkeypatch):
    function, point, args, data = CASES[name]
    for held in ("MATRIX", "INPUTS"):
        monkeypatch.setitem(globals(), held, globals()[held].to(dtype))
    point, args = point.to(dtype), {key: value.to(dtype) for key, value in args.items()}
    data = data and [part.to(dtype) for part in data]
    compiled = CompiledDerivatives()
    for factor in (1.0, 0.5):
        found = compiled.at(function, factor * point, args, data)
        assert found.fallback is None
        expected, tolerance = (
            differentiate(function, factor * point, args, data),
            1e-5 if dtype == torch.float32 else 1e-13,
        )
        agree(found, expected, tolerance)
        strided = randn(*reversed(point.shape), 2)[..., 0].permute(*reversed(range(point.ndim))).to(dtype)
        close(found.operator.mv(strided), expected.operator.mv(strided), tolerance)
    assert all(seconds > 0 for seconds in compiled.seconds.values())


def test_compiled_code_is_found_again_on_disk():
    """By the next process; what torch cannot keep it counts as a bypass."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        for number in (1, 2):
            counters.clear()
            assert CompiledDerivatives().at(mlp, randn(14), {"decay": randn().square()}).fallback is None
            found = {name: count for name, count in counters["inductor"].items() if name.startswith("fxgraph_cache")}
            assert found == ({"fxgraph_cache_miss": 2} if number == 1 else {"fxgraph_cache_hit": 2})


def test_without_a_compiler_products_are_eager():
    scale = float(torch.seed() % 1000 + 1)  # a graph that no cache knows
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler"), "fx_graph_cache": False}):
        found = CompiledDerivatives().at(lambda x, args, data: (scale * x**4).sum(), randn(5), {})
    assert "could not be compiled (" in found.fallback and "ompiler" in found.fallback
    close(
        found.operator.mv(torch.ones_like(found.optimality)),
        found.optimality.sign() * found.operator.mv(found.optimality.sign()),
    )


# --- one program for all points ---------------------------------------------------------------------------------------


def count(function, graphs):
    """At one point more: the derivatives are right; how many graphs there are by now."""
    compiled = CompiledDerivatives()

    def go(point=None, args=None, data=None):
        point = randn(6) if point is None else point
        found = compiled.at(function, point, args or C, data)
        agree(found, differentiate(function, point, args or C, data))
        return len(graphs), found.fallback

    return go


def test_batches_are_inputs(graphs):
    go = count(lambda x, args, data: ((data["x"] @ x - data["y"][0]) ** 4).sum() * args["c"], graphs)
    for _ in range(3):
        assert go(data={"x": randn(4, 6), "y": (randn(4),)}) == (1, None)
    assert go(data={"x": randn(5, 6), "y": (randn(5),)}) == (2, None)  # other shapes
    assert go(data={"x": randn(6, 5).T, "y": (randn(5),)}) == (3, None)  # other strides
    assert go(data={"x": randn(4, 6), "y": (randn(4),)}) == (3, None)


def test_plain_values_of_the_batch_are_compiled_in(graphs):
    go = count(lambda x, args, data: (x**4).sum() * data["factor"] * args["c"], graphs)
    assert [go(data={"factor": factor})[0] for factor in (1, 2, 1, 1.0, True)] == [1, 2, 2, 3, 4]


def test_another_dtype_is_another_program(graphs):
    go = count(lambda x, args, data: (x**4).sum(-1) * args["c"], graphs)
    assert go() == (1, None)
    compiled = CompiledDerivatives()
    for dtype in (torch.float64, torch.float32):
        assert compiled.at(equilibrium_free, randn(6).to(dtype), {}).operator.dtype == dtype
    assert len(graphs) == 3


def equilibrium_free(x, args, data):
    return (x.cos() * x).sum(-1)


def test_held_data_changed_in_place_is_seen(graphs):
    held = randn(6)
    go = count(lambda x, args, data: ((x - held) ** 4).sum() * args["c"], graphs)
    assert go() == (1, None)
    held.mul_(2.0)
    assert go() == (1, None)


@pytest.mark.parametrize("others", [[torch.full((6,), v, dtype=torch.float64) for v in (2.0, 3.0, 4.0, 5.0, 6.0)], [2.0, 3.0, 4.0, 5.0, 6.0]], ids=["tensors", "numbers"])  # fmt: skip
def test_held_data_exchanged_is_seen_and_in_the_end_given_up(others, graphs):
    held = {"value": others[0] * 0.5}
    go = count(lambda x, args, data: ((x - held["value"]) ** 4).sum() * args["c"], graphs)
    assert go() == (1, None)
    for number, held["value"] in enumerate(others[:MAX_CHANGES], start=2):
        assert go() == (number, None) and go() == (number, None)
    held["value"] = others[MAX_CHANGES]
    made, fallback = go()
    assert made == MAX_CHANGES + 1
    assert "reads something that changes" in fallback and fallback.endswith(
        "make it a hyperparameter or part of the batch."
    )
    held["value"] = others[0]
    assert go() == (made, fallback)  # settled: nothing is traced any more


def test_a_flag_that_is_switched_is_seen(graphs):
    flag = torch.tensor(True)
    go = count(lambda x, args, data: (x**4).sum() * args["c"] if flag else (x**2).sum(), graphs)
    assert go() == (1, None)
    flag.fill_(False)
    assert go() == (2, None)


def test_so_many_shapes_and_no_more(graphs):
    compiled = CompiledDerivatives()

    def go(size):
        fallback = compiled.at(equilibrium_free, randn(size), {}).fallback
        return len(graphs), fallback

    for size in range(1, MAX_PROGRAMS + 1):
        assert go(size) == (size, None)
    for size in (20, 21, 20):
        made, fallback = go(size)
        assert made == MAX_PROGRAMS and f"{MAX_PROGRAMS} other shapes" in fallback
    assert go(1) == (MAX_PROGRAMS, None)  # these go on
    assert len(compiled.programs) == MAX_PROGRAMS  # what is refused leaves nothing behind


def test_later_changes_of_the_arguments_do_not_reach_the_products(graphs):
    function, start, decay, _ = CASES["network, one decay a weight"]
    point, args = start.clone(), {"decay": decay["decay"].clone()}
    found = CompiledDerivatives().at(function, point, args)
    point.zero_()
    args["decay"].zero_()
    agree(found, differentiate(function, start, decay))


def test_the_owner_of_the_function_is_not_kept(graphs):
    class Owner:
        scale = 2.0

        def loss(self, x, args, data):
            return (self.scale * x**4).sum()

    owner, compiled = Owner(), CompiledDerivatives()
    owner.compiled = compiled
    compiled.at(owner.loss, randn(3), {})
    compiled.at(owner.loss, randn(3), {})
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None


# --- where there is no program ----------------------------------------------------------------------------------------

STATISTICS = torch.nn.BatchNorm1d(3, dtype=torch.float64)
MASK = torch.tensor([True, False, True, False, False, True])
REFUSED = {
    "dropout": (lambda x, args, data: (functional.dropout(x, 0.5) ** 2).sum(), "draws random numbers (aten.bernoulli"),
    "noise": (lambda x, args, data: (torch.randn(6, dtype=x.dtype) * x**2).sum(), "draws random numbers (aten.randn"),
    "running statistics": (lambda x, args, data: (STATISTICS(x.reshape(2, 3)) ** 4).sum(), "changes a tensor that it is given or holds"),
    "if": (lambda x, args, data: (x**4).sum() if x.sum() > 0 else (x**2).sum(), "goes by the values of tensors"),
    "item": (lambda x, args, data: (x**4).sum() * args["c"].item(), "goes by the values of tensors"),
    "float": (lambda x, args, data: (x**4).sum() * float(args["c"]), "goes by the values of tensors"),
    "mask": (lambda x, args, data: (x[MASK] ** 4).sum(), "goes by the values of tensors"),
    "numpy": (lambda x, args, data: (x**4).sum() * torch.as_tensor(args["c"].detach().numpy()), "could not be compiled (RuntimeError: "),
}  # fmt: skip


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_a_function_that_is_no_graph_is_differentiated_eagerly(function, reason, graphs):
    compiled, point, vector = CompiledDerivatives(), randn(6), randn(6)
    for _ in range(2):
        products = []
        for at in (compiled.at, differentiate):
            torch.manual_seed(0)
            found = at(function, point, C)
            products.append(found.operator.mv(vector))
            if at is not differentiate:
                assert found.fallback.startswith("the products are eager, not compiled, because ")
                assert reason in found.fallback and found.fallback.endswith(".") and "\n" not in found.fallback
        close(*products)
    assert graphs == []


@pytest.mark.parametrize(
    ("function", "spoilt", "what"),
    [(quartic, 0, "product"), (equilibrium, 0, "product"), (equilibrium, 1, "transposed product")],
)
def test_wrong_products_are_found_out(function, spoilt, what, monkeypatch):
    made = []

    def compile(graph, example, options):
        made.append(graph)
        wrong = len(made) - 2 == spoilt  # the first graph is what does not depend on a vector
        return lambda *tensors: [result * (1 + 1e-5 * wrong) for result in graph(*tensors)]

    monkeypatch.setattr(torch._inductor, "compile", compile)
    found = CompiledDerivatives().at(function, randn(6), C)
    assert f"their {what} differs from the eager one by 1.0e-05 (relative)" in found.fallback
    assert type(found.operator).__module__ != module.__name__


def test_a_wrong_setup_is_found_out(monkeypatch):
    def compile(graph, example, options):
        wrong = len(example) == 2  # the point and its argument
        return lambda *tensors: [result * (1 + 1e-5 * wrong) for result in graph(*tensors)]

    monkeypatch.setattr(torch._inductor, "compile", compile)
    found = CompiledDerivatives().at(quartic, randn(6), C)
    assert "their product differs from the eager one by" in found.fallback


def test_wrong_mixed_products_are_found_out(graphs, monkeypatch):
    true = module.split

    def wrong(graph):
        setup, (product, transposed, mixed) = true(graph)
        return setup, [product, transposed, mixed._replace(graph=lambda *t: [1.1 * r for r in mixed.graph(*t)])]

    monkeypatch.setattr(module, "split", wrong)
    found = CompiledDerivatives().at(quartic, randn(6), C)
    assert "their derivative by c differs from the eager one by 1.0e-01 (relative)" in found.fallback


def test_an_error_of_the_compiler_is_one_sentence(monkeypatch):
    def compile(graph, example, options):
        raise NotImplementedError("no such thing.\nand a long story")

    monkeypatch.setattr(torch._inductor, "compile", compile)
    found = CompiledDerivatives().at(quartic, randn(6), C)
    assert found.fallback.endswith("because they could not be compiled (NotImplementedError: no such thing).")


def test_errors_of_the_function_are_its_own(graphs):
    def loss(x, args, data):
        if data:
            raise UsageError("the loss says so.")
        return (x**4).sum()

    compiled = CompiledDerivatives()
    for data in (1, 0, 0, 1):
        if data:
            with pytest.raises(UsageError, match="the loss says so"):
                compiled.at(loss, randn(6), C, data)
        else:
            assert compiled.at(loss, randn(6), C, data).fallback is None


def test_a_point_that_is_not_finite_settles_nothing(graphs):
    compiled, bad = CompiledDerivatives(), torch.full((6,), math.nan, dtype=torch.float64)
    assert "not finite here" in compiled.at(quartic, bad, C).fallback
    assert compiled.at(quartic, randn(6), C).fallback is None
    for _ in range(MAX_CHANGES + 1):
        found = compiled.at(quartic, bad, C)
        assert found.fallback is None and found.optimality.isnan().all()
    assert compiled.at(quartic, randn(6), C).fallback is None and len(graphs) == 1


# --- as the products of a hypergradient -------------------------------------------------------------------------------


class Network(Problem):
    """Two tasks that share a decay for each parameter; noise, if any, is drawn in every evaluation."""

    constraints = {"decay": Positive()}
    num_tasks = 2
    noise = 0.0

    def __init__(self):
        draw = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(2, 9, 3, generator=draw), torch.randn(2, 9, generator=draw)
        self.start = torch.randn(3, 2, generator=draw)

    def init_hparams(self):
        return {"decay": torch.full((3, 2), 0.1).to(self.x)}

    def init_params(self, hparams):
        return {"w": self.start.clone()}

    def inner_batches(self, step, inner_step):
        return {"x": self.x, "y": self.y}

    outer_batches = inner_batches

    def inner_loss(self, params, hparams, batch):
        x = batch["x"] + self.noise * torch.randn_like(batch["x"]) if self.noise else batch["x"]
        return ((x @ params["w"]).tanh().sum(-1) - batch["y"]).square().mean() + (
            hparams["decay"] * params["w"].square()
        ).sum()

    def outer_loss(self, params, hparams, batch):
        return ((batch["x"] @ params["w"]).tanh().sum(-1) - 1).square().mean()


def hypergradient(problem, compile):
    method = Implicit(linear_solver=MINRES(rtol=1e-12), compile=compile)
    solver = GradientDescent(learning_rate=0.1, max_steps=100, atol=0.0)
    return [hypergradient_at(problem, method=method, solver=solver, step=step) for step in (0, 1)]


class Whole(Network):
    """The same without batches."""

    inner_batches = outer_batches = None

    def inner_loss(self, params, hparams, batch):
        return super().inner_loss(params, hparams, {"x": self.x, "y": self.y})

    def outer_loss(self, params, hparams, batch):
        return super().outer_loss(params, hparams, {"x": self.x, "y": self.y})


@pytest.mark.parametrize("kind", [Network, Whole])
def test_a_compiled_hypergradient_is_the_eager_one_step_after_step(kind, graphs):
    problem = kind().to(dtype=torch.float64)
    for eager, compiled in zip(hypergradient(problem, False), hypergradient(problem, True), strict=True):
        torch.testing.assert_close(compiled.gradient, eager.gradient, rtol=1e-9, atol=1e-12)
        assert compiled.receipt.fallback is None
        assert (compiled.receipt.error_estimate > 0) is (kind is Whole)
        assert compiled.inner_loss == pytest.approx(eager.inner_loss, rel=1e-12)


def test_a_hypergradient_that_is_not_compiled_says_why(graphs):
    problem = Network().to(dtype=torch.float64)
    problem.noise = 0.1
    torch.manual_seed(0)
    eager = hypergradient(problem, False)[0]
    torch.manual_seed(0)
    compiled = hypergradient(problem, True)[0]
    assert "draws random numbers" in compiled.receipt.fallback and eager.receipt.fallback is None
    torch.testing.assert_close(compiled.gradient, eager.gradient, rtol=1e-9, atol=1e-12)


class Fitted(Problem):
    """A logistic regression with a penalty."""

    constraints = {"penalty": Positive()}

    def init_hparams(self):
        return {"penalty": torch.tensor(0.1, dtype=torch.float64)}

    def init_params(self, hparams):
        return {"w": torch.zeros(3, dtype=torch.float64)}

    def inner_loss(self, params, hparams, batch):
        fit = functional.softplus((1 - 2 * LABELS) * (INPUTS @ params["w"])).mean()
        return fit + hparams["penalty"] * params["w"].square().sum()

    def outer_loss(self, params, hparams, batch):
        return (params["w"] - 1).square().sum()


def test_tolerances_that_change_from_step_to_step_compile_once(graphs):
    problem = Fitted()
    result = fit(problem, hypergradient=Implicit.auto(compile=True), num_steps=4)
    assert len(graphs) == 1 and all(record["receipt.fallback"] is None for record in result.history)
    assert len({record["receipt.stationarity"] for record in result.history}) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_roots_of_an_optimality_are_no_changes_of_the_function(dtype):
    """Compiled for real, as it is rounding that differs."""
    matrix = MATRIX.to(dtype) / 10

    def optimality(x, args, data):
        return x - torch.tanh(x @ matrix.T + args["c"])

    compiled = CompiledDerivatives()
    for shift in torch.linspace(0.1, 0.6, 2 * MAX_CHANGES):
        x, args = torch.zeros(6, dtype=dtype), {"c": shift.to(dtype).expand(6)}
        for _ in range(200):
            x = torch.tanh(x @ matrix.T + args["c"])
        found = compiled.at(optimality, x, args)
        assert found.fallback is None and compiled.programs.changes == 0


def test_products_of_few_columns_are_turned_and_views_of_them_stay_possible():
    def loss(x, args, data):  # the layout `inputs @ weight`: its gradient is a narrow product, and then a view
        hidden = (data @ x[:480].view(48, 10)).tanh()
        return functional.cross_entropy(hidden @ x[480:].view(10, 3), torch.arange(90) % 3) + (x**2).sum()

    x, vector, data = randn(510), randn(510), randn(90, 48)
    found, expected = CompiledDerivatives().at(loss, x, {}, data), differentiate(loss, x, {}, data)
    assert found.fallback is None
    close(found.operator.mv(vector), expected.operator.mv(vector))


# --- the arithmetic of solvers --------------------------------------------------------------------------------------------


class Fusing(MatrixOperator):
    def fuse(self, function):
        return fused(function)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (3,)], ids=["one system", "a batch"])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_fused_arithmetic_takes_the_same_steps(preconditioned, batch, dtype):
    n = 40
    root = torch.randn(*batch, n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix = (root @ root.mT + torch.eye(n, dtype=torch.float64)).to(dtype)
    vector = torch.randn(*batch, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    if batch:
        vector[1] = 0.0  # a system that is done at once
    plain, fast = MatrixOperator(matrix, POSITIVE_DEFINITE), Fusing(matrix, POSITIVE_DEFINITE)
    scale = DiagonalOperator(1.0 / matrix.diagonal(dim1=-2, dim2=-1), POSITIVE_DEFINITE) if preconditioned else None
    solver = ConjugateGradient(rtol=None, max_steps=8)
    expected, found = (solver.compute(solver.init(one), vector, preconditioner=scale) for one in (plain, fast))
    tolerance = 1e3 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.value, expected.value, rtol=tolerance, atol=tolerance)
    for name in ("residual_norm", "curvature_min", "curvature_max"):
        pair = (getattr(found, name), getattr(expected, name))
        torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert torch.equal(found.num_mv, expected.num_mv) and torch.equal(found.result, expected.result)
    solver = ConjugateGradient(rtol=1e-4, max_steps=500)
    solved = solver.compute(solver.init(WatchedOperator(fast, 5)), vector, preconditioner=scale)
    assert bool(solved.successful)
    residual = (matrix @ solved.value.unsqueeze(-1)).squeeze(-1) - vector
    assert float((residual.norm(dim=-1) / vector.norm(dim=-1).clamp(min=1e-30)).max()) < 1.1e-4
    assert not solver.compute(
        solver.init(Fusing(-matrix, POSITIVE_DEFINITE)), vector
    ).successful  # and sees negative curvature


def test_arithmetic_that_cannot_be_compiled_runs_as_written():
    by_value = Fused(lambda x: (x + 1,) if float(x.sum()) > 0 else (x - 1,))
    assert by_value(torch.ones(2))[0].tolist() == [2.0, 2.0] and by_value(-torch.ones(2))[0].tolist() == [-2.0, -2.0]
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler"), "fx_graph_cache": False}):
        assert Fused(lambda x: (2 * x.sin() * x.cos(),))(torch.zeros(3))[0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("first", [(1.0, 2.0), (math.nan, math.inf)], ids=["numbers", "NaN and infinity"])
@pytest.mark.parametrize("shift", [0.0, 1e-4])
def test_the_first_results_of_compiled_arithmetic_are_compared(first, shift, monkeypatch):
    def function(x):
        return x + 1, x > 0

    def program(x):
        return x + 1 + shift, x > 0

    monkeypatch.setattr("bilevel.linalg.fused.compile_graph", lambda graph, example: program)
    arithmetic = Fused(function)
    arithmetic(torch.tensor(first, dtype=torch.float64))
    wrong = shift and math.isfinite(first[0])
    assert list(arithmetic._programs.values()) == [function if wrong else program]
