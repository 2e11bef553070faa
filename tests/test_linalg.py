"""Linear solvers against dense solves: a table of fixed outcomes, the theory's own predictions, and honest failures."""

import math
import threading
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.errors import UsageError
from bilevel.linalg import (
    GMRES,
    LSMR,
    MINRES,
    NO_TAGS,
    POSITIVE_DEFINITE,
    SYMMETRIC,
    BiCGStab,
    ConjugateGradient,
    DenseCholesky,
    DenseLU,
    DiagonalOperator,
    IdentitySolver,
    LinearOperator,
    MatrixOperator,
    NeumannSeries,
    linear_solve,
)
from bilevel.linalg.system import System, rounding_level
from bilevel.result import Result, SolveError

N = 200


pytestmark = pytest.mark.usefixtures("float64")


def name_of(value):
    return type(value).__name__


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def orthogonal(n, seed=0):
    return torch.linalg.qr(normal(n, n, seed=seed))[0]


def with_spectrum(eigenvalues, seed=0):
    """A dense symmetric matrix with these eigenvalues."""
    q = orthogonal(len(eigenvalues), seed)
    matrix = q @ torch.diag(eigenvalues.double()) @ q.T
    return (matrix + matrix.T) / 2


def log_spaced(kappa, n=N):
    return torch.logspace(-math.log10(kappa), 0, n, dtype=torch.float64)


