"""Operators against dense matrices: products, transposes, batches, tags, composition, and what they refuse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel.errors import UsageError
from bilevel.linalg import (
    NO_TAGS,
    POSITIVE_DEFINITE,
    SYMMETRIC,
    DiagonalOperator,
    GaussNewtonOperator,
    HessianOperator,
    IdentityOperator,
    JacobianOperator,
    MatrixOperator,
    ProductOperator,
    ScaledOperator,
    SumOperator,
    Tag,
    as_matrix,
    damped,
    lanczos,
    norm,
)
from bilevel.linalg.composite import SharedOperator

BATCHES = [(), (3,), (2, 3)]


pytestmark = pytest.mark.usefixtures("float64")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(*shape, seed=0):
    matrix = normal(*shape, seed=seed)
    return matrix + matrix.mT


def function(x):
    """Vector-valued `(*batch, 4) -> (*batch, 3)`, nowhere linear."""
    weight = normal(3, 4, seed=5)
    return torch.tanh(x @ weight.T) + x[..., :3] * x[..., 1:]


def scalar(x):
    return function(x).square().sum(-1) + (x**4).sum(-1)


def output_loss(h):
    return torch.logsumexp(h, -1) + h.square().sum(-1)


def rowwise(derivative, point):
    """The derivative of one row after another, `(*batch, ...)`."""
    rows = torch.stack([derivative(row) for row in point.reshape(-1, point.shape[-1])])
    return rows.reshape(*point.shape[:-1], *rows.shape[1:])


def gauss_newton(x):
    jacobian = torch.autograd.functional.jacobian(function, x)
    return jacobian.T @ torch.autograd.functional.hessian(output_loss, function(x)) @ jacobian


def cases(batch):
    """Every operator on a batch, with its dense matrix."""
    a, b, d = normal(*batch, 4, 4), symmetric(*batch, 4, 4, seed=1), normal(*batch, 4, seed=2)
    tall, point = normal(*batch, 5, 4, seed=3), normal(*batch, 4, seed=4)
    identity, factor = torch.eye(4).expand(*batch, 4, 4), normal(*batch, seed=6)
    jacobian = rowwise(lambda x: torch.autograd.functional.jacobian(function, x), point)
    hessian = rowwise(lambda x: torch.autograd.functional.hessian(scalar, x), point)
    operator = MatrixOperator(a)
    return {
        "matrix": (operator, a),
        "symmetric matrix": (MatrixOperator(b, SYMMETRIC), b),
        "tall matrix": (MatrixOperator(tall), tall),
        "diagonal": (DiagonalOperator(d), torch.diag_embed(d)),
        "identity": (IdentityOperator(4, batch), identity),
        "jacobian": (JacobianOperator(function, point), jacobian),
        "hessian": (HessianOperator(scalar, point), hessian),
        "symmetric jacobian": (JacobianOperator(torch.func.grad(lambda x: scalar(x).sum()), point, SYMMETRIC), hessian),
        "gauss-newton": (GaussNewtonOperator(function, output_loss, point), rowwise(gauss_newton, point)),
        "sum": (operator + MatrixOperator(b, SYMMETRIC), a + b),
        "scaled": (-2.5 * operator, -2.5 * a),
        "scaled by a tensor": (ScaledOperator(operator, factor), factor[..., None, None] * a),
        "product": (MatrixOperator(tall) @ operator, tall @ a),
        "tagged product": (ProductOperator(MatrixOperator(tall.mT), MatrixOperator(tall), SYMMETRIC), tall.mT @ tall),
        "damped": (damped(operator, 0.3), a + 0.3 * identity),
        "damped by a tensor": (damped(operator, factor), a + factor[..., None, None] * identity),
        "shared": (SharedOperator(operator, (7,)), a.expand(7, *batch, 4, 4)),
        "nested": (damped(2.0 * (operator @ operator.transpose()) + DiagonalOperator(d), 1.0),
                   2 * a @ a.mT + torch.diag_embed(d) + identity),
    }  # fmt: skip


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", cases(()))
def test_products_and_transposes_are_those_of_the_dense_matrix(name, batch):
    operator, dense = cases(batch)[name]
    m, n = dense.shape[-2:]
    assert operator.shape == (m, n) and operator.batch_shape == dense.shape[:-2]
    assert operator.dtype == torch.float64 and operator.device.type == "cpu"
    torch.testing.assert_close(as_matrix(operator), dense, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(as_matrix(operator.transpose()), dense.mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(as_matrix(operator.transpose().transpose()), dense, rtol=1e-12, atol=1e-12)
    assert operator.transpose().shape == (n, m)
    extra = normal(2, 3, *dense.shape[:-2], n, seed=8)
    torch.testing.assert_close(operator.mv(extra), (dense @ extra.unsqueeze(-1)).squeeze(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", cases(()))
def test_adjointness_and_symmetry_are_as_tagged(name):
    operator, dense = cases((3,))[name]
    u, v = normal(*dense.shape[:-1], seed=1), normal(*dense.shape[:-2], dense.shape[-1], seed=2)
    left, right = operator.inner(u, operator.mv(v)), operator.inner(operator.transpose().mv(u), v)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    assert left.shape == operator.batch_shape
    if Tag.symmetric in operator.tags:
        torch.testing.assert_close(dense, dense.mT, rtol=1e-12, atol=1e-12)
        assert operator.transpose() is operator


def test_a_product_costs_no_new_graph_and_leaves_none_behind():
    calls = []

    def counted(x):
        calls.append(1)
        return scalar(x)

    operator = HessianOperator(counted, normal(4))
    for _ in range(5):
        assert not operator.mv(normal(4)).requires_grad
    assert len(calls) == 1
    torch.testing.assert_close(operator.gradient.detach(), torch.func.grad(scalar)(normal(4)))


def test_hessian_and_jacobian_take_graphs_that_exist_already():
    point = normal(2, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(scalar(point).sum(), point, create_graph=True)
    expected = rowwise(lambda x: torch.autograd.functional.hessian(scalar, x), point.detach())
    torch.testing.assert_close(as_matrix(HessianOperator.from_gradient(gradient, point)), expected)
    jacobian = rowwise(lambda x: torch.autograd.functional.jacobian(function, x), point.detach())
    torch.testing.assert_close(as_matrix(JacobianOperator.from_output(function(point), point)), jacobian)


def test_operators_work_where_gradients_are_switched_off():
    with torch.no_grad():
        operator = HessianOperator(scalar, normal(4))
        jacobian = JacobianOperator(function, normal(4))
        assert bool(operator.mv(torch.ones(4)).any()) and bool(jacobian.mv(torch.ones(4)).any())


def test_a_function_that_does_not_depend_on_the_point_has_zero_derivatives():
    hessian = HessianOperator(lambda x: x.sum(-1), normal(3, 4))
    assert torch.equal(hessian.mv(torch.ones(3, 4)), torch.zeros(3, 4))
    jacobian = JacobianOperator(lambda x: torch.ones(3, 2), normal(3, 4))
    assert torch.equal(jacobian.mv(torch.ones(3, 4)), torch.zeros(3, 2))
    assert torch.equal(jacobian.transpose().mv(torch.ones(3, 2)), torch.zeros(3, 4))


def eye(tags=NO_TAGS):
    return MatrixOperator(torch.eye(2), tags)


DIAGONAL = frozenset({Tag.diagonal})
TAG_TABLE = {
    "matrix": (lambda: eye(), NO_TAGS),
    "nothing is inferred": (lambda: eye().transpose(), NO_TAGS),
    "diagonal": (lambda: DiagonalOperator(torch.ones(2)), SYMMETRIC | DIAGONAL),
    "positive diagonal": (lambda: DiagonalOperator(torch.ones(2), POSITIVE_DEFINITE), POSITIVE_DEFINITE | DIAGONAL),
    "identity": (lambda: IdentityOperator(2), POSITIVE_DEFINITE | DIAGONAL),
    "hessian": (lambda: HessianOperator(scalar, normal(4)), SYMMETRIC),
    "convex hessian": (lambda: HessianOperator(scalar, normal(4), POSITIVE_DEFINITE), POSITIVE_DEFINITE),
    "jacobian": (lambda: JacobianOperator(function, normal(4)), NO_TAGS),
    "gauss-newton": (lambda: GaussNewtonOperator(function, output_loss, normal(4)), SYMMETRIC),
    "sum keeps common tags": (lambda: IdentityOperator(2) + eye(SYMMETRIC), SYMMETRIC),
    "sum with untagged": (lambda: IdentityOperator(2) + eye(), NO_TAGS),
    "positive factor": (lambda: 2.0 * IdentityOperator(2), POSITIVE_DEFINITE | DIAGONAL),
    "negative factor": (lambda: -2.0 * IdentityOperator(2), SYMMETRIC | DIAGONAL),
    "factor zero": (lambda: 0.0 * IdentityOperator(2), SYMMETRIC | DIAGONAL),
    "tensor of factors": (lambda: ScaledOperator(IdentityOperator(2), torch.tensor(2.0)), SYMMETRIC | DIAGONAL),
    "product": (lambda: IdentityOperator(2) @ IdentityOperator(2), NO_TAGS),
    "damped": (lambda: damped(eye(POSITIVE_DEFINITE), 0.1), POSITIVE_DEFINITE),
    "damped by nothing": (lambda: damped(eye(POSITIVE_DEFINITE), 0.0), POSITIVE_DEFINITE),
    "damped by a tensor": (lambda: damped(eye(POSITIVE_DEFINITE), torch.tensor(0.1)), POSITIVE_DEFINITE),
    "damped negatively": (lambda: damped(eye(POSITIVE_DEFINITE), -0.1), SYMMETRIC),
    "damped indefinite": (lambda: damped(eye(SYMMETRIC), 0.1), SYMMETRIC),
    "shared": (lambda: SharedOperator(IdentityOperator(2), (3,)), POSITIVE_DEFINITE | DIAGONAL),
}  # fmt: skip


@pytest.mark.parametrize(("make", "tags"), TAG_TABLE.values(), ids=TAG_TABLE)
def test_tags_follow_the_structure(make, tags):
    assert make().tags == tags


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MatrixOperator(torch.ones(3)), r"needs shape \(\*batch, m, n\), but this tensor has shape \(3,\)"),
        (lambda: MatrixOperator(torch.ones(2, 3), SYMMETRIC), r"only a square matrix can be symmetric, .*\(2, 3\)"),
        (lambda: damped(MatrixOperator(torch.ones(3, 2)), 1.0), r"only a square operator can be damped, .*\(3, 2\)"),
        (lambda: SumOperator(IdentityOperator(2), IdentityOperator(3)), r"\(2, 2\) and \(3, 3\) cannot be added"),
        (lambda: IdentityOperator(2) @ IdentityOperator(3), r"\(2, 2\) and \(3, 3\) cannot be multiplied"),
        (
            lambda: HessianOperator(function, normal(2, 4)),
            r"of shape \(2,\) \(one scalar a system\), .*\(2, 3\)",
        ),
        (lambda: HessianOperator(lambda x: scalar(x).sum(), normal(2, 4)), r"but returned \(\)"),
        (
            lambda: JacobianOperator(scalar, normal(2, 4)),
            r"shape \(\*batch, m\) with the same batch, .*\(2,\)",
        ),
        (lambda: lanczos(MatrixOperator(torch.eye(2))), "lanczos needs a symmetric operator, but this MatrixOperator"),
    ],
)
def test_operators_that_make_no_sense_are_refused_in_a_sentence(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=60, deadline=None)
@given(exponent=st.integers(-300, 140), seed=st.integers(0, 5))
def test_the_norm_neither_underflows_nor_changes_anything_else(dtype, exponent, seed):
    lowest = -36 if dtype == torch.float32 else -300
    highest = 15 if dtype == torch.float32 else 140
    scale = 10.0 ** max(lowest, min(highest, exponent))
    vector = (normal(2, 5, seed=seed) * scale).to(dtype)
    operator = IdentityOperator(5, (2,), dtype)
    expected = (vector.double() / scale).norm(dim=-1)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(norm(operator, vector).double() / scale, expected, rtol=tolerance, atol=0)


def ends(ritz):
    return torch.stack([ritz.smallest, ritz.largest])


def test_lanczos_finds_the_ends_of_the_spectrum_from_within():
    values = torch.linspace(-3, 10, 60)
    basis = torch.linalg.qr(normal(60, 60))[0]
    operator = MatrixOperator(basis @ torch.diag(values) @ basis.T, SYMMETRIC)
    before = None
    for num_steps in (2, 5, 20, 60):
        ritz = lanczos(operator, num_steps)
        assert ritz.num_mv == num_steps
        assert float(ritz.smallest) >= -3 - 1e-10 and float(ritz.largest) <= 10 + 1e-10
        if before is not None:
            assert ritz.smallest <= before.smallest + 1e-10 and ritz.largest >= before.largest - 1e-10
        before = ritz
    torch.testing.assert_close(ends(ritz), torch.tensor([-3.0, 10.0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_steps", [3, 4, 10, 50])
def test_lanczos_survives_invariant_subspaces(num_steps):
    """Few distinct eigenvalues exhaust the Krylov space early; what follows is noise and must not be reported."""
    values = torch.tensor([2.0, 2.0, 2.0, 5.0, 5.0, 7.0, 7.0, 7.0])
    ritz = lanczos(DiagonalOperator(values), num_steps)
    torch.testing.assert_close(ends(ritz), torch.tensor([2.0, 7.0]), rtol=1e-10, atol=0)
    ritz = lanczos(3.0 * IdentityOperator(6), num_steps)
    torch.testing.assert_close(ends(ritz), torch.tensor([3.0, 3.0]), rtol=1e-12, atol=0)


def test_lanczos_is_batched_seeded_and_says_nan_for_a_broken_system():
    matrices = torch.stack([symmetric(6, 6, seed=seed) for seed in range(3)])
    matrices[1, 0, 0] = torch.nan
    ritz = lanczos(MatrixOperator(matrices, SYMMETRIC), 6, seed=3)
    exact = torch.linalg.eigvalsh(matrices[[0, 2]])
    torch.testing.assert_close(ritz.smallest[[0, 2]], exact[:, 0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ritz.largest[[0, 2]], exact[:, -1], rtol=1e-8, atol=1e-8)
    assert bool(ritz.smallest[1].isnan()) and bool(ritz.largest[1].isnan())
    again = lanczos(MatrixOperator(matrices[2], SYMMETRIC), 2, seed=3)
    other = lanczos(MatrixOperator(matrices[2], SYMMETRIC), 2, seed=4)
    assert torch.equal(again.largest, lanczos(MatrixOperator(matrices[2], SYMMETRIC), 2, seed=3).largest)
    assert not torch.equal(again.largest, other.largest)
