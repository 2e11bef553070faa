"""Preconditioners against dense matrices: positive definite always, exact where theory says so, counted, reusable."""

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bilevel.batches import StepBatches
from bilevel.constraints import Positive
from bilevel.errors import UsageError
from bilevel.flat import FlatProblem, natural_hparams
from bilevel.hypergradient import Implicit
from bilevel.linalg import (
    POSITIVE_DEFINITE,
    SYMMETRIC,
    AutoSolver,
    BlockKroneckerInverse,
    ConjugateGradient,
    DenseCholesky,
    DenseLU,
    HessianOperator,
    IdentityOperator,
    IdentitySolver,
    InverseBFGS,
    InverseDiagonalPlusLowRank,
    KroneckerBlock,
    LinearOperator,
    MatrixOperator,
    as_matrix,
)
from bilevel.linalg.lbfgs import Pairs
from bilevel.linalg.nystrom import nystrom, sketch
from bilevel.linearisation import linearise
from bilevel.preconditioner import EKFAC, KFAC, AdamSecondMoment, Jacobi, LBFGSPairs, Nystrom
from bilevel.preconditioner.penalty import penalty_diagonal
from bilevel.problem import Problem
from bilevel.solvers import LBFGS, Adam, TorchOptimizer, run

pytestmark = pytest.mark.usefixtures("float64")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def square(outputs, targets):
    return 0.5 * (outputs - targets).square().flatten(1).sum(-1)


def entropy(outputs, targets):
    return F.cross_entropy(outputs, targets.argmax(-1), reduction="none")


class Model(Problem):
    """Any function of named parameters, any loss, one penalty for each parameter."""

    constraints = {"penalty": Positive()}

    def __init__(self, function, shapes, x, targets, loss=square, penalty=0.1, num_tasks=None, start=0.5):
        self.function, self.shapes, self.x, self.targets, self.loss = function, shapes, x, targets, loss
        self.start_penalty, self.num_tasks, self.start_scale = penalty, num_tasks, start
        if num_tasks is not None:
            self.inner_batches = lambda step, inner: (self.x, self.targets)

    def init_hparams(self):
        given = self.start_penalty
        return {
            "penalty": {
                name: (given[name] if isinstance(given, dict) else torch.full(shape, given))
                for name, shape in self.shapes.items()
            }
        }

    def init_params(self, hparams):
        return {
            name: self.start_scale * normal(*shape, seed=seed) for seed, (name, shape) in enumerate(self.shapes.items())
        }

    def outputs(self, params, hparams, batch):
        return self.function(params, self.x if batch is None else batch[0])

    def output_loss(self, outputs, hparams, batch):
        return self.loss(outputs, self.targets if batch is None else batch[1])

    def penalty(self, params, hparams):
        return 0.5 * sum((hparams[f"penalty.{name}"] * value.square()).sum() for name, value in params.items())

    def outer_loss(self, params, hparams, batch):
        return sum((value - 1.0).square().sum() for value in params.values())


X, Y = (
    normal(30, 4, seed=10) @ torch.diag(torch.tensor([3.0, 1.0, 1.0, 0.1], dtype=torch.float64)),
    normal(30, 3, seed=11),
)


def linear_model(**options):
    return Model(lambda p, x: F.linear(x, p["w"], p["b"]), {"w": (3, 4), "b": (3,)}, X, Y, **options)


def two_layers(**options):
    def function(p, x):
        return torch.tanh(torch.addmm(p["b"], x, p["v"].mT)) @ p["w"]

    return Model(function, {"v": (5, 4), "b": (5,), "w": (5, 3)}, X, Y, **{"loss": entropy, **options})


def linearised(problem, params=None, hparams=None):
    """The linearisation, its inner solver's objective and the Hessian as a dense matrix."""
    hparams = natural_hparams(problem) if hparams is None else hparams
    flat = FlatProblem.of(problem, hparams)
    start = flat.start(hparams) if params is None else params
    batch = None if problem.num_tasks is None else (problem.x, problem.targets)
    return linearise(flat, LBFGS(), start, hparams, batch)


def penalties(at):
    return at.problem.layout.ravel(
        {name.removeprefix("penalty."): value for name, value in at.hparams.items()}
    ).detach()


def solved(problem, solver):
    hparams = natural_hparams(problem)
    flat = FlatProblem.of(problem, hparams)
    batch = None if problem.num_tasks is None else (problem.x, problem.targets)
    return run(solver, flat.objective(batch), flat.start(hparams), hparams)


class Counted(LinearOperator):
    """Another operator, with its products counted."""

    def __init__(self, operator):
        self.operator, self.products = operator, 0
        self.shape, self.batch_shape, self.tags = operator.shape, operator.batch_shape, operator.tags
        self.dtype, self.device = operator.dtype, operator.device

    def mv(self, vector):
        self.products += vector.shape[: vector.ndim - 1 - len(self.batch_shape)].numel()
        return self.operator.mv(vector)

    def transpose(self):
        return self

    def inner(self, u, v):  # as an operator with its own inner product has it: nothing may go round it
        return (u * v).sum(-1)


def assert_positive_definite(operator):
    matrix = as_matrix(operator)
    scale = matrix.abs().amax((-2, -1), keepdim=True)
    torch.testing.assert_close(matrix / scale, matrix.mT / scale, rtol=1e-8, atol=1e-9)
    assert bool((torch.linalg.eigvalsh((matrix + matrix.mT) / 2) > 0).all())
    return matrix


# ---------------------------------------------------------------------------------------------------------------------
# Every preconditioner on every problem.