def operator_of(kind, kappa, n=N):
    """An operator of the table with a vector that is one of its eigenvectors."""
    eigenvalues = log_spaced(kappa, n)
    if kind == "unsymmetric":  # diagonalisable with real positive eigenvalues, eigenvectors of condition 3
        basis = orthogonal(n, 1) @ torch.diag(torch.logspace(0, math.log10(3), n)) @ orthogonal(n, 2)
        matrix = basis @ torch.diag(eigenvalues) @ torch.linalg.inv(basis)
        return MatrixOperator(matrix), basis[:, n // 2] / basis[:, n // 2].norm()
    if kind == "indefinite":
        eigenvalues = eigenvalues * torch.tensor([1.0, -1.0]).repeat(n // 2)
    tags = POSITIVE_DEFINITE if kind == "definite" else SYMMETRIC
    return MatrixOperator(with_spectrum(eigenvalues, 1), tags), orthogonal(n, 1)[:, n // 2]


def residual_of(operator, solution, vector):
    return (vector - operator.mv(solution.value)).norm(dim=-1)


class CountingOperator(LinearOperator):
    """Counts the vectors that are multiplied, by the operator and by its transpose."""

    def __init__(self, operator, products=None):
        self.operator, self.products = operator, [] if products is None else products
        self.shape, self.batch_shape, self.tags = operator.shape, operator.batch_shape, operator.tags
        self.dtype, self.device = operator.dtype, operator.device

    def mv(self, vector):
        self.products.append(vector.shape[: vector.ndim - 1 - len(self.batch_shape)].numel())
        return self.operator.mv(vector)

    def transpose(self):
        return CountingOperator(self.operator.transpose(), self.products)


# ---------------------------------------------------------------------------------------------------------------------
# The table. `reached`: converged, and within the bound of a dense solve. `honest`: that, or `stagnated`. `.`: the
# solver does not apply (a tag is missing, or the condition number is beyond the method's rate). BiCGStab's stabilising
# polynomials suit spectra on one side of zero: on both sides, at a condition number of 1e4, no degree up to 8 gets
# below a residual of 1e-4 in 40,000 products, so that it is only asked to be honest there.

TABLE = """
                    DenseLU  DenseCholesky  ConjugateGradient  NeumannSeries  MINRES   GMRES    BiCGStab  LSMR
definite    1e2     reached  reached        reached            reached        reached  reached  reached   reached
definite    1e4     reached  reached        reached            .              reached  reached  reached   reached
definite    1e8     reached  reached        reached            .              honest   reached  honest    honest
indefinite  1e2     reached  .              .                  .              reached  reached  reached   reached
indefinite  1e4     reached  .              .                  .              reached  reached  honest    reached
indefinite  1e8     reached  .              .                  .              honest   reached  honest    honest
unsymmetric 1e2     reached  .              .                  reached        .        reached  reached   reached
unsymmetric 1e4     reached  .              .                  .              .        reached  reached   reached
unsymmetric 1e8     reached  .              .                  .              .        reached  honest    honest
"""
SCALES = torch.tensor([1.0, 1.0, 1e-13, 1e-200], dtype=torch.float64)


def cells():
    table = []
    header, *rows = [line.split() for line in TABLE.strip().splitlines()]
    for kind, kappa, *outcomes in rows:
        for solver, outcome in zip(header, outcomes, strict=True):
            if outcome != ".":
                table.append(pytest.param(solver, kind, float(kappa), outcome, id=f"{solver}-{kind}-{kappa}"))
    return table


def table_solver(name, kind, kappa):
    many = {"rtol": 1e-13 if kappa <= 1e4 else 0.0, "atol": 0.0, "max_steps": 60_000}
    return {
        "DenseLU": DenseLU(),
        "DenseCholesky": DenseCholesky(),
        "ConjugateGradient": ConjugateGradient(**many),
        "NeumannSeries": NeumannSeries(step_size=1.0 if kind == "unsymmetric" else None, **many),
        "MINRES": MINRES(**many),
        "GMRES": GMRES(restart=N, **many),
        "BiCGStab": BiCGStab(**many),
        "LSMR": LSMR(**{**many, "rtol": 1e-13}),
    }[name]


def test_rounding_is_that_of_sums_in_blocks():
    eps = torch.finfo(torch.float64).eps
    assert [rounding_level(n, torch.float64) / eps for n in (1, 100, 4096, 10**6)] == [8.0, 10.0, 64.0, 64.0]
    long = torch.full((2 * 10**6,), 0.1)  # a long sum of one sign
    exact = float(long[0]) * len(long)
    for found in (long.sum(), long @ torch.ones_like(long)):
        assert abs(float(found) - exact) < rounding_level(len(long), torch.float32) * exact


@pytest.mark.parametrize(("name", "kind", "kappa", "outcome"), cells())
def test_table_of_solvers_operators_and_right_hand_sides(name, kind, kappa, outcome):
    operator, eigenvector = operator_of(kind, kappa)
    solver, bound = table_solver(name, kind, kappa), 1e-9 if kappa <= 1e4 else 1e-6
    unit = torch.stack([normal(N, seed=7), eigenvector, normal(N, seed=8), normal(N, seed=9)])
    scales = SCALES.unsqueeze(-1)
    solution = solver.compute(solver.init(operator), unit * scales)
    exact = torch.linalg.solve(operator.matrix, unit.T).T
    errors = (solution.value / scales - exact).norm(dim=-1) / exact.norm(dim=-1)
    for result, error in zip(solution.results, errors.tolist(), strict=True):
        claimed = result is Result.converged
        assert error <= bound or not claimed, f"claims to have converged with error {error:.1e}"
        assert claimed or (outcome == "honest" and result is Result.stagnated), f"{result} with error {error:.1e}"
    # What it reports of the residual is true, to rounding.
    true = (unit - operator.mv(solution.value / scales)).norm(dim=-1)
    rounding = rounding_level(N, torch.float64) * (exact.norm(dim=-1) + unit.norm(dim=-1))
    assert ((solution.residual_norm / scales.squeeze(-1) - true).abs() <= 0.1 * true + rounding).all()


def test_the_table_sees_a_solver_that_claims_too_much(monkeypatch):
    """The check above has teeth: a tolerance loosened behind the caller's back is found."""
    for module in ("loop", "system"):
        monkeypatch.setattr(f"bilevel.linalg.{module}.rounding_level", lambda n, dtype: 1e-10)
    with pytest.raises(AssertionError, match="claims to have converged"):
        test_table_of_solvers_operators_and_right_hand_sides("GMRES", "definite", 1e8, "reached")


# ---------------------------------------------------------------------------------------------------------------------
# Every solver, small systems

TIGHT = {"rtol": 1e-13, "max_steps": 5000}
ITERATIVE = [
    ConjugateGradient(**TIGHT),
    NeumannSeries(**TIGHT),
    MINRES(**TIGHT),
    GMRES(restart=40, **TIGHT),
    GMRES(restart=7, **TIGHT),
    BiCGStab(**TIGHT),
    LSMR(**TIGHT),
]
ALL = [DenseLU(), DenseCholesky(), *ITERATIVE]
KRYLOV = [solver for solver in ITERATIVE if not isinstance(solver, NeumannSeries)]
every_solver = pytest.mark.parametrize("solver", ALL, ids=name_of)
every_iterative = pytest.mark.parametrize("solver", ITERATIVE, ids=name_of)


def small(kappa=20.0, n=30, seed=0):
    return MatrixOperator(with_spectrum(torch.linspace(1, kappa, n), seed), POSITIVE_DEFINITE)


@every_iterative
def test_zero_right_hand_side_gets_exact_zero_for_no_product(solver):
    operator = CountingOperator(small())
    state = solver.init(operator)
    solution = solver.compute(state, torch.zeros(30), x0=normal(30))
    assert torch.equal(solution.value, torch.zeros(30))
    assert solution.worst is Result.converged
    assert int(solution.num_mv) == 0 == len(operator.products)
    assert float(solution.residual_norm) == 0


@pytest.mark.parametrize("solver", [DenseLU(), DenseCholesky()], ids=name_of)
def test_dense_solvers_give_exact_zero_and_pay_only_for_the_matrix(solver):
    solution = solver.compute(solver.init(small()), torch.zeros(30))
    assert torch.equal(solution.value, torch.zeros(30)) and int(solution.num_mv) == 0
    operator = CountingOperator(small())
    solution = solver.compute(solver.init(operator), normal(30))
    assert int(solution.num_mv) == 30 == sum(operator.products)


@every_solver
@pytest.mark.parametrize("n", [1, 9])
@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e5])
def test_multiple_of_the_identity_takes_a_step(solver, n, factor):
    operator, vector = MatrixOperator(factor * torch.eye(n), POSITIVE_DEFINITE), normal(n)
    solution = solver.compute(solver.init(operator), vector)
    assert solution.worst is Result.converged
    torch.testing.assert_close(solution.value, vector / factor, rtol=1e-13, atol=0)
    one_step = {"LSMR": 3, "BiCGStab": 4, "NeumannSeries": 1 + min(8, n)}.get(name_of(solver), 1)
    assert int(solution.num_mv) <= one_step + 1  # one more verifies a claim made at rounding level


def test_neumann_with_the_right_step_needs_one_term_on_a_multiple_of_the_identity():
    solver = NeumannSeries(step_size=0.25)
    solution = solver.compute(solver.init(MatrixOperator(4 * torch.eye(3), SYMMETRIC)), torch.ones(3))
    assert int(solution.num_mv) <= 2 and torch.equal(solution.value, torch.full((3,), 0.25))


@every_iterative
@pytest.mark.parametrize("start", ["none", "solution", "other"])
@pytest.mark.parametrize("options", [{"rtol": 1e-6}, {"rtol": 1e-14}, {"rtol": None, "max_steps": 4}], ids=str)
def test_every_product_is_counted(solver, start, options):
    solver = type(solver)(**{**vars(solver), **options})
    operator, vector = CountingOperator(small()), normal(30)
    x0 = {"none": None, "solution": torch.linalg.solve(operator.operator.matrix, vector), "other": normal(30, seed=3)}
    solution = solver.compute(solver.init(operator), vector, x0=x0[start])
    assert int(solution.num_mv) == sum(operator.products)


def batch_of_four():
    """Systems that converge after one, some and many steps, and one that has nothing to do."""
    matrices = [with_spectrum(torch.linspace(1, kappa, 40), seed) for seed, kappa in enumerate([1.0, 6.0, 60.0, 3.0])]
    vectors = normal(4, 40)
    vectors[3] = 0
    return torch.stack(matrices), vectors


@every_solver
def test_batch_gives_each_system_the_answer_and_the_cost_it_has_alone(solver):
    matrices, vectors = batch_of_four()
    solution = solver.compute(solver.init(MatrixOperator(matrices, POSITIVE_DEFINITE)), vectors)
    for index in range(4):
        operator = MatrixOperator(matrices[index], POSITIVE_DEFINITE)
        alone = solver.compute(solver.init(operator), vectors[index])
        assert solution.results[index] is alone.worst is Result.converged
        torch.testing.assert_close(solution.value[index], alone.value, rtol=1e-10, atol=1e-11)
        cost, cost_alone = int(solution.num_mv[index]), int(alone.num_mv)
        assert abs(cost - cost_alone) <= 2 + 0.05 * cost_alone
    if not isinstance(solver, (DenseLU, DenseCholesky)):
        assert int(solution.num_mv[0]) < int(solution.num_mv[2])


def gmres_by_hand(solver, system, memory, num_steps):
    for _ in range(num_steps):
        memory, progress = solver.step(system, memory)
    return memory, progress


def test_gmres_restarts_one_system_of_a_batch_without_disturbing_the_others():
    """In mid-cycle the columns before the restarted system's own are zero and must count for nothing."""
    matrices, vectors = batch_of_four()
    matrices, vectors, solver = matrices[1:3], vectors[1:3], GMRES(restart=30, max_steps=1000)
    system = System(MatrixOperator(matrices))
    memory, _ = gmres_by_hand(solver, system, solver.start(system, vectors), 6)
    left = vectors - system.mv(solver.correction(system, memory))
    memory = solver.restart_from(system, memory, torch.tensor([False, True]), left)
    for num_steps, more in ((1, 1), (9, 8), (20, 11)):  # within the cycle, and after it has been renewed at step 24
        memory, progress = gmres_by_hand(solver, system, memory, more)
        correction = solver.correction(system, memory)
        for index, start, steps in ((0, vectors[0], 6 + num_steps), (1, left[1], num_steps)):
            if num_steps == 20 and index == 1:  # its first cycle was cut short: it is behind, but no less right
                true = (left[1] - matrices[1] @ correction[1]).norm()
                torch.testing.assert_close(progress.estimate[1], true, rtol=1e-8, atol=1e-14)
                continue
            alone = System(MatrixOperator(matrices[index]))
            expected, _ = gmres_by_hand(solver, alone, solver.start(alone, start), steps)
            torch.testing.assert_close(correction[index], solver.correction(alone, expected), rtol=1e-10, atol=1e-12)


def test_gmres_does_not_judge_a_cycle_that_it_cut_short():
    """A cyclic shift lowers no residual before step n: a whole cycle says `stagnated`, the rest of a cycle says nothing."""
    shift = torch.roll(torch.eye(20), 1, 0).expand(2, 20, 20)
    system, solver = System(MatrixOperator(shift)), GMRES(restart=5)
    vectors = torch.eye(20)[:1].expand(2, 20)
    memory, _ = gmres_by_hand(solver, system, solver.start(system, vectors), 3)
    memory = solver.restart_from(system, memory, torch.tensor([False, True]), vectors)
    _, progress = gmres_by_hand(solver, system, memory, 2)
    assert progress.facts.status.tolist() == [Result.stagnated.code, Result.running.code]


@every_solver
def test_extra_leading_right_hand_sides_share_the_operator(solver):
    matrices, _ = batch_of_four()
    operator = MatrixOperator(matrices[1:3], POSITIVE_DEFINITE)
    vectors = normal(3, 5, 2, 40)
    solution = solver.compute(solver.init(operator), vectors)
    exact = torch.linalg.solve(operator.matrix, vectors.reshape(15, 2, 40).movedim(0, -1)).movedim(-1, 0)
    torch.testing.assert_close(solution.value, exact.reshape(3, 5, 2, 40), rtol=1e-10, atol=1e-11)
    assert solution.result.shape == solution.num_mv.shape == solution.residual_norm.shape == (3, 5, 2)


@every_solver
def test_the_transposed_state_solves_the_transposed_system(solver):
    kind = "definite" if solver.requires else "unsymmetric"
    if isinstance(solver, NeumannSeries):
        kind, solver = "unsymmetric", NeumannSeries(step_size=0.5, **TIGHT)
    if isinstance(solver, GMRES):
        solver = GMRES(restart=40, **TIGHT)
    operator, _ = operator_of(kind, 30.0, n=40)
    solution = solver.compute(solver.transpose(solver.init(operator)), normal(40))
    torch.testing.assert_close(solution.value, torch.linalg.solve(operator.matrix.T, normal(40)), rtol=1e-9, atol=1e-10)


def test_identity_solver_scales_and_claims_nothing():
    solver = IdentitySolver(scale=0.5)
    operator = CountingOperator(small())
    solution = solver.compute(solver.init(operator), torch.ones(30))
    assert torch.equal(solution.value, torch.full((30,), 0.5))
    assert solver.biased and solution.worst is Result.budget_spent
    assert bool(solution.residual_norm.isnan()) and not operator.products


# ---------------------------------------------------------------------------------------------------------------------
# What the theory predicts


@pytest.mark.parametrize("k", range(1, 11))
def test_conjugate_gradient_is_exact_after_as_many_steps_as_distinct_eigenvalues(k):
    values = torch.linspace(1, 20, k)
    operator = MatrixOperator(with_spectrum(values.repeat(N // k + 1)[:N]), POSITIVE_DEFINITE)
    vector = normal(N)
    exact = torch.linalg.solve(operator.matrix, vector)
    solver = ConjugateGradient(rtol=None, max_steps=k)
    solution = solver.compute(solver.init(operator), vector)
    assert float((solution.value - exact).norm() / exact.norm()) <= 1e-11
    assert int(solution.num_mv) == k and solution.worst is Result.budget_spent
    if k > 1:  # and no sooner
        solver = ConjugateGradient(rtol=None, max_steps=k - 1)
        early = solver.compute(solver.init(operator), vector)
        assert float((early.value - exact).norm() / exact.norm()) >= 1e-6


@pytest.mark.parametrize("kappa", [4.0, 100.0])
def test_conjugate_gradient_obeys_its_bound_in_the_energy_norm(kappa):
    operator, _ = operator_of("definite", kappa)
    vector = normal(N)
    exact = torch.linalg.solve(operator.matrix, vector)

    def energy(x):
        return math.sqrt(float(x @ operator.mv(x)))

    rate = (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)
    for steps in range(1, 50, 4):
        solver = ConjugateGradient(rtol=None, max_steps=steps)
        solution = solver.compute(solver.init(operator), vector)
        assert energy(solution.value - exact) <= 2 * rate**steps * energy(exact) + 1e-13 * energy(exact)


@pytest.mark.parametrize("num_terms", [1, 2, 7, 30])
@pytest.mark.parametrize("kind", ["definite", "unsymmetric"])
def test_neumann_follows_its_formula(num_terms, kind):
    operator, _ = operator_of(kind, 50.0, n=40)
    step, vector = 0.7, normal(40)
    solver = NeumannSeries(step_size=step, rtol=None, max_steps=num_terms)
    solution = solver.compute(solver.init(operator), vector)
    exact = torch.linalg.solve(operator.matrix, vector)
    power = torch.linalg.matrix_power(torch.eye(40) - step * operator.matrix, num_terms)
    torch.testing.assert_close(solution.value, exact - power @ exact, rtol=1e-11, atol=1e-11)
    assert int(solution.num_mv) == num_terms and solution.worst is Result.budget_spent


def test_neumann_converges_at_the_rate_of_its_estimated_step():
    operator, vector = small(kappa=10.0), normal(30)
    solver = NeumannSeries(rtol=1e-8, max_steps=1000)
    step_size = float(solver.start(System(operator), vector).step_size)
    largest = float(torch.linalg.eigvalsh(operator.matrix)[-1])
    assert 1.0 <= step_size * largest <= 1.1  # a Ritz value lies below, so the step just above 1 / lambda_max
    solution = solver.compute(solver.init(operator), vector)
    terms = math.log(1e-8) / math.log(1 - step_size)  # the smallest eigenvalue is 1
    assert solution.worst is Result.converged and int(solution.num_mv) <= terms + 8 + 1


@pytest.mark.parametrize(
    ("tags", "factor"), [(SYMMETRIC, 3.0), (SYMMETRIC, 5.0), (SYMMETRIC, 100.0), (NO_TAGS, 5.0), (NO_TAGS, 100.0)]
)
def test_neumann_catches_divergence_within_five_terms(tags, factor):
    operator = MatrixOperator(with_spectrum(torch.linspace(1, 10, N)), tags)
    solver = NeumannSeries(step_size=factor / 10.0, max_steps=1000)
    solution = solver.compute(solver.init(operator), normal(20, N))
    assert set(solution.results) == {Result.diverged}
    assert int(solution.num_mv.max()) <= 5 + 1  # one more for the residual that is reported
    assert bool((solution.residual_norm <= 1.0001 * normal(20, N).norm(dim=-1)).all())  # the best iterate, not the last


def test_an_indefinite_operator_is_reported_by_conjugate_gradient_and_solved_by_minres():
    operator, _ = operator_of("indefinite", 100.0)
    vectors = normal(5, N)
    solver = ConjugateGradient(max_steps=5000)
    solution = solver.compute(solver.init(operator), vectors)
    assert set(solution.results) == {Result.negative_curvature}
    assert bool((solution.curvature_min <= 0).all())
    solver = MINRES(**TIGHT)
    solution = solver.compute(solver.init(operator), vectors)
    exact = torch.linalg.solve(operator.matrix, vectors.T).T
    assert set(solution.results) == {Result.converged}
    assert float((solution.value - exact).norm() / exact.norm()) <= 1e-10
    assert bool((solution.curvature_min < 0).all()) and bool((solution.curvature_max > 0).all())


@pytest.mark.parametrize("budget", [{}, {"rtol": None, "max_steps": 3}, {"rtol": None, "max_steps": 50}], ids=str)
def test_cg_returns_what_it_found_before_it_met_negative_curvature(budget):
    """The iterate, which lowers the quadratic, even where its residual is larger than that of the start."""
    eigenvalues = torch.tensor([1.0, 100.0, -0.01])
    vector = torch.tensor([1.0, 0.1, 1.0])
    solver = ConjugateGradient(**{**TIGHT, **budget})
    solution = solver.compute(solver.init(MatrixOperator(torch.diag(eigenvalues), SYMMETRIC)), vector)
    assert solution.worst is Result.negative_curvature
    steps = [ConjugateGradient(rtol=None, max_steps=k) for k in (1, 2)]
    iterates = [s.compute(s.init(MatrixOperator(torch.diag(eigenvalues), SYMMETRIC)), vector).value for s in steps]
    assert torch.equal(solution.value, iterates[1])
    energy = 0.5 * (eigenvalues * solution.value.square()).sum() - vector @ solution.value
    assert float(energy) < -0.4 and float(solution.residual_norm) > float(vector.norm())


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_bicgstab_of_every_degree_solves_what_its_stabiliser_can(degree):
    solver = BiCGStab(rtol=1e-11, max_steps=2000, degree=degree)
    operator, _ = operator_of("unsymmetric", 30.0, n=60)
    vector = normal(60)
    solution = solver.compute(
        solver.init(operator), vector, preconditioner=DiagonalOperator(torch.linspace(0.5, 2, 60))
    )
    assert solution.worst is Result.converged
    torch.testing.assert_close(solution.value, torch.linalg.solve(operator.matrix, vector), rtol=1e-8, atol=1e-9)


def test_bicgstab_of_degree_one_breaks_down_on_a_rotation_and_degree_two_does_not():
    """A linear factor has a real root and a rotation's eigenvalues are imaginary (van der Vorst's known weakness)."""
    blocks = torch.block_diag(*(torch.tensor([[0.0, -w], [w, 0.0]]) for w in (1.0, 2.0, 3.0)))
    vector, outcomes = normal(6), {}
    for degree in (1, 2):
        solver = BiCGStab(rtol=1e-10, max_steps=200, degree=degree)
        solution = solver.compute(solver.init(MatrixOperator(blocks)), vector)
        outcomes[degree] = solution.worst
    assert not outcomes[1].successful and outcomes[2] is Result.converged


def test_neumann_sums_the_series_of_the_preconditioned_operator():
    matrix = torch.diag(torch.tensor([1.0, 10.0, 1000.0]))
    inverse = DiagonalOperator(1 / torch.tensor([1.1, 9.0, 1200.0]))
    solver = NeumannSeries(step_size=1.0, rtol=1e-12)
    solution = solver.compute(solver.init(MatrixOperator(matrix, SYMMETRIC)), torch.ones(3), preconditioner=inverse)
    assert solution.worst is Result.converged and int(solution.num_mv) < 40
    torch.testing.assert_close(solution.value, 1 / torch.diag(matrix), rtol=1e-11, atol=0)
    with pytest.raises(UsageError, match="estimates its step without a preconditioner only: pass step_size"):
        linear_solve(MatrixOperator(matrix, SYMMETRIC), torch.ones(3), NeumannSeries(), preconditioner=inverse)


def test_curvature_seen_lies_within_the_spectrum():
    operator = small(kappa=7.0)
    for solver in (ConjugateGradient(**TIGHT), MINRES(**TIGHT), NeumannSeries(**TIGHT)):
        solution = solver.compute(solver.init(operator), normal(30))
        assert 1 - 1e-12 <= float(solution.curvature_min) <= float(solution.curvature_max) <= 7 + 1e-12


@pytest.mark.parametrize("solver", [MINRES, partial(GMRES, restart=60)], ids=["MINRES", "GMRES"])
def test_minimal_residual_methods_never_let_it_rise(solver):
    operator, _ = operator_of("indefinite", 30.0, n=60)
    vector, norms = normal(60), []
    for steps in range(1, 60, 3):
        method = solver(rtol=None, max_steps=steps)
        norms.append(float(residual_of(operator, method.compute(method.init(operator), vector), vector)))
    assert all(after <= before * (1 + 1e-10) for before, after in pairwise(norms))


def test_lsmr_solves_least_squares_problems_and_says_so():
    tall, wide = normal(30, 8), normal(8, 30)
    for matrix, outcome in ((tall, Result.least_squares), (wide, Result.converged)):
        vector = normal(len(matrix), seed=1)
        solver = LSMR(rtol=1e-12, max_steps=500)
        solution = solver.compute(solver.init(MatrixOperator(matrix)), vector)
        assert solution.worst is outcome
        torch.testing.assert_close(solution.value, torch.linalg.pinv(matrix) @ vector, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(
            solution.residual_norm, (vector - matrix @ solution.value).norm(), atol=1e-11, rtol=1e-9
        )


def test_lsmr_gives_the_least_squares_solution_of_a_singular_square_system():
    matrix = with_spectrum(torch.cat([torch.zeros(1), torch.linspace(1, 2, 11)]))
    vector, solver = normal(12), LSMR(rtol=1e-12)
    solution = solver.compute(solver.init(MatrixOperator(matrix)), vector)
    assert solution.worst is Result.least_squares
    torch.testing.assert_close(solution.value, torch.linalg.pinv(matrix, rtol=1e-10) @ vector, rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Preconditioners, warm starts, budgets


@pytest.mark.parametrize("kind", [ConjugateGradient, MINRES, partial(GMRES, restart=80), BiCGStab], ids=str)
def test_a_diagonal_preconditioner_gives_the_same_answer_in_fewer_products(kind):
    scaling = torch.logspace(0, 2, 80)
    matrix = scaling[:, None] * with_spectrum(torch.linspace(1, 4, 80)) * scaling
    operator, vector = MatrixOperator(matrix, POSITIVE_DEFINITE), normal(80)
    preconditioner = DiagonalOperator(1 / torch.diagonal(matrix), POSITIVE_DEFINITE)
    solver = kind(rtol=1e-9, max_steps=5000)
    state = solver.init(operator)
    plain = solver.compute(state, vector)
    helped = solver.compute(state, vector, preconditioner=preconditioner)
    exact = torch.linalg.solve(matrix, vector)
    for solution in (plain, helped):
        assert solution.worst is Result.converged
        assert float(residual_of(operator, solution, vector)) <= 1e-9 * float(vector.norm()) * (1 + 1e-6)
        assert float((solution.value - exact).norm() / exact.norm()) <= 1e-5
    assert int(helped.num_mv) <= 0.6 * int(plain.num_mv)


def test_lsmr_refuses_a_preconditioner():
    with pytest.raises(UsageError, match=r"LSMR takes no preconditioner: precondition the operator itself"):
        linear_solve(small(), normal(30), LSMR(), preconditioner=DiagonalOperator(torch.ones(30)))


@every_iterative
def test_a_warm_start_at_the_solution_costs_one_product(solver):
    operator, vector = small(), normal(30)
    exact = torch.linalg.solve(operator.matrix, vector)
    state = solver.init(operator)
    solution = solver.compute(state, vector, x0=exact)
    assert int(solution.num_mv) <= 1 and solution.worst is Result.converged
    torch.testing.assert_close(solution.value, exact, rtol=1e-14, atol=1e-14)
    near, cold = solver.compute(state, vector, x0=exact + 1e-8, rtol=1e-6), solver.compute(state, vector, rtol=1e-6)
    assert int(near.num_mv) < int(cold.num_mv)


@every_iterative
def test_a_budget_is_spent_exactly_and_is_no_failure(solver):
    solver = type(solver)(**{**vars(solver), "rtol": None, "max_steps": 5})
    operator, vector = small(kappa=1e4), normal(30)
    solution = linear_solve(operator, vector, solver)
    assert solution.worst is Result.budget_spent and solution.successful
    products = {"LSMR": 1 + 5 * 2, "BiCGStab": 5 * 2 * 2, "NeumannSeries": 8 + 5}.get(name_of(solver), 5)
    assert int(solution.num_mv) == products
    torch.testing.assert_close(solution.residual_norm, residual_of(operator, solution, vector), rtol=1e-10, atol=0)


@every_iterative
def test_rtol_of_the_call_overrides_the_solver_and_atol_counts_in_units_of_the_right_hand_side(solver):
    operator, vector = small(), 100 * normal(30)
    state = solver.init(operator)
    loose, tight = solver.compute(state, vector, rtol=1e-2), solver.compute(state, vector, rtol=1e-9)
    assert float(tight.residual_norm) <= 1e-9 * float(vector.norm()) < float(loose.residual_norm)
    assert float(loose.residual_norm) <= 1e-2 * float(vector.norm())
    absolute = type(solver)(**{**vars(solver), "rtol": 0.0, "atol": 0.5})
    solution = absolute.compute(absolute.init(operator), vector)
    assert solution.worst is Result.converged and 1e-9 < float(solution.residual_norm) <= 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Failures are named, never silent


@every_iterative
def test_running_out_of_steps_raises_a_sentence_or_is_reported(solver):
    solver = type(solver)(**{**vars(solver), "max_steps": 3})
    operator, vector = small(kappa=1e4), normal(30)
    solution = linear_solve(operator, vector, solver, throw=False)
    assert solution.worst is Result.max_steps and not solution.successful
    pattern = (
        rf"^{name_of(solver)} failed after \d+ products with residual norm [\d.e+-]+: .*max_steps: allow more steps"
    )
    with pytest.raises(SolveError, match=pattern) as caught:
        linear_solve(operator, vector, solver)
    assert torch.equal(caught.value.solution.value, solution.value)


def test_the_sentence_counts_the_systems_that_failed():
    matrices, vectors = batch_of_four()
    with pytest.raises(SolveError, match="ConjugateGradient failed in 2 of 4 systems after 5 products"):
        linear_solve(MatrixOperator(matrices, SYMMETRIC), vectors, ConjugateGradient(rtol=1e-10, max_steps=5))


@every_solver
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["operator", "vector"])
def test_non_finite_numbers_are_named_and_spare_the_other_systems(solver, bad, where):
    matrices = torch.stack([with_spectrum(torch.linspace(1, 4, 12), seed) for seed in range(3)])
    vectors = normal(3, 12)
    (matrices[1, 2] if where == "operator" else vectors[1])[3] = bad
    if where == "operator":
        matrices[1, 3, 2] = bad
    solution = solver.compute(solver.init(MatrixOperator(matrices, POSITIVE_DEFINITE)), vectors)
    assert solution.results[1] is Result.nonfinite
    for index in (0, 2):
        assert solution.results[index] is Result.converged
        expected = torch.linalg.solve(matrices[index], vectors[index])
        torch.testing.assert_close(solution.value[index], expected, rtol=1e-10, atol=1e-11)


@every_iterative
@pytest.mark.parametrize("factor", [5.0, -0.01, 100.0])
def test_a_start_of_the_right_direction_and_the_wrong_length_costs_one_product(solver, factor):
    operator, vector = small(), normal(30)
    exact = torch.linalg.solve(operator.matrix, vector)
    solution = solver.compute(solver.init(operator), vector, x0=factor * exact)
    assert int(solution.num_mv) <= 1 and solution.worst is Result.converged
    torch.testing.assert_close(solution.value, exact, rtol=1e-12, atol=1e-12)


@every_iterative
def test_of_all_multiples_of_a_start_the_best_is_taken(solver):
    matrices = torch.stack([with_spectrum(torch.linspace(1, kappa, 30), 4) for kappa in (4.0, 15.0)])
    system, x0, vector = System(MatrixOperator(matrices, POSITIVE_DEFINITE)), normal(2, 30, seed=1), normal(2, 30)
    image = system.mv(x0)
    factor = 1.0 + solver.stretch(system, x0, image, vector - image)

    def size(multiple):
        residual = vector - multiple.unsqueeze(-1) * image
        if isinstance(solver, ConjugateGradient):  # its measure of the error
            return torch.linalg.vecdot(residual, torch.linalg.solve(matrices, residual))
        return residual.norm(dim=-1)

    for other in (0.0 * factor, 0.9 * factor, 1.1 * factor, torch.ones(2)):
        assert bool((size(factor) < size(other)).all())


def test_conjugate_gradient_leaves_a_start_of_negative_curvature():
    operator = MatrixOperator(torch.diag(torch.tensor([1.0, 2.0, -1.0])), SYMMETRIC)
    vector, bad = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 0.0, 1e3])
    solver = ConjugateGradient(rtol=1e-10)
    solution = solver.compute(solver.init(operator), vector, x0=bad)
    assert solution.worst is Result.converged
    torch.testing.assert_close(solution.value, torch.tensor([1.0, 1.0, 0.0]))


@every_iterative
def test_a_non_finite_starting_point_is_dropped(solver):
    x0 = torch.full((30,), torch.nan)
    solution = solver.compute(solver.init(small()), normal(30), x0=x0)
    assert solution.worst is Result.converged
    torch.testing.assert_close(solution.value, torch.linalg.solve(small().matrix, normal(30)), rtol=1e-9, atol=1e-10)


SINGULAR = {
    "zero": torch.zeros(4, 4, dtype=torch.float64),
    "diagonal": torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.float64)),
    "rank one": torch.ones(4, 4, dtype=torch.float64),
    "one zero eigenvalue": with_spectrum(torch.cat([torch.zeros(1), torch.linspace(1, 2, 11)]), 3),
    "one zero among signs": with_spectrum(torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]), 3),
}


