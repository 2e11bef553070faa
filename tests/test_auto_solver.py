"""The solver that chooses: which way it takes, that every way solves, and what it says and counts."""

import pytest
import torch

from bilevel.errors import UsageError
from bilevel.linalg import (
    MINRES,
    NO_TAGS,
    POSITIVE_DEFINITE,
    SYMMETRIC,
    AutoSolver,
    ConjugateGradient,
    DiagonalOperator,
    DiagonalSolver,
    HessianOperator,
    IdentityOperator,
    IdentitySolver,
    LinearOperator,
    MatrixOperator,
    damped,
    linear_solve,
)
from bilevel.result import Result

N = 40


pytestmark = pytest.mark.usefixtures("float64")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(eigenvalues, seed=0):
    q = torch.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed))[0]
    matrix = q @ torch.diag(eigenvalues.double()) @ q.T
    return (matrix + matrix.T) / 2


DEFINITE = with_spectrum(torch.linspace(1, 30, N))
INDEFINITE = with_spectrum(torch.cat([torch.linspace(-9, -2, 5), torch.linspace(1, 30, N - 5)]), 1)
UNSYMMETRIC = DEFINITE + 3.0 * normal(N, N, seed=2).triu(1)
SINGULAR = with_spectrum(torch.cat([torch.zeros(1), torch.linspace(1, 30, N - 1)]), 3)


class Counted(LinearOperator):
    """A matrix known by its products alone, which are counted, one for each vector."""

    def __init__(self, matrix, tags):
        self.matrix, self.tags, self.products = matrix, tags, 0
        self.shape, self.batch_shape = tuple(matrix.shape[-2:]), tuple(matrix.shape[:-2])
        self.dtype, self.device = matrix.dtype, matrix.device

    def mv(self, vector):
        self.products += vector.shape[: vector.ndim - 1 - len(self.batch_shape)].numel()
        return (self.matrix @ vector.unsqueeze(-1)).squeeze(-1)

    def transpose(self):
        return self if self.tags else Counted(self.matrix.mT, self.tags)


WAYS = [
    # operator, tags, dense_size, way
    ("definite", DEFINITE, POSITIVE_DEFINITE, N, "DenseCholesky"),
    ("definite", DEFINITE, SYMMETRIC, N, "DenseCholesky"),
    ("indefinite", INDEFINITE, SYMMETRIC, N, "DenseCholesky, DenseLU"),
    ("unsymmetric", UNSYMMETRIC, NO_TAGS, N, "DenseLU"),
    ("definite", DEFINITE, SYMMETRIC, N - 1, "ConjugateGradient"),
    ("indefinite", INDEFINITE, SYMMETRIC, N - 1, "ConjugateGradient, MINRES"),
    ("unsymmetric", UNSYMMETRIC, NO_TAGS, N - 1, "GMRES"),
]


@pytest.mark.parametrize(
    ("matrix", "tags", "dense_size", "way"), [row[1:] for row in WAYS], ids=[f"{row[0]}-{row[4]}" for row in WAYS]
)
def test_every_way_is_taken_where_it_should_be_and_solves_and_counts(matrix, tags, dense_size, way):
    operator, vector = Counted(matrix, tags), normal(N, seed=5)
    solver = AutoSolver(rtol=1e-11, dense_size=dense_size)
    solution = solver.compute(solver.init(operator), vector)
    assert solution.method == way and solution.results == [Result.converged]
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, vector), rtol=1e-8, atol=1e-8)
    assert int(solution.num_mv) == operator.products
    torch.testing.assert_close(solution.residual_norm, (vector - matrix @ solution.value).norm(), rtol=1e-2, atol=1e-10)