PRECONDITIONERS = [
    Jacobi(),
    AdamSecondMoment(),
    Nystrom(),
    Nystrom(rank=5),
    KFAC(),
    KFAC(num_samples=2),
    EKFAC(),
    LBFGSPairs(),
    LBFGSPairs(base=KFAC()),
    LBFGSPairs(base=Nystrom(rank=5)),
]
PROBLEMS = {
    "linear": linear_model,
    "two layers": two_layers,
    "indefinite": partial(two_layers, penalty=1e-6, start=2.0),  # far from a minimum
    "no penalty": partial(linear_model, penalty=0.0),
    "free bias": partial(
        linear_model,
        penalty={"w": torch.full((3, 4), 0.01, dtype=torch.float64), "b": torch.zeros(3, dtype=torch.float64)},
    ),
    "tasks": partial(two_layers, num_tasks=2),
}


def make(name):
    problem = PROBLEMS[name]()
    if problem.num_tasks is not None:
        problem.x, problem.targets = torch.stack([X, 2 * X.flip(0)]), torch.stack([Y, Y.flip(1)])
    return problem


def inner_for(preconditioner, problem):
    if isinstance(preconditioner, AdamSecondMoment):
        return solved(problem, TorchOptimizer(max_steps=20))
    return solved(problem, LBFGS(max_steps=20, history=8))


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS, ids=str)
def test_positive_definite_restored_and_counted(preconditioner, name):
    problem = make(name)
    inner = inner_for(preconditioner, problem)
    at = linearised(problem)
    counted = Counted(at.operator)
    built = preconditioner.build(replace(at, operator=counted), inner)
    if not isinstance(getattr(preconditioner, "base", preconditioner), KFAC | EKFAC):
        assert built.num_mv == counted.products
    else:  # backward passes: one for each of the three outputs (softmax has two that matter), and the forward ones
        assert counted.products == 0 and 3 <= built.num_mv <= 4
    assert built.num_mv <= preconditioner.price(at)
    matrix = assert_positive_definite(built.operator)
    before = counted.products
    again = preconditioner.restore(replace(at, operator=counted), built.state)
    assert counted.products == before
    torch.testing.assert_close(as_matrix(again), matrix, rtol=1e-6, atol=1e-9 * float(matrix.abs().max()))
    vectors = normal(3, *at.params.shape)  # extra leading dimensions broadcast
    expected = (matrix @ vectors.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(built.operator.mv(vectors), expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))
    moved = {
        key: value * torch.linspace(0.1, 30, value.numel()).reshape(value.shape) for key, value in at.hparams.items()
    }
    elsewhere = linearised(problem, at.params.detach() + 0.3, moved)
    assert_positive_definite(preconditioner.restore(elsewhere, built.state))


@pytest.mark.parametrize("preconditioner", [Jacobi(), KFAC(), EKFAC(), Nystrom(rank=6), LBFGSPairs()], ids=str)
def test_tasks_are_preconditioned_as_each_would_be_alone(preconditioner):
    problem = make("tasks")
    inner, at = inner_for(preconditioner, problem), linearised(problem)
    together = as_matrix(preconditioner.build(at, inner).operator)
    for task in range(2):
        alone = two_layers()
        alone.x, alone.targets = problem.x[task], problem.targets[task]
        if isinstance(preconditioner, KFAC | EKFAC):
            single = as_matrix(preconditioner.build(linearised(alone), None).operator)
            torch.testing.assert_close(together[task], single, rtol=1e-7, atol=1e-9)
        elif isinstance(preconditioner, LBFGSPairs):
            pairs = inner.state["s"][:, task], inner.state["y"][:, task]
            operator = linearised(alone).operator
            single = as_matrix(InverseBFGS(operator, Pairs.of(operator, *pairs)))
            torch.testing.assert_close(together[task], single, rtol=1e-7, atol=1e-9)
        else:  # random vectors are drawn for the whole batch; better than nothing in each task all the same
            hessian = as_matrix(at.operator)[task]
            spread = torch.linalg.eigvals(together[task] @ hessian).abs()
            plain = torch.linalg.eigvalsh(hessian).abs()
            assert float(spread.max() / spread.min()) < 2 * float(plain.max() / plain.min())


@pytest.mark.parametrize("preconditioner", [Jacobi(), Nystrom(), KFAC(), EKFAC()], ids=str)
def test_float32_stays_positive_definite_at_strong_curvature(preconditioner):
    problem = linear_model(penalty=1e-4)
    problem.x = problem.x * 300.0
    problem.to(dtype=torch.float32)
    matrix = as_matrix(preconditioner.build(linearised(problem), None).operator).double()
    assert bool((torch.linalg.eigvalsh((matrix + matrix.mT) / 2) > 0).all())


# ---------------------------------------------------------------------------------------------------------------------
# Kronecker factors.


def by_module(p, x):
    layer = nn.Linear(4, 3)
    return torch.func.functional_call(layer, {"weight": p["w"], "bias": p["b"]}, (x,))


SPELLINGS = {
    "F.linear": lambda p, x: F.linear(x, p["w"], p["b"]),
    "addmm": lambda p, x: torch.addmm(p["b"], x, p["w"].mT),
    "x @ w.mT + b": lambda p, x: x @ p["w"].mT + p["b"],
    "b + matmul(x, w.T)": lambda p, x: p["b"] + torch.matmul(x, p["w"].T),
    "(w @ x.mT).mT": lambda p, x: (p["w"] @ x.mT).mT + 0.0,
    "transpose, mm": lambda p, x: x.mm(p["w"].transpose(0, 1)).add(p["b"]),
    "module": by_module,
    "conv2d of one place": lambda p, x: F.conv2d(x.reshape(-1, 1, 2, 2), p["w"].reshape(3, 1, 2, 2), p["b"]).flatten(1),
    "conv1d of one place": lambda p, x: F.conv1d(x.reshape(-1, 2, 2), p["w"].view(3, 2, 2), p["b"]).flatten(1),
    "two slices": lambda p, x: torch.cat([F.linear(x, p["w"][:1], p["b"][:1]), F.linear(x, p["w"][1:], p["b"][1:])], -1),
}  # fmt: skip