@pytest.mark.parametrize("matrix", SINGULAR.values(), ids=SINGULAR)
@pytest.mark.parametrize("solver", [DenseLU(), GMRES(restart=12), MINRES()], ids=name_of)
def test_singular_systems_are_named(solver, matrix):
    vector = torch.arange(1.0, len(matrix) + 1)
    with pytest.raises(SolveError, match="singular to working precision"):
        linear_solve(MatrixOperator(matrix, SYMMETRIC), vector, solver)


@pytest.mark.parametrize("name", ["diagonal", "rank one"])
@pytest.mark.parametrize("solver", [GMRES(restart=12), MINRES()], ids=name_of)
def test_a_singular_system_keeps_its_least_residual(solver, name):
    matrix, vector = SINGULAR[name], torch.arange(1.0, 5)
    solution = solver.compute(solver.init(MatrixOperator(matrix, SYMMETRIC)), vector)
    least = (vector - matrix @ torch.linalg.pinv(matrix) @ vector).norm()
    torch.testing.assert_close(solution.residual_norm, least, rtol=1e-9, atol=0)
    assert float(solution.value.norm()) < 100


@pytest.mark.parametrize("matrix", SINGULAR.values(), ids=SINGULAR)
def test_cholesky_names_what_is_not_positive_definite(matrix):
    solver = DenseCholesky()
    result = solver.compute(solver.init(MatrixOperator(matrix, SYMMETRIC)), torch.ones(len(matrix))).worst
    assert result in (Result.singular, Result.negative_curvature)
    definite = MatrixOperator(matrix + 3 * torch.eye(len(matrix)), SYMMETRIC)
    assert solver.compute(solver.init(definite), torch.ones(len(matrix))).worst is Result.converged