@pytest.mark.parametrize(
    ("matrix", "tags", "dense_size", "way"), [row[1:] for row in WAYS], ids=[f"{row[0]}-{row[4]}" for row in WAYS]
)
def test_the_transposed_system_is_solved_the_same_way(matrix, tags, dense_size, way):
    solver, vector = AutoSolver(rtol=1e-11, dense_size=dense_size), normal(N, seed=6)
    solution = solver.compute(solver.transpose(solver.init(Counted(matrix, tags))), vector)
    assert solution.method == way
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix.mT, vector), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dense_size", [N, 1], ids=["dense", "iterative"])
def test_only_the_systems_that_failed_go_on(dense_size):
    matrices, vectors = torch.stack([DEFINITE, INDEFINITE, DEFINITE]), normal(3, N, seed=7)
    solver = AutoSolver(rtol=1e-11, dense_size=dense_size)
    solution = solver.compute(solver.init(Counted(matrices, SYMMETRIC)), vectors)
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrices, vectors), rtol=1e-8, atol=1e-8)
    assert solution.results == [Result.converged] * 3
    if dense_size == 1:
        alone = linear_solve(Counted(DEFINITE, SYMMETRIC), vectors[0], ConjugateGradient(rtol=1e-11))
        assert int(solution.num_mv[0]) == int(alone.num_mv) < int(solution.num_mv[1])
        assert float(solution.curvature_min[1]) < 0 < float(solution.curvature_min[0])  # what CG met is still told


def test_minres_goes_on_from_the_iterate_of_cg():
    """A right-hand side that CG all but solves before it meets the negative direction leaves MINRES little to do."""
    diagonal = torch.cat([torch.linspace(1, 100, N - 1), torch.tensor([-1.0])])
    operator, vector = Counted(torch.diag(diagonal), SYMMETRIC), torch.cat([torch.ones(N - 1), torch.tensor([1e-9])])
    solver = AutoSolver(rtol=1e-12, dense_size=1)
    solution = solver.compute(solver.init(operator), vector)
    assert solution.method == "ConjugateGradient, MINRES" and solution.results == [Result.converged]
    torch.testing.assert_close(solution.value, vector / diagonal, rtol=1e-6, atol=1e-10)
    first = linear_solve(operator, vector, ConjugateGradient(rtol=1e-12), throw=False)
    from_zero = linear_solve(operator, vector, MINRES(rtol=1e-12))
    assert int(solution.num_mv) - int(first.num_mv) < 0.7 * int(from_zero.num_mv)


DIAGONALS = [
    DiagonalOperator(torch.tensor([2.0, -4.0, 0.5], dtype=torch.float64)),
    IdentityOperator(3, dtype=torch.float64),
    DiagonalOperator(torch.tensor([[2.0, -4.0, 0.5], [1.0, 1e-30, 1e30]], dtype=torch.float64)),
]


@pytest.mark.parametrize("operator", DIAGONALS, ids=["diagonal", "identity", "batch"])
def test_diagonal_operators_are_divided_by(operator):
    vector = normal(*operator.batch_shape, 3)
    solver = AutoSolver()
    solution = solver.compute(solver.init(operator), vector)
    assert solution.method == "DiagonalSolver" and solution.successful
    torch.testing.assert_close(operator.mv(solution.value), vector)
    assert int(solution.num_mv.max()) == (1 if isinstance(operator, IdentityOperator) else 0)


def test_a_sum_of_diagonal_operators_costs_one_product():
    operator = damped(DiagonalOperator(torch.tensor([1.0, 3.0])), 1.0)
    assert linear_solve(operator, torch.tensor([2.0, 8.0]), AutoSolver()).value.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("vector", "result", "value"),
    [
        ([1.0, 1.0], Result.singular, [0.0, 0.0]),
        ([1.0, 0.0], Result.converged, [0.5, 0.0]),
        ([float("nan"), 0.0], Result.nonfinite, None),
    ],
)  # fmt: skip
def test_a_zero_on_the_diagonal_is_singular_unless_nothing_is_asked_of_it(vector, result, value):
    solver = DiagonalSolver()
    solution = solver.compute(solver.init(DiagonalOperator(torch.tensor([2.0, 0.0]))), torch.tensor(vector))
    assert solution.results == [result]
    assert value is None or solution.value.tolist() == value


@pytest.mark.parametrize("dense_size", [N, 1], ids=["dense", "iterative"])
def test_a_singular_system_is_called_so(dense_size):
    solver = AutoSolver(dense_size=dense_size)
    solution = solver.compute(solver.init(Counted(SINGULAR, SYMMETRIC)), normal(N, seed=8))
    assert not solution.successful and solution.worst in (Result.singular, Result.negative_curvature, Result.max_steps)