@pytest.mark.parametrize("penalty", ["shared", "by row", "by column"])
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_linear_map_with_the_square_loss_is_inverted_exactly(spelling, kind, penalty):
    """Its Hessian is `mean a a^T ⊗ I + D`: a Kronecker product, with every separable penalty."""
    weights = {
        "shared": torch.full((3, 4), 0.3),
        "by row": torch.tensor([[0.1], [1.0], [10.0]]).expand(3, 4).clone(),
        "by column": torch.tensor([[1e-3, 0.1, 1.0, 10.0]]).expand(3, 4).clone(),
    }[penalty]
    with_bias = spelling != "(w @ x.mT).mT"
    shapes = {"w": (3, 4), "b": (3,)} if with_bias else {"w": (3, 4)}
    # The bias is a fifth column: its penalty keeps the whole separable.
    bias = weights[:, 0] if penalty != "by column" else torch.full((3,), 2.0)
    problem = Model(
        SPELLINGS[spelling], shapes, X, Y, penalty={"w": weights, "b": bias} if with_bias else {"w": weights}
    )
    at = linearised(problem)
    built = kind().build(at, None)
    assert len(built.operator.blocks) == (2 if spelling == "two slices" else 1)
    torch.testing.assert_close(
        as_matrix(built.operator), torch.linalg.inv(as_matrix(at.operator)), rtol=1e-8, atol=1e-9
    )
    # and again under other penalties, by the old factors
    other = {name: 7.0 * value for name, value in at.hparams.items()}
    moved = linearised(problem, at.params.detach() + 1.0, other)
    again = kind().restore(moved, built.state)
    torch.testing.assert_close(as_matrix(again), torch.linalg.inv(as_matrix(moved.operator)), rtol=1e-8, atol=1e-9)


def dense_blocks(at, problem):
    """The Gauss-Newton matrix without the penalty, by autograd."""
    return as_matrix(at.gauss_newton()) - torch.diag(penalties(at))


def test_ekfac_has_the_diagonal_of_the_gauss_newton_block_in_its_basis_and_kfac_the_factors():
    problem = two_layers(penalty=0.01)
    at = linearised(problem)
    exact, parameter_penalties = dense_blocks(at, problem), penalties(at)
    better = EKFAC().build(at, None).operator
    plain = KFAC().build(at, None).operator
    for block, other in zip(better.blocks, plain.blocks, strict=True):
        index = block.index.flatten()
        inside = exact[index][:, index]
        basis = torch.kron(block.left.contiguous(), block.right.contiguous())
        whole = basis.T @ (inside + torch.diag(parameter_penalties[index])) @ basis
        torch.testing.assert_close(block.values.flatten(), whole.diagonal(), rtol=1e-8, atol=1e-12)
        errors = [(whole - torch.diag(one.values.flatten())).norm() for one in (block, other)]
        assert errors[0] <= errors[1]
        # K-FAC keeps the trace where the two are uncorrelated in the mean; here only its size
        assert 0.5 < float(other.values.sum() / block.values.sum()) < 2.0


@pytest.mark.parametrize("model", ["softmax", "square"])
def test_kfac_equals_the_gauss_newton_matrix_where_gradients_do_not_depend_on_the_inputs(model):
    """Zero weights make all softmax outputs alike: `g g^T` is then the same for every example."""
    problem = Model(
        lambda p, x: x @ p["w"], {"w": (4, 3)}, X, Y, loss=entropy if model == "softmax" else square, start=0.0
    )
    at = linearised(problem)
    for kind in (KFAC, EKFAC):
        matrix = torch.linalg.inv(as_matrix(kind().build(at, None).operator))
        torch.testing.assert_close(matrix, as_matrix(at.gauss_newton()), rtol=1e-8, atol=1e-10)


CONVOLUTIONS = {
    "plain": {},
    "stride and padding": {"stride": 2, "padding": 1},
    "dilation": {"dilation": (1, 2)},
}


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_convolutions_follow_the_expand_convention(options):
    """Against its definition: each place is an example of its own; the patches are cut out by hand."""
    options = CONVOLUTIONS[options]
    images, targets = normal(6, 2, 5, 5, seed=20), normal(6, 3, seed=21)

    def function(p, x):
        return F.conv2d(x, p["w"], p["b"], **options).tanh().sum((-2, -1))

    at = linearised(Model(function, {"w": (3, 2, 2, 2), "b": (3,)}, images, targets, penalty=0.2))
    block = KFAC().build(at, None).operator.blocks[0]
    params = at.problem.unravel(at.params.detach())
    positions = torch.arange(8).reshape(2, 2, 2)
    one_hot = torch.eye(8).reshape(8, 2, 2, 2)
    patches = F.conv2d(images, one_hot, **options)  # (N, 8, places): channel k holds entry k of each patch
    assert positions.flatten().tolist() == list(range(8))
    patches = patches.flatten(2).mT
    with_one = torch.cat([patches, torch.ones(*patches.shape[:-1], 1)], -1).flatten(0, 1)
    slope = 1 - F.conv2d(images, params["w"], params["b"], **options).tanh().square()  # of each channel's sum
    slopes = slope.flatten(2).mT.flatten(0, 1)
    expected_a = with_one.T @ with_one / len(with_one)
    expected_b = torch.diag(slopes.square().sum(0)) / len(images)  # square loss: S = I / sqrt(N), one column a channel
    whole = torch.kron(expected_a, expected_b) + 0.2 * torch.eye(27)
    index = block.index.flatten()
    got = torch.linalg.inv(as_matrix(KFAC().build(at, None).operator))[index][:, index]
    torch.testing.assert_close(got, whole, rtol=1e-8, atol=1e-10)
    # EKFAC sums the places of an example before it squares: the exact diagonal in its basis
    better = EKFAC().build(at, None).operator.blocks[0]
    basis = torch.kron(better.left.contiguous(), better.right.contiguous())
    exact = as_matrix(at.gauss_newton())[index][:, index]
    torch.testing.assert_close(better.values.flatten(), (basis.T @ exact @ basis).diagonal(), rtol=1e-8, atol=1e-10)