@pytest.mark.parametrize("matrix", SINGULAR.values(), ids=SINGULAR)
@every_solver
def test_no_solver_claims_to_have_solved_a_singular_system(solver, matrix):
    vector = torch.arange(1.0, len(matrix) + 1)
    solution = solver.compute(solver.init(MatrixOperator(matrix, SYMMETRIC)), vector)
    assert solution.worst is not Result.converged


@pytest.mark.parametrize("kind", [ConjugateGradient, MINRES, partial(GMRES, restart=N), BiCGStab], ids=str)
@pytest.mark.parametrize("kappa", [1e2, 1e4, 1e6])
def test_float32_near_rounding_level_ends_and_claims_nothing_wrong(kind, kappa):
    operator, _ = operator_of("definite", kappa)
    single = MatrixOperator(operator.matrix.float(), POSITIVE_DEFINITE)
    vectors, solver = normal(3, N).float(), kind(rtol=1e-7, max_steps=4000)
    solution = solver.compute(solver.init(single), vectors)
    residual = (vectors.double() - solution.value.double() @ single.matrix.double()).norm(dim=-1)
    for index, result in enumerate(solution.results):
        assert result in (Result.converged, Result.stagnated, Result.singular, Result.max_steps)
        if result is Result.converged:
            size = float(solution.value[index].norm()) + float(vectors[index].norm())
            allowed = 1e-7 * float(vectors[index].norm()) + rounding_level(N, torch.float32) * size
            assert float(residual[index]) <= 2 * allowed  # the product that measures it rounds as much again
    if kappa == 1e2:
        assert set(solution.results) == {Result.converged}


