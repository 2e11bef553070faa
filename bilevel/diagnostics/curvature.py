"""The check of a certificate that looks at the spectrum: definiteness and conditioning, as a matrix or by Krylov spaces."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.diagnostics.finding import TITLES, Flaw, Limits, Row, nonfinite_row
from bilevel.diagnostics.subject import Subject, solve
from bilevel.linalg import LinearOperator, Tag, lanczos
from bilevel.linearisation import Linearisation
from bilevel.result import Result

SINGULAR = 1e-12  # least over largest eigenvalue below which a Hessian counts as singular
NUM_LANCZOS = 80
NUM_INVERSE = 5  # solves, by which the eigenvalues next to zero are found where the Hessian is too large for a matrix
INVERSE_ERROR = 1e-6  # of the inverse's eigenvalues: far above what accurate solves leave


def spectrum(subject: Subject, limits: Limits) -> Row:
    """Extreme eigenvalues of the Hessian, or singular values of the Jacobian: definiteness and conditioning."""
    operator = subject.at_refined.operator
    matrix, is_hessian = subject.matrix, Tag.symmetric in operator.tags
    if matrix is not None:
        if not bool(matrix.isfinite().all()):  # the eigensolver would raise
            return nonfinite_row("spectrum", ["the matrix of products with unit vectors is not finite at the solution"])
        values = torch.linalg.eigvalsh((matrix + matrix.mT) / 2) if is_hessian else torch.linalg.svdvals(matrix)
        smallest, largest = values.amin(-1), values.amax(-1)
        least, solved = values.abs().amin(-1), True
    else:
        if not is_hessian:
            operator = operator.transpose() @ operator
            operator.tags = operator.tags | {Tag.symmetric}
        ritz = lanczos(operator, NUM_LANCZOS, subject.seed)
        inverse = _Inverse(subject.at_refined)
        near_zero = lanczos(inverse, NUM_INVERSE, subject.seed)
        least = 1.0 / torch.maximum(near_zero.smallest.abs(), near_zero.largest.abs()).clamp(min=1e-300)
        least = torch.where(inverse.met(Result.singular), 0.0, least.nan_to_num(0.0))
        # The inverse's most negative eigenvalue is that of the Hessian next to zero, which its own Krylov space may not show.
        solved = bool(inverse.met(Result.converged).all())
        below = inverse.met(Result.converged) & (near_zero.smallest < -INVERSE_ERROR / least)
        smallest = torch.where(below, torch.minimum(ritz.smallest, 1.0 / near_zero.smallest), ritz.smallest)
        largest = ritz.largest
        if not is_hessian:
            smallest, largest, least = (value.clamp(min=0).sqrt() for value in (smallest, largest, least))
    size = torch.maximum(smallest.abs(), largest.abs())
    if not bool(size.isfinite().all()):
        return nonfinite_row("spectrum", ["the extreme eigenvalues of a Krylov space are not finite at the solution"])
    worst = int((least / size).flatten().argmin())
    low, high, ratio = (float(v.flatten()[worst]) for v in (smallest, largest, size / least.clamp(min=1e-300)))
    kind, about = "eigenvalues" if is_hessian else "singular values", "" if solved else "at least "
    figure = f"{kind} from {low:.3g} to {high:.3g}, condition {about}{ratio:.2g}"
    flaws: tuple[tuple[Flaw, str], ...] = ()
    if bool((least <= SINGULAR * size).any()) or not float(size.max()) > 0:
        flaws = ((Flaw.singular_hessian, f"least eigenvalue in size {float(least.min()):.2g}, largest {high:.2g}"),)
    elif is_hessian and bool((smallest < -SINGULAR * size).any()):
        flaws = ((Flaw.indefinite_hessian, f"least eigenvalue {float(smallest.min()):.3g}, largest {high:.3g}"),)
    return Row(TITLES["spectrum"], figure, "positive definite" if is_hessian else "invertible", flaws)


class _Inverse(LinearOperator):
    """The inverse of a Hessian by accurate solves, or that of the square `A^T A` of a Jacobian; remembers how they ended."""

    def __init__(self, at: Linearisation) -> None:
        of = at.operator
        self.shape, self.batch_shape, self.dtype, self.device = of.shape, of.batch_shape, of.dtype, of.device
        self.tags, self._at, self._is_hessian = frozenset({Tag.symmetric}), at, Tag.symmetric in of.tags
        self._results: list[Tensor] = []

    def mv(self, vector: Tensor) -> Tensor:
        """`A^{-1} v`, or `A^{-1} A^{-T} v`."""
        for transposed in (False,) if self._is_hessian else (True, False):
            solution = solve(self._at, vector, transposed=transposed)
            self._results.append(solution.result)
            vector = solution.value
        return vector

    def transpose(self) -> LinearOperator:
        """Itself."""
        return self

    def met(self, result: Result) -> Tensor:
        """The systems of which all solves ended so, if well; or any did, if not; `(*batch,)`."""
        ended = torch.stack(self._results) == result.code
        return ended.all(0) if result.successful else ended.any(0)