def test_a_given_matrix_is_factorised_whatever_its_size_and_costs_no_product():
    solution = linear_solve(MatrixOperator(DEFINITE, SYMMETRIC), normal(N), AutoSolver(dense_size=0))
    assert solution.method == "DenseCholesky" and int(solution.num_mv) == 0


def test_a_preconditioner_start_and_tolerance_reach_both_iterative_solvers():
    """With the exact inverse of |A| conjugate gradient and MINRES need as many steps as there are signs, two."""
    values, vectors = torch.linalg.eigh(INDEFINITE)
    inverse = MatrixOperator(vectors @ torch.diag(1 / values.abs()) @ vectors.T, POSITIVE_DEFINITE)
    solver, vector = AutoSolver(dense_size=1), normal(N, seed=9)
    state = solver.init(Counted(INDEFINITE, SYMMETRIC))
    solution = solver.compute(state, vector, rtol=1e-10, preconditioner=inverse)
    assert solution.results == [Result.converged] and int(solution.num_mv) <= 8
    assert float(solution.residual_norm / vector.norm()) <= 1e-10
    again = solver.compute(state, vector, x0=solution.value, rtol=1e-9)
    assert int(again.num_mv) == 1 and again.method == "ConjugateGradient"


def test_many_right_hand_sides_share_one_operator():
    vectors = normal(4, N, seed=10)
    for dense_size in (N, 1):
        solution = linear_solve(Counted(INDEFINITE, SYMMETRIC), vectors, AutoSolver(rtol=1e-11, dense_size=dense_size))
        torch.testing.assert_close(solution.value, torch.linalg.solve(INDEFINITE, vectors.mT).mT, rtol=1e-7, atol=1e-8)


def test_a_hessian_at_a_saddle_is_solved():
    """Against the dense Hessian of a quartic with both signs, on either side of the threshold."""
    weights = torch.linspace(-1.0, 2.0, N)
    point = 1.0 + 0.1 * normal(N, seed=11)
    hessian = HessianOperator(lambda x: (weights * x**4).sum() / 12 + 0.1 * x.sum() ** 2, point)
    exact = torch.diag(weights * point**2) + 0.2
    for dense_size in (N, 1):
        solution = linear_solve(hessian, torch.ones(N), AutoSolver(rtol=1e-12, dense_size=dense_size), throw=False)
        torch.testing.assert_close(solution.value, torch.linalg.solve(exact, torch.ones(N)), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoSolver(rtol=None), "needs a tolerance rtol"),
        (lambda: AutoSolver(rtol=1.5), "rtol in"),
        (lambda: AutoSolver(dense_size=-1), "dense_size >= 0"),
        (lambda: AutoSolver(max_steps=0), "max_steps >= 1"),
        (lambda: AutoSolver().init(MatrixOperator(torch.ones(2, 3))), "square operator"),
        (lambda: DiagonalSolver().init(MatrixOperator(torch.eye(2))), "operator that is diagonal"),
        (lambda: linear_solve(IdentityOperator(2), torch.ones(3), AutoSolver()), "right-hand side was expected"),
    ],
)  # fmt: skip
def test_mistakes_are_told(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_the_identity_solver_applies_the_preconditioner():
    inverse, vector = MatrixOperator(torch.linalg.inv(DEFINITE), POSITIVE_DEFINITE), normal(2, N, seed=12)
    solver = IdentitySolver(scale=0.5)
    solution = solver.compute(solver.init(Counted(DEFINITE, SYMMETRIC)), vector, preconditioner=inverse)
    torch.testing.assert_close(solution.value, 0.5 * torch.linalg.solve(DEFINITE, vector.mT).mT)
    assert solution.num_mv.tolist() == [0, 0] and solution.results == [Result.budget_spent] * 2
    plain = solver.compute(solver.init(Counted(DEFINITE, SYMMETRIC)), vector)
    torch.testing.assert_close(plain.value, 0.5 * vector)