def test_bicgstab_is_not_fooled_by_a_recurrence_that_went_through_huge_residuals():
    """The first step of this well-conditioned system nearly divides by zero: the residual goes through 1e16 and back."""
    rows = [[-1, 0, 1, 1, 3], [0, 0, 1, 2, 1], [0, 0, 0, 3, -3], [0, -3, 0, -1, 1], [0, 0, 0, -2, 3]]
    operator, vector = MatrixOperator(torch.tensor(rows).double()), torch.tensor([2.0, 2.0, 1.0, -2.0, 1.0])
    solver = BiCGStab()
    solution = solver.compute(solver.init(operator), vector)
    true = float(residual_of(operator, solution, vector))
    assert true <= 1e-6 * float(vector.norm()) or solution.worst is not Result.converged
    assert float(solution.residual_norm) == pytest.approx(true, rel=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    entries=st.lists(st.integers(-3, 3), min_size=25, max_size=25),
    n=st.integers(1, 5),
    exponent=st.integers(-250, 100),
    symmetric=st.booleans(),
    seed=st.integers(0, 3),
)
def test_no_solver_claims_what_the_residual_denies(entries, n, exponent, symmetric, seed):
    """Small integer matrices: singular, indefinite, defective, zero; right-hand sides of any size."""
    matrix = torch.tensor(entries, dtype=torch.float64).reshape(5, 5)[:n, :n]
    matrix = matrix + matrix.T if symmetric else matrix
    unit = torch.randint(-2, 3, (n,), generator=seeded(seed)).double()
    scale = 10.0**exponent
    solvers = [DenseLU(), GMRES(restart=5), BiCGStab(), LSMR(), NeumannSeries(step_size=0.1, max_steps=60)]
    if symmetric:
        solvers += [DenseCholesky(), ConjugateGradient(), MINRES()]
    for solver in solvers:
        state = solver.init(MatrixOperator(matrix, SYMMETRIC if symmetric else NO_TAGS))
        solution = solver.compute(state, unit * scale)
        if solution.worst is Result.converged:
            value = solution.value / scale
            assert bool(value.isfinite().all())
            residual = float((unit - matrix @ value).norm())
            assert residual <= 1.01e-6 * float(unit.norm()) + 1e-14 * float(matrix.norm()) * float(value.norm())