def test_a_matrix_that_is_used_twice_has_the_places_of_both_uses():
    """`tanh(x W) W`-like weight sharing against sequences of two tokens that are multiplied at once."""
    pairs = normal(12, 2, 4, seed=22)
    apart = Model(
        lambda p, x: F.linear(x[:, 0], p["w"]) + 2 * F.linear(x[:, 1], p["w"]), {"w": (3, 4)}, pairs, normal(12, 3)
    )
    scale = torch.tensor([[1.0], [2.0]])
    at_once = Model(lambda p, x: (scale * F.linear(x, p["w"])).sum(-2), {"w": (3, 4)}, pairs, normal(12, 3))
    for kind in (KFAC, EKFAC):
        first, second = (as_matrix(kind().build(linearised(one), None).operator) for one in (apart, at_once))
        torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-10)


def test_samples_of_the_columns_tend_to_all_of_them():
    at = linearised(two_layers(penalty=0.1))
    exact = as_matrix(KFAC().build(at, None).operator)
    errors = [
        float((as_matrix(KFAC(num_samples=k).build(at, None).operator) - exact).norm() / exact.norm())
        for k in (1, 2000)
    ]
    assert errors[1] < 0.1 * errors[0]


def test_parameters_in_no_linear_map_get_the_diagonal():
    """A scale and a table of embeddings; for a single output of one example the squared gradients are the diagonal."""

    def function(p, x):
        return (p["scale"] * x + p["table"][torch.tensor([0, 1, 1, 0])]) @ p["w"]

    shapes = {"scale": (4,), "w": (4, 3), "table": (2,)}
    single = {**shapes, "w": (4, 1)}
    at = linearised(Model(function, single, X[:1], Y[:1, :1], penalty=0.2))
    built = KFAC().build(at, None)
    (block,) = built.operator.blocks
    rest = sorted(set(range(10)) - set(block.index.flatten().tolist()))
    assert built.num_mv == 1 + 10 + 1
    exact = as_matrix(at.gauss_newton()).diagonal()
    torch.testing.assert_close(built.operator.diagonal[rest], exact[rest], rtol=1e-9, atol=1e-12)
    # with many examples it is right in the mean over the random signs
    many = linearised(Model(function, shapes, X, Y, penalty=0.2))
    (block,) = KFAC().build(many, None).operator.blocks
    rest = sorted(set(range(18)) - set(block.index.flatten().tolist()))
    estimates = torch.stack([KFAC(seed=seed).build(many, None).operator.diagonal[rest] for seed in range(200)])
    exact = as_matrix(many.gauss_newton()).diagonal()[rest]
    error = estimates.std(0) / 200**0.5
    assert bool(((estimates.mean(0) - exact).abs() < 4 * error + 1e-12).all())


def masked(p, x):
    weight = p["w"].clone()
    weight[:, 0] = 0.0
    return F.linear(x, weight)


def shifted_in_place(p, x):
    return F.linear(x, p["w"]).mul_(2.0) + p["b"]


