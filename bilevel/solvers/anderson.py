"""Anderson acceleration of a fixed-point iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.solvers.objective import Hparams, Objective
from bilevel.solvers.options import Option, option
from bilevel.solvers.solver import InnerSolver, State, fresh_state, row_norm


@dataclass(frozen=True)
class AndersonAcceleration(InnerSolver):
    r"""Anderson acceleration of `x <- x - learning_rate F(x)`, `F` the optimality (the gradient of a loss).

    Combines the last iterates so that their linearised residual is least. For a fixed point `x = T(x)` the optimality is
    `x - T(x)` and the learning rate 1.

    Args:
        max_steps: largest number of steps.
        atol: stop when the norm of `F` is at most this.
        rtol: stop as well when it is at most this times that of the starting point.
        learning_rate: factor of the plain iteration (the mixing), or the name of a hyperparameter.
        history: number of earlier iterates that are combined.
        ridge: Tikhonov term of the least-squares problem, relative to its largest entry; at least what rounding makes of
            it in this precision.

    Reference: Walker and Ni (2011), "Anderson acceleration for fixed-point iterations".

    Example:
        >>> from bilevel.solvers import run
        >>> objective = Objective(optimality=lambda x, h: x - torch.cos(x))
        >>> solution = run(AndersonAcceleration(learning_rate=1.0), objective, torch.zeros(1), {})
        >>> round(solution.params.item(), 4), solution.num_steps < 10
        (0.7391, True)
    """

    learning_rate: Option = 0.1
    history: int = 5
    ridge: float = 1e-10

    def __post_init__(self) -> None:
        """Validate the numbers."""
        super().__post_init__()
        if self.history < 1:
            raise UsageError(f"AndersonAcceleration needs history >= 1, but got {self.history}.")

    def init(self, params: Tensor, loss: Objective, hparams: Hparams) -> State:
        """No history."""
        empty = params.new_zeros(0, *params.shape)
        return {**fresh_state(params), "iterates": empty, "residuals": empty}

    def step(self, params: Tensor, state: State, loss: Objective, hparams: Hparams) -> tuple[Tensor, State]:
        """Mix the history with the newest residual."""
        size = option(self.learning_rate, hparams)
        residual = -size * loss.gradient(params, hparams)
        keep = slice(-(self.history + 1), None)
        iterates = torch.cat([state["iterates"], params.unsqueeze(0)])[keep]
        residuals = torch.cat([state["residuals"], residual.unsqueeze(0)])[keep]
        new = params + residual
        if len(iterates) > 1:
            changes = (residuals[1:] - residuals[:-1]).movedim(0, -2)  # (*batch, m, n)
            moves = (iterates[1:] - iterates[:-1]).movedim(0, -2)
            gram = changes @ changes.mT
            scale = torch.diagonal(gram, dim1=-2, dim2=-1).amax(-1)[..., None, None]
            kind, count = torch.finfo(gram.dtype), gram.shape[-1]
            # Changes may depend on each other (in one dimension they do): rounding then leaves eigenvalues of either sign.
            ridge = max(self.ridge, 4 * count * kind.eps)
            damped = gram + (ridge * scale + kind.tiny) * torch.eye(count, dtype=gram.dtype, device=gram.device)
            weights = torch.linalg.solve(damped, (changes @ residual.unsqueeze(-1)))  # (*batch, m, 1)
            new = new - ((moves + changes).mT @ weights).squeeze(-1)
        return new, {
            **state,
            "iterates": iterates,
            "residuals": residuals,
            "stationarity": row_norm(residual / size),
            "num_gradients": state["num_gradients"] + 1,
        }