UNTAGGED, TALL = MatrixOperator(torch.eye(2)), MatrixOperator(torch.ones(3, 2))


@pytest.mark.parametrize(
    ("solver", "operator", "message"),
    [
        (
            ConjugateGradient(),
            UNTAGGED,
            "ConjugateGradient needs an operator that is symmetric, .* not tagged so: use GMRES",
        ),
        (MINRES(), UNTAGGED, "MINRES needs an operator that is symmetric, .* not tagged so: use GMRES"),
        (DenseCholesky(), UNTAGGED, "DenseCholesky needs an operator that is symmetric, .* not tagged so: use DenseLU"),
        (NeumannSeries(), UNTAGGED, "pass step_size .*or use GMRES"),
        (GMRES(), TALL, r"GMRES needs a square operator, .*\(3, 2\): use LSMR"),
        (DenseLU(), TALL, r"DenseLU needs a square operator, .*\(3, 2\): use LSMR"),
        (DenseLU(max_size=1), UNTAGGED, "dense 2 x 2 matrix .*use an iterative solver, or raise max_size"),
    ],
    ids=lambda value: name_of(value) if not isinstance(value, str) else "",
)
def test_operators_that_do_not_fit_are_refused_by_name(solver, operator, message):
    with pytest.raises(UsageError, match=message):
        solver.init(operator)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConjugateGradient(rtol=1.0), r"ConjugateGradient needs rtol in \[0, 1\) or None .*but got 1.0"),
        (lambda: MINRES(rtol=-1e-3), "MINRES needs rtol"),
        (lambda: GMRES(atol=-1.0), "GMRES needs atol >= 0, but got -1.0"),
        (lambda: BiCGStab(degree=0), "BiCGStab needs degree >= 1, but got 0"),
        (lambda: BiCGStab(max_steps=0), "BiCGStab needs max_steps >= 1, but got 0: IdentitySolver"),
        (lambda: GMRES(restart=0), "GMRES needs restart >= 1, but got 0"),
        (
            lambda: NeumannSeries(step_size=0.0),
            "NeumannSeries needs step_size > 0, or None to estimate it, but got 0.0",
        ),
        (lambda: IdentitySolver(scale=-1.0), "IdentitySolver needs scale > 0, but got -1.0"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@every_solver
def test_vectors_that_do_not_fit_are_refused(solver):
    state = solver.init(small())
    with pytest.raises(UsageError, match=r"right-hand side was expected to have shape \(30,\), but has \(29,\)"):
        solver.compute(state, torch.ones(29))
    with pytest.raises(UsageError, match=r"right-hand side is torch.float32, but the operator is torch.float64"):
        solver.compute(state, torch.ones(30, dtype=torch.float32))


def test_a_starting_point_of_the_wrong_shape_is_refused():
    with pytest.raises(UsageError, match=r"starting point x0 was expected to have shape \(30,\), but has \(3,\)"):
        linear_solve(small(), torch.ones(30), ConjugateGradient(), x0=torch.ones(3))


# ---------------------------------------------------------------------------------------------------------------------
# A vector in two halves, one for each thread: solvers may reduce over it by `operator.inner` alone


class Exchange:
    """Gathers one tensor from each shard; a shard that does not come breaks the barrier instead of hanging."""

    def __init__(self, num_shards, timeout):
        self.barrier = threading.Barrier(num_shards, timeout=timeout)
        self.slots = [None] * num_shards

    def gather(self, rank, tensor):
        self.slots[rank] = tensor
        self.barrier.wait()
        gathered = list(self.slots)
        self.barrier.wait()
        return gathered


class ShardOperator(LinearOperator):
    """The rows of a matrix that belong to one shard, acting on a vector of which each shard holds its half."""

    def __init__(self, matrix, rank, exchange, tags, num_shards=2):
        self.matrix, self.rank, self.exchange, self.tags = matrix, rank, exchange, tags
        self.half = matrix.shape[-1] // num_shards
        self.shape, self.batch_shape = (self.half, self.half), tuple(matrix.shape[:-2])
        self.dtype, self.device = matrix.dtype, matrix.device

    def mv(self, vector):
        whole = torch.cat(self.exchange.gather(self.rank, vector), -1)
        rows = self.matrix[..., self.rank * self.half : (self.rank + 1) * self.half, :]
        return (rows @ whole.unsqueeze(-1)).squeeze(-1)

    def transpose(self):
        return ShardOperator(self.matrix.mT, self.rank, self.exchange, self.tags)

    def inner(self, u, v):
        return torch.stack(self.exchange.gather(self.rank, torch.linalg.vecdot(u, v))).sum(0)


def solve_in_two_shards(solver, matrix, vector, tags, timeout=20.0, **options):
    """Run the same solver in two threads, each on its half, and put the halves together."""
    exchange, answers, errors = Exchange(2, timeout), [None, None], []
    half = vector.shape[-1] // 2
    preconditioner = options.pop("preconditioner", None)

    def work(rank):
        mine = slice(rank * half, (rank + 1) * half)
        try:
            operator = ShardOperator(matrix, rank, exchange, tags)
            local = {name: value[..., mine] for name, value in options.items()}
            if preconditioner is not None:
                local["preconditioner"] = DiagonalOperator(preconditioner[..., mine], POSITIVE_DEFINITE)
            answers[rank] = solver.compute(solver.init(operator), vector[..., mine], **local)
        except Exception as error:
            errors.append(error)
            exchange.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * timeout)
    if errors or None in answers:
        raise AssertionError(f"a shard failed or never came back: {errors}")
    first, second = answers
    assert torch.equal(first.result, second.result) and torch.equal(first.num_mv, second.num_mv)
    assert torch.equal(first.residual_norm, second.residual_norm)
    return torch.cat([first.value, second.value], -1), first