OUTSIDE = {
    "a changed copy": (masked, {"w": (3, 4)}, 0),
    "an elementwise product": (lambda p, x: F.linear(x, p["w"] * 2.0), {"w": (3, 4)}, 0),
    "a grouped convolution": (lambda p, x: F.conv1d(x.unsqueeze(-1), p["w"].unsqueeze(-1), groups=2).squeeze(-1), {"w": (4, 2)}, 0),
    "a bias after a change in place": (shifted_in_place, {"w": (3, 4), "b": (3,)}, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_no_plain_product_with_a_parameter_is_left_to_the_diagonal(name):
    function, shapes, num_blocks = OUTSIDE[name]
    targets = normal(30, 4, seed=11) if "group" in name else Y
    at = linearised(Model(function, shapes, X, targets))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        built = KFAC().build(at, None)
    assert any("KFAC was expected to find linear maps" in str(one.message) for one in said) == (num_blocks == 0)
    assert len(built.operator.blocks) == num_blocks
    assert_positive_definite(built.operator)
    rest = torch.ones(at.params.shape[-1], dtype=torch.bool)
    for block in built.operator.blocks:
        rest[block.index.flatten()] = False
    exact = as_matrix(at.gauss_newton()).diagonal()
    ratio = built.operator.diagonal[rest] / exact[rest]
    assert 0.2 < float(ratio.min()) and float(ratio.max()) < 4.0  # the mean of ten squares of sums with random signs


def test_the_kfac_inverse_alone_is_a_method_and_exact_for_a_linear_model():
    problem = linear_model(penalty=0.3)
    hparams = natural_hparams(problem)
    flat = FlatProblem.of(problem, hparams)
    arguments = flat, LBFGS(max_steps=500, atol=1e-11), flat.start(hparams), hparams, StepBatches(problem, 0), {}
    exact = Implicit(linear_solver=DenseCholesky()).compute(*arguments)
    alone = Implicit(linear_solver=IdentitySolver(), preconditioner=KFAC()).compute(*arguments)
    assert alone.receipt.num_mv == 0 and alone.receipt.biased
    for name in hparams:
        torch.testing.assert_close(alone.gradient[name], exact.gradient[name], rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Nystrom.


def test_a_sketch_as_wide_as_the_rank_finds_the_matrix():
    factor = normal(3, 40, 6)
    matrix = MatrixOperator(factor @ factor.mT, POSITIVE_DEFINITE)
    vectors, values = nystrom(matrix, sketch(matrix, 9))
    rebuilt = torch.einsum("kbn,bk,kbm->bnm", vectors, values, vectors)
    torch.testing.assert_close(rebuilt, factor @ factor.mT, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(values[:, -6:], torch.linalg.eigvalsh(matrix.matrix)[:, -6:], rtol=1e-8, atol=1e-8)
    assert bool((values[:, :3] < 1e-8).all())
    # in pieces, and through an inner product of its own
    pieces = sketch(matrix, 4, before=sketch(matrix, 5))
    assert pieces.probes.shape == (9, 3, 40) and not torch.equal(pieces.probes[0], pieces.probes[5])
    apart, same = nystrom(Counted(matrix), sketch(matrix, 9))
    torch.testing.assert_close(same, values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.einsum("kbn,bk,kbm->bnm", apart, same, apart), rebuilt, rtol=1e-7, atol=1e-7)


def test_the_approximation_is_never_above_the_matrix():
    eigenvalues = torch.logspace(0, -6, 60)
    basis = torch.linalg.qr(normal(60, 60, seed=30))[0]
    dense = basis @ torch.diag(eigenvalues) @ basis.T
    operator = MatrixOperator((dense + dense.T) / 2, POSITIVE_DEFINITE)
    vectors, values = nystrom(operator, sketch(operator, 20))
    gap = torch.linalg.eigvalsh(dense - torch.einsum("kn,k,km->nm", vectors, values, vectors))
    assert float(gap.min()) > -1e-12 and float(gap.max()) < 20 * float(eigenvalues[20:].sum())


def test_an_indefinite_matrix_blows_no_direction_up():
    """Without the cut a probe along which the signs cancel would give values far above the norm of the matrix."""
    basis = torch.linalg.qr(normal(60, 60, seed=34))[0]
    dense = basis @ torch.diag(torch.linspace(-0.8, 1.0, 60)) @ basis.T
    operator = MatrixOperator((dense + dense.T) / 2, SYMMETRIC)
    for seed in range(20):
        _, values = nystrom(operator, sketch(operator, 30, seed))
        assert bool((values >= 0).all()) and float(values.max()) < 5.0


@pytest.mark.parametrize("heterogeneous", [False, True])
def test_nystrom_of_full_rank_is_the_inverse_under_any_penalty(heterogeneous):
    """With as many products as parameters, `D` and the data's curvature add up to the Hessian, whatever `D` is."""
    spread = torch.logspace(-3, 2, 12).reshape(3, 4) if heterogeneous else torch.full((3, 4), 0.1)
    problem = linear_model(penalty={"w": spread, "b": torch.ones(3)})
    at = linearised(problem)
    built = Nystrom(rank=15).build(at, None)
    torch.testing.assert_close(
        as_matrix(built.operator), torch.linalg.inv(as_matrix(at.operator)), rtol=1e-5, atol=1e-6
    )
    other = {name: value.flip(0) for name, value in at.hparams.items()}
    moved = linearised(problem, at.params.detach(), other)
    again = Nystrom(rank=15).restore(moved, built.state)
    torch.testing.assert_close(as_matrix(again), torch.linalg.inv(as_matrix(moved.operator)), rtol=1e-5, atol=1e-6)


def spread_out(scales, penalty):
    """A linear model whose inputs have these singular values."""
    n = len(scales)
    x = torch.linalg.qr(normal(n, n, seed=31))[0] * scales.double() @ torch.linalg.qr(normal(n, n, seed=32))[0]
    return Model(lambda p, x: x @ p["w"], {"w": (n, 1)}, x, normal(n, 1), penalty=penalty)


@pytest.mark.parametrize(("tail", "penalty"), [(1e-3, 1e-3), (0.05, 0.0)], ids=["penalty", "no penalty"])
def test_the_rank_is_found_and_pays(tail, penalty):
    """Twenty strong directions above a flat rest: the sketch ends soon after them."""
    at = linearised(spread_out(torch.cat([torch.logspace(2, 0, 20), torch.full((180,), tail)]), penalty))
    built = Nystrom().build(at, None)
    assert 20 <= built.state["values"].shape[-1] <= 75
    solver, vector = ConjugateGradient(rtol=1e-8, max_steps=5000), normal(200, seed=33)
    with_it = solver.compute(solver.init(at.operator), vector, preconditioner=built.operator)
    without = solver.compute(solver.init(at.operator), vector)
    assert with_it.successful
    assert int(with_it.num_mv) < 0.4 * int(without.num_mv)


def test_max_rank_ends_the_search():
    at = linearised(spread_out(torch.logspace(2, 0, 200), 1e-7))
    built = Nystrom(max_rank=30).build(at, None)
    assert built.num_mv == 30 and built.state["values"].shape == (30,)


def test_diagonal_plus_low_rank_is_the_inverse_in_either_inner_product_and_survives_huge_factors():
    diagonal, factor = 0.1 + normal(2, 20).square(), normal(4, 2, 20, seed=3)
    dense = torch.diag_embed(diagonal) + torch.einsum("kbn,kbm->bnm", factor, factor)
    plain = IdentityOperator(20, (2,))
    for like in (plain, Counted(plain)):
        operator = InverseDiagonalPlusLowRank(like, diagonal, factor)
        torch.testing.assert_close(as_matrix(operator), torch.linalg.inv(dense), rtol=1e-9, atol=1e-10)
    huge = InverseDiagonalPlusLowRank(IdentityOperator(20, (2,), torch.float32), diagonal.float(), 1e9 * factor.float())
    assert bool((torch.linalg.eigvalsh(as_matrix(huge).double()) > 0).all())


# ---------------------------------------------------------------------------------------------------------------------
# Diagonals.


def test_jacobi_is_exact_where_the_hessian_is_diagonal():
    x = torch.diag(torch.logspace(-1, 1, 12))
    at = linearised(Model(lambda p, x: x @ p["w"].unsqueeze(-1), {"w": (12,)}, x, torch.ones(12, 1), penalty=1e-4))
    built = Jacobi(num_probes=2).build(at, None)
    torch.testing.assert_close(
        as_matrix(built.operator), torch.linalg.inv(as_matrix(at.operator)), rtol=1e-9, atol=1e-9
    )
    other = linearised(
        at.problem.problem, at.params.detach(), {name: 100 * value for name, value in at.hparams.items()}
    )
    again = Jacobi(num_probes=2).restore(other, built.state)
    torch.testing.assert_close(as_matrix(again), torch.linalg.inv(as_matrix(other.operator)), rtol=1e-9, atol=1e-9)


def test_jacobi_takes_the_size_of_negative_entries_and_a_floor_for_zeros():
    at = linearised(InOnePiece([1.0, -2.0, 0.0]))
    assert Jacobi().build(at, None).operator.diagonal.tolist() == pytest.approx([1.0, 0.5, 1000.0])


def test_jacobi_tends_to_the_diagonal_and_its_noise_is_a_floor():
    at = linearised(linear_model(penalty=0.01))
    exact = as_matrix(at.operator).diagonal()
    many = Jacobi(num_probes=4000).build(at, None)
    torch.testing.assert_close(1 / many.operator.diagonal, exact, rtol=0.2, atol=0.02)
    few = Jacobi(num_probes=3).build(at, None)
    assert bool((1 / few.operator.diagonal >= few.state["error"] - 1e-12).all())
    assert bool((1 / few.operator.diagonal >= 0.01 - 1e-12).all())


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_adams_second_moment_is_what_adam_divides_by(optimizer):
    problem = linear_model()
    inner = solved(problem, TorchOptimizer(max_steps=7, optimizer=partial(optimizer, lr=0.1, betas=(0.9, 0.95))))
    at = linearised(problem)
    moment = inner.state["optimizer"]["state"][0]["exp_avg_sq"] / (1 - 0.95**7)
    diagonal = AdamSecondMoment().build(at, inner).operator.diagonal
    torch.testing.assert_close(1 / diagonal, moment.sqrt() + 1e-8)
    same = Adam(
        max_steps=7, learning_rate=0.1, beta2=0.95, weight_decay=0.01 if optimizer is torch.optim.AdamW else 0.0
    )
    own = AdamSecondMoment().build(at, solved(problem, same)).operator.diagonal
    torch.testing.assert_close(own / own.norm(), diagonal / diagonal.norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("solver", [DenseCholesky(), DenseLU(), AutoSolver()], ids=lambda one: type(one).__name__)
def test_direct_solvers_build_no_preconditioner(solver):
    problem = two_layers(penalty=0.3)
    hparams = natural_hparams(problem)
    flat = FlatProblem.of(problem, hparams)
    method = Implicit(linear_solver=solver, preconditioner=KFAC(), error_estimate=None)
    receipt = method.compute(
        flat, LBFGS(max_steps=500), flat.start(hparams), hparams, StepBatches(problem, 0), {}
    ).receipt
    assert receipt.setup_mv == 0 and receipt.num_mv == flat.start(hparams).numel()
    iterative = replace(method, linear_solver=AutoSolver(dense_size=0))
    receipt = iterative.compute(
        flat, LBFGS(max_steps=500), flat.start(hparams), hparams, StepBatches(problem, 0), {}
    ).receipt
    assert receipt.setup_mv > 0


# ---------------------------------------------------------------------------------------------------------------------
# Curvature pairs.


def bfgs_by_definition(initial, steps, changes):
    matrix = initial
    for s, y in zip(steps, changes, strict=True):
        rho = 1 / (s @ y)
        left = torch.eye(len(s)) - rho * torch.outer(s, y)
        matrix = left @ matrix @ left.T + rho * torch.outer(s, s)
    return matrix


def two_loop(vector, steps, changes, initial):
    """Nocedal's recursion, what L-BFGS is usually computed by."""
    weights = []
    for s, y in reversed(list(zip(steps, changes, strict=True))):
        weights.append((s @ vector) / (s @ y))
        vector = vector - weights[-1] * y
    vector = initial @ vector
    for s, y in zip(steps, changes, strict=True):
        vector = vector + (weights.pop() - (y @ vector) / (s @ y)) * s
    return vector


@pytest.mark.parametrize("base", [None, "dense"])
def test_pairs_follow_the_recursion_and_bad_ones_are_left_out(base):
    hessian = normal(9, 9, seed=40) @ normal(9, 9, seed=40).T + 0.1 * torch.eye(9)
    steps = normal(5, 9, seed=41)
    changes = steps @ hessian
    bad_steps, bad = steps.clone(), changes.clone()
    bad[2] = -bad[2]
    kept = [0, 1, 3, 4]
    first = (
        torch.diag(torch.linspace(1, 3, 9))
        if base
        else (steps[4] @ changes[4]) / (changes[4] @ changes[4]) * torch.eye(9)
    )
    initial = MatrixOperator(first, POSITIVE_DEFINITE) if base else None
    for like in (IdentityOperator(9), Counted(IdentityOperator(9))):
        operator = InverseBFGS(like, Pairs.of(like, bad_steps, bad), initial)
        torch.testing.assert_close(
            as_matrix(operator), bfgs_by_definition(first, steps[kept], changes[kept]), rtol=1e-7, atol=1e-9
        )
        torch.testing.assert_close(operator.mv(changes[4]), steps[4], rtol=1e-8, atol=1e-9)  # the secant equation
    vector = normal(9, seed=42)
    recursion = two_loop(vector, steps[kept], changes[kept], first)
    torch.testing.assert_close(operator.mv(vector), recursion, rtol=1e-7, atol=1e-9)


def test_a_batch_keeps_its_own_pairs_and_no_pair_is_the_identity():
    steps = normal(4, 3, 9, seed=43)
    changes = steps * torch.linspace(1, 5, 9)
    changes[1, 2] = -changes[1, 2]
    many, one = IdentityOperator(9, (3,)), IdentityOperator(9)
    together = as_matrix(InverseBFGS(many, Pairs.of(many, steps, changes)))
    for task in range(3):
        alone = as_matrix(InverseBFGS(one, Pairs.of(one, steps[:, task], changes[:, task])))
        torch.testing.assert_close(together[task], alone, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(as_matrix(InverseBFGS(one, Pairs.none(steps[0, 0]))), torch.eye(9))
    scale = torch.tensor([2.0, 3.0, 4.0])
    changes[:, 1] = -changes[:, 1]  # no good pair is left in the second system
    scaled = as_matrix(InverseBFGS(many, Pairs.of(many, steps, changes), scale=scale))
    torch.testing.assert_close(scaled[1], 3.0 * torch.eye(9))
    torch.testing.assert_close(scaled[0], together[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(9,), (2, 9)], ids=str)
def test_inner_products_of_pairs_are_kept_up_to_date(shape):
    like, pairs = IdentityOperator(9, shape[:-1]), Pairs.none(torch.zeros(shape))
    steps, changes = normal(7, *shape, seed=44), normal(7, *shape, seed=45)
    for count, (step, change) in enumerate(zip(steps, changes, strict=True), start=1):
        pairs = pairs.append(step, change, 4)
        expected = Pairs.of(like, steps[max(count - 4, 0) : count], changes[max(count - 4, 0) : count])
        for one, other in zip(
            pairs._replace(products=pairs.products.triu())[:4],
            expected._replace(products=expected.products.triu())[:4],
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def test_one_pair_may_be_all_that_is_kept():
    pairs = (
        Pairs.none(torch.zeros(3)).append(torch.ones(3), torch.ones(3), 1).append(torch.ones(3), 2 * torch.ones(3), 1)
    )
    assert pairs.products.tolist() == [[6.0]] and pairs.lengths.tolist() == [12.0] and len(pairs.steps) == 1


def test_pairs_of_a_long_history_and_a_base_save_products():
    problem = two_layers(penalty=1e-3)
    inner = solved(problem, LBFGS(max_steps=400, history=100, atol=1e-7))
    at = linearised(problem, inner.params)
    solver, vector = ConjugateGradient(rtol=1e-8, max_steps=5000), normal(at.params.shape[-1], seed=44)
    counts = {}
    for name, preconditioner in (("kfac", KFAC()), ("pairs", LBFGSPairs()), ("both", LBFGSPairs(KFAC()))):
        built = preconditioner.build(at, inner)
        solution = solver.compute(solver.init(at.operator), vector, preconditioner=built.operator)
        assert solution.successful
        counts[name] = int(solution.num_mv) + built.num_mv
    plain = int(solver.compute(solver.init(at.operator), vector).num_mv)
    assert counts["both"] < plain and counts["pairs"] < plain


# ---------------------------------------------------------------------------------------------------------------------
# The penalty, the block operator, and mistakes.


def test_a_penalty_that_is_not_diagonal_is_estimated_and_stays_positive():
    class Coupled(Model):
        def penalty(self, params, hparams):
            return super().penalty(params, hparams) + 0.1 * params["w"].sum() ** 2

    at = linearised(Coupled(lambda p, x: F.linear(x, p["w"], p["b"]), {"w": (3, 4), "b": (3,)}, X, Y))
    for preconditioner in (KFAC(), EKFAC(), Nystrom(rank=5), Jacobi()):
        assert_positive_definite(preconditioner.build(at, None).operator)


def test_the_diagonal_of_a_penalty_is_exact_where_it_is_diagonal_and_a_mean_of_ten_probes_elsewhere():
    class Coupled(Model):
        def penalty(self, params, hparams):
            return super().penalty(params, hparams) + 0.1 * params["w"].sum() ** 2

    shapes, uneven = {"w": (3, 4)}, {"w": torch.logspace(-6, 3, 12).reshape(3, 4)}
    at = linearised(Model(lambda p, x: F.linear(x, p["w"]), shapes, X, Y, penalty=uneven))
    torch.testing.assert_close(penalty_diagonal(at), uneven["w"].flatten(), rtol=1e-12, atol=0.0)
    coupled = linearised(Coupled(lambda p, x: F.linear(x, p["w"]), shapes, X, Y, penalty=0.1))
    error = penalty_diagonal(coupled) - 0.3
    assert 0 < float(error.square().mean().sqrt()) < 0.35  # of one probe: 0.2 √11 = 0.66, of ten a third of that
    assert penalty_diagonal(linearised(InOnePiece())) is None


@pytest.mark.parametrize("indices", [
    [[[4, 0], [2, 5]]],
    [[[4, 0], [2, 5]], [[7, 6], [8, 10]]],  # two of one shape
    [[[4, 0], [2, 5]], [[9, 6, 7]], [[12, 10], [11, 8]], [[13], [14]]],  # and others between and after them
], ids=["one", "two of one shape", "three shapes"])  # fmt: skip
def test_blocks_and_diagonal_act_on_their_own_entries(indices):
    n, blocks = 15, []
    for seed, index in enumerate(map(torch.tensor, indices)):
        p, q = index.shape
        left, right = normal(2, p, p, seed=3 * seed), normal(2, q, q, seed=3 * seed + 1)
        blocks.append(KroneckerBlock(index, left, right, 1 + normal(2, p, q, seed=3 * seed + 2).square()))
    operator = BlockKroneckerInverse(IdentityOperator(n, (2,)), blocks, 2 + torch.zeros(2, n))
    expected = 0.5 * torch.eye(n, dtype=torch.float64).repeat(2, 1, 1)
    for block in blocks:
        where = block.index.flatten()
        for task in range(2):
            basis = torch.kron(block.left[task], block.right[task])
            expected[task][where.unsqueeze(1), where] = basis @ torch.diag(1 / block.values[task].flatten()) @ basis.T
    torch.testing.assert_close(as_matrix(operator), expected)
    kept = {tuple(block.index.flatten().tolist()): block for block in operator.blocks}
    for block in blocks:
        same = kept.pop(tuple(block.index.flatten().tolist()))
        assert all(torch.equal(getattr(same, name), getattr(block, name)) for name in ("left", "right", "values"))
    assert not kept


class InOnePiece(Problem):
    """An inner loss of which no parts are known, with these curvatures."""

    def __init__(self, curvatures=(1.0, 2.0, 3.0)):
        self.curvatures = torch.tensor(curvatures, dtype=torch.float64)

    def init_hparams(self):
        return {"a": torch.tensor(1.0)}

    def init_params(self, hparams):
        return {"x": torch.ones(3)}

    def inner_loss(self, params, hparams, batch):
        return 0.5 * hparams["a"] * (params["x"].square() * self.curvatures).sum()

    def outer_loss(self, params, hparams, batch):
        return params["x"].sum()


@pytest.mark.parametrize("preconditioner", [Jacobi(), Nystrom(rank=3)], ids=str)
def test_an_inner_loss_in_one_piece_is_enough_for_products(preconditioner):
    at = linearised(InOnePiece())
    matrix = as_matrix(preconditioner.build(at, None).operator)
    torch.testing.assert_close(matrix, torch.diag(1 / torch.tensor([1.0, 2.0, 3.0])), rtol=1e-6, atol=1e-6)


MISTAKES = [
    (lambda: KFAC(num_samples=0), "num_samples >= 1"),
    (lambda: EKFAC(damping=-1.0), "EKFAC needs damping >= 0"),
    (lambda: Nystrom(rank=0), "rank >= 1"),
    (lambda: Nystrom(max_rank=0), "max_rank >= 1"),
    (lambda: Jacobi(num_probes=1), "num_probes >= 2"),
    (lambda: KFAC().build(linearised(InOnePiece()), None), "made of outputs and output_loss"),
    (
        lambda: KFAC().build(
            linearised(Model(lambda p, x: p["w"].sum(), {"w": (2,)}, X, Y, loss=lambda o, t: o.square().reshape(1))),
            None,
        ),
        "they are a scalar",
    ),
    (lambda: LBFGSPairs().build(linearised(linear_model()), None), "there was no inner solve"),
    (
        lambda: LBFGSPairs().build(linearised(linear_model()), solved(linear_model(), TorchOptimizer(max_steps=1))),
        "holds none.*solver=lbfgs",
    ),
    (
        lambda: AdamSecondMoment().build(linearised(linear_model()), solved(linear_model(), LBFGS(max_steps=1))),
        "inner solve by Adam, but the inner solver's state holds none: use solver=adam",
    ),
    (
        lambda: AdamSecondMoment().build(
            linearised(linear_model()),
            solved(linear_model(), TorchOptimizer(max_steps=2, optimizer=partial(torch.optim.SGD, lr=0.1))),
        ),
        "holds none",
    ),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_told(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_the_hessian_of_a_captured_model_is_not_changed_by_the_capture():
    """Nothing of the capture stays behind: products before and after building agree to the last bit."""
    at = linearised(two_layers())
    vector = normal(at.params.shape[-1])
    before = at.operator.mv(vector)
    KFAC().build(at, None)
    assert torch.equal(before, at.operator.mv(vector)) and isinstance(at.operator, HessianOperator)


# --- lists of pairs that grow -------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(0, 3), min_size=1, max_size=40), st.sampled_from([(), (2,)]))
def test_pairs_that_grow_are_values(size, branches, batch):
    """From any earlier list one may go on, as often as one likes: each is what it would be if all were copies."""
    draw = torch.Generator().manual_seed(len(branches))
    rows = torch.randn(len(branches), 2, *batch, 3, generator=draw, dtype=torch.float64)
    lists, expected = [Pairs.none(rows[0, 0])], [[]]
    for (step, change), back in zip(rows, branches, strict=True):
        place = max(len(lists) - 1 - back, 0)
        lists.append(lists[place].append(step, change, size))
        expected.append([*expected[place], (step, change)][-size:])
    like = IdentityOperator(3, batch, dtype=torch.float64)
    for found, pairs in zip(lists[1:], expected[1:], strict=True):
        steps, changes = (torch.stack(column) for column in zip(*pairs, strict=True))
        assert torch.equal(found.steps, steps) and torch.equal(found.changes, changes)
        whole = Pairs.of(like, steps, changes)
        torch.testing.assert_close(found.products.triu(), whole.products.triu())
        torch.testing.assert_close(found.lengths, whole.lengths)
