"""Sparse matrices: products and their derivatives are those of the dense matrix, in every composition that is allowed."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array, csr_array, random_array
from torch.autograd import grad, gradcheck, gradgradcheck

from bilevel.errors import UsageError
from bilevel.sparse import SparseMatrix
from bilevel.tree import to


def pair(rows, columns, density=0.3, seed=0):
    """A sparse matrix and the same one as a dense tensor."""
    matrix = random_array((rows, columns), density=density, rng=seed, dtype=float)
    return SparseMatrix.of(matrix, torch.float64), torch.from_numpy(matrix.toarray())


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5), st.floats(0, 1), st.integers(0, 999))
def test_products_with_it_and_its_transpose_are_those_of_the_dense_matrix(rows, columns, width, density, seed):
    sparse, dense = pair(rows, columns, density, seed)
    right = torch.randn(columns, width, dtype=torch.float64)
    left = torch.randn(rows, width, dtype=torch.float64)
    torch.testing.assert_close(sparse @ right, dense @ right)
    torch.testing.assert_close(sparse.mT @ left, dense.mT @ left)
    assert sparse.shape == dense.shape and sparse.mT.mT.shape == dense.shape


def test_derivatives_of_first_and_second_order_pass_finite_differences():
    sparse, _ = pair(5, 4)
    at = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda w: (sparse @ w).sin(), at)
    assert gradgradcheck(lambda w: (sparse @ w).sin(), at)


def test_third_derivatives_are_those_of_the_dense_matrix():
    sparse, dense = pair(6, 5, 0.5)

    def third(matrix):
        at = torch.linspace(-1, 1, 10, dtype=torch.float64).view(5, 2).requires_grad_()
        value = (matrix @ at).sin().sum()
        for _ in range(3):
            (found,) = grad(value, at, create_graph=True)
            value = found.square().sum()
        return found.detach()

    torch.testing.assert_close(third(sparse), third(dense))


def test_a_strided_factor_is_taken_as_it_is():
    sparse, dense = pair(6, 5)
    weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    (found,) = grad((sparse @ weight.mT).exp().sum(), weight)
    (expected,) = grad((dense @ weight.mT).exp().sum(), weight)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_vmap_is_one_product_for_all_and_can_be_differentiated(in_dim):
    sparse, dense = pair(6, 5)
    weights = torch.randn(2, 5, 3, dtype=torch.float64).movedim(0, in_dim).contiguous()

    def hessian_product(matrix):
        def single(weight):
            loss = torch.func.grad(lambda w: (matrix @ w).sin().sum())
            return torch.func.grad(lambda w: (loss(w) * 0.3).sum())(weight)

        return torch.vmap(single, in_dim)(weights)

    torch.testing.assert_close(torch.vmap(lambda w: sparse @ w, in_dim)(weights), dense @ weights.movedim(in_dim, 0))
    torch.testing.assert_close(hessian_product(sparse), hessian_product(dense))


def test_forward_mode_is_refused_and_not_wrong():
    sparse, _ = pair(3, 3)
    at = torch.ones(3, 1, dtype=torch.float64)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda w: sparse @ w, (at,), (at,))


def test_entries_that_stand_there_twice_are_added_and_the_original_is_left_alone():
    matrix = coo_array(([1.0, 2.0, 4.0], ([0, 0, 1], [1, 1, 0])), (2, 2))
    unsorted = csr_array(([3.0, 5.0], [1, 0], [0, 2, 2]), (2, 2))
    eye = torch.eye(2, dtype=torch.float64)
    assert (SparseMatrix.of(matrix, torch.float64) @ eye).tolist() == [[0, 3], [4, 0]]
    assert (SparseMatrix.of(unsorted, torch.float64) @ eye).tolist() == [[5, 3], [0, 0]]
    assert unsorted.indices.tolist() == [1, 0]


def test_a_copy_is_one():
    sparse, dense = pair(4, 3)
    other = copy.deepcopy(sparse)
    other.rows.values().zero_()
    torch.testing.assert_close(sparse @ torch.eye(3, dtype=torch.float64), dense)


def test_it_moves_with_the_problem_that_holds_it():
    sparse, dense = pair(4, 3)
    moved = to({"x": sparse}, dtype=torch.float32)["x"]
    at = torch.ones(3, 2)
    torch.testing.assert_close(moved @ at, dense.float() @ at)
    assert sparse.rows.dtype == torch.float64


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (torch.eye(2), "expected a sparse matrix of SciPy's, but got a Tensor"),
        (csr_array([[1.0, float("nan")]]), "finite entries"),
    ],
)
def test_what_is_no_finite_sparse_matrix_is_refused(matrix, said):
    with pytest.raises(UsageError, match=said):
        SparseMatrix.of(matrix)


@pytest.mark.parametrize("shape", [(4, 2), (3,), (2, 3, 2)])
def test_shapes_that_do_not_fit_are_told(shape):
    sparse, _ = pair(4, 3)
    with pytest.raises(UsageError, match=r"sparse matrix \(4, 3\) was expected to be multiplied with \(3, k\)"):
        sparse @ torch.ones(shape, dtype=torch.float64)