SHARDED = [
    ConjugateGradient(**TIGHT),
    NeumannSeries(step_size=0.1, **TIGHT),
    NeumannSeries(**TIGHT),  # Lanczos, too, reduces by `inner` alone
    MINRES(**TIGHT),
    GMRES(restart=40, **TIGHT),
    GMRES(restart=15, **TIGHT),
    BiCGStab(**TIGHT),
    LSMR(**TIGHT),
]


@pytest.mark.parametrize("solver", SHARDED, ids=name_of)
def test_two_shards_get_the_solution_of_one(solver):
    matrices = torch.stack([with_spectrum(torch.linspace(1, kappa, 80), 4) for kappa in (4.0, 15.0)])
    vectors = normal(2, 80)
    value, solution = solve_in_two_shards(solver, matrices, vectors, POSITIVE_DEFINITE)
    whole = solver.compute(solver.init(MatrixOperator(matrices, POSITIVE_DEFINITE)), vectors)
    assert solution.results == whole.results == [Result.converged] * 2
    torch.testing.assert_close(value, whole.value, rtol=1e-10, atol=1e-11)
    assert bool(((solution.num_mv - whole.num_mv).abs() <= 2 + 0.05 * whole.num_mv).all())


@pytest.mark.parametrize("kind", [ConjugateGradient, MINRES, partial(GMRES, restart=20), BiCGStab], ids=str)
def test_two_shards_agree_on_warm_starts_preconditioners_and_tiny_right_hand_sides(kind):
    matrix, vector = with_spectrum(torch.linspace(1, 15, 80), 4), 1e-200 * normal(80)
    solver, x0 = kind(**TIGHT), 1e-200 * normal(80, seed=1)
    diagonal = 1 / torch.diagonal(matrix)
    value, solution = solve_in_two_shards(solver, matrix, vector, SYMMETRIC, x0=x0, preconditioner=diagonal)
    assert solution.worst is Result.converged
    torch.testing.assert_close(1e200 * value, torch.linalg.solve(matrix, normal(80)), rtol=1e-10, atol=1e-11)


