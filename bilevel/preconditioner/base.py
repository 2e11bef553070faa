"""The contract of a preconditioner: from an inner problem at its solution to an operator close to the inverse Hessian."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from bilevel.linalg import LinearOperator
from bilevel.linearisation import Linearisation
from bilevel.solvers import InnerSolution

State = dict[str, Tensor]


@dataclass(frozen=True)
class Prepared:
    """A preconditioner for one linear solve.

    Attributes:
        operator: approximates the inverse of the linearisation's operator; symmetric positive definite. None: no
            preconditioner.
        state: tensors from which `Preconditioner.restore` makes the operator again in later outer steps.
        num_mv: matrix-vector products spent on it; other passes through the model count as one each.
    """

    operator: LinearOperator | None
    state: State
    num_mv: int = 0


class Preconditioner(ABC):
    """A way to approximate the inverse of the inner Hessian.

    Building may cost products; what was built is tensors, kept across outer steps and checkpoints, and used again while
    it still serves.
    """

    def price(self, at: Linearisation) -> float:
        """Products that building it will take, as far as that is known before; infinity where it does not serve.

        Args:
            at: the inner problem at its solution.
        """
        return 0.0

    def pays(self, at: Linearisation, num_mv: int) -> bool:
        """Whether to build one, where there is none yet; always, unless a subclass knows better.

        Args:
            at: the inner problem at its solution.
            num_mv: products that the linear solves of the outer steps so far took; 0 where there was none.
        """
        return True

    def meanwhile(self, at: Linearisation) -> LinearOperator | None:
        """What serves as long as none pays, and costs no product; nothing, unless a subclass knows better."""
        return None

    @abstractmethod
    def build(self, at: Linearisation, inner: InnerSolution | None) -> Prepared:
        """Make one for the operator of `at`.

        Args:
            at: the inner problem at its solution.
            inner: the inner solve that led there, whose solver state may hold curvature pairs or second moments;
                None where there was none.

        Raises:
            UsageError: the problem or the inner solver lacks what this preconditioner is made of.
        """

    @abstractmethod
    def restore(self, at: Linearisation, state: State) -> LinearOperator | None:
        """The operator again from the tensors of an earlier `build`, for the operator of `at`; costs no product.

        What is known without a product, the penalty, is that of `at`; what was found at the earlier point stays. Positive
        definite whatever has changed, useful while the data's curvature has not: it ages the faster, the larger its ratio to
        the penalty.
        """

    def refresh(self, state: State, inner: InnerSolution | None) -> State:
        """The tensors of an earlier `build` with what the inner solve of this step brings, at no product; as they are.

        Called before `restore`.
        """
        return state