def test_two_shards_agree_on_a_failure():
    matrix = with_spectrum(torch.linspace(-1, 15, 80), 4)
    _, solution = solve_in_two_shards(ConjugateGradient(**TIGHT), matrix, normal(80), SYMMETRIC)
    assert solution.worst is Result.negative_curvature


def test_a_solver_that_reduces_by_itself_is_found_out(monkeypatch):
    """The harness has teeth: a norm of the local half alone makes the shards disagree."""
    monkeypatch.setattr(System, "norm", lambda system, vector: torch.linalg.vector_norm(vector, dim=-1))
    matrix = with_spectrum(torch.linspace(1, 15, 80), 4)
    with pytest.raises(AssertionError):
        solve_in_two_shards(GMRES(rtol=1e-10, max_steps=60), matrix, normal(80), POSITIVE_DEFINITE, timeout=1.0)


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str)
@pytest.mark.parametrize("solver", [DenseLU(), GMRES(), BiCGStab(), LSMR()], ids=name_of)
def test_a_nearly_singular_system_is_not_called_solved_by_luck(solver, dtype, apart):
    """Rows that agree to rounding: the residual of a huge iterate may come out small, and is not."""
    for seed in range(60):
        draw = seeded(seed)
        row, difference, vector = (torch.randn(2, generator=draw) for _ in range(3))
        matrix, vector = torch.stack([row, row * (1 + apart * difference)]).to(dtype), vector.to(dtype)
        solution = solver.compute(solver.init(MatrixOperator(matrix)), vector)
        if solution.worst is Result.converged:
            true = (vector.double() - matrix.double() @ solution.value.double()).norm()
            assert float(true) <= 1e-2 * float(vector.norm()), seed


def test_a_badly_scaled_diagonal_that_is_solved_exactly_is_not_called_singular():
    matrix = torch.diag(torch.tensor([1e-5, 1.0, 3.0], dtype=torch.float32))
    solver = DenseLU()
    solution = solver.compute(solver.init(MatrixOperator(matrix)), torch.ones(3, dtype=torch.float32))
    assert solution.worst is Result.converged


def test_products_that_underflow_are_no_least_squares_solution():
    operator = MatrixOperator(1e-25 * torch.eye(3, dtype=torch.float32))
    solution = LSMR().compute(LSMR().init(operator), torch.ones(3, dtype=torch.float32))
    assert not solution.successful


def test_a_tolerance_that_is_no_number_is_refused():
    with pytest.raises(UsageError, match="ConjugateGradient needs atol >= 0, but got nan"):
        ConjugateGradient(atol=math.nan)
