"""What a certificate can find wrong, and the rows of its table."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Flaw(Enum):
    """A reason why a hypergradient is not what it seems; the name is the key in a configuration, the value the advice."""

    dropout = "call eval() on the module, or draw one mask before the loss"
    noise = "draw the random numbers once, before the loss, and use them in every evaluation"
    fresh_minibatch = "make the batch a pure function of (step, inner_step) in inner_batches; the loss must not draw it"
    tracked_batch_norm = "set track_running_stats=False, or call eval() on the module"
    changing_buffer = "call eval() on the module that changes it"
    hidden_randomness = "draw from torch's global generator, or from one that the problem holds as an attribute"
    changed_in_place = "compute without in-place operations on data, parameters or hyperparameters"
    autocast = "take torch.autocast out of the losses, or give it enabled=False: float32 keeps three digits under it"
    unconverged_inner_solve = "allow more inner steps, a tighter atol, or another solver such as newton_cg or lbfgs"
    wrong_optimality = (
        "make optimality vanish where the inner problem is solved, by differentiable operations throughout"
    )
    kink = "use a smooth activation or penalty (tanh, softplus), or a proximal solver for the non-smooth term"
    singular_hessian = (
        "add a penalty, or fix what leaves the loss unchanged; the derivative does not exist or is not unique"
    )
    indefinite_hessian = (
        "the solution is no minimum: solve further, add a penalty, or declare it and use linear_solver=minres"
    )
    disconnected_hyperparameter = "use it on the way to the outer loss, choose a method that reaches it, or take it out"
    unsymmetric_hessian = "look for a custom backward that is not the derivative of its forward"
    unrepeatable_product = "make the loss deterministic; torch.use_deterministic_algorithms(True) shows the operation"
    wrong_mixed_product = (
        "look for detach(), item(), NumPy or a custom backward between hyperparameters and the inner loss"
    )
    wrong_derivative = "look for detach(), item(), NumPy or a custom backward in the losses"
    unsolved_linear_system = (
        "tighten linear_solver.rtol, allow more steps, or use preconditioner=nystrom or linear_solver=auto"
    )
    biased_method = "use hypergradient=implicit_auto, or declare the bias"
    stopped_by_policy = (
        "a run would end at its first step: follow the sentence, or choose a policy that goes on, such as "
        "unconverged=more_steps or negative_curvature=minres"
    )
    nonfinite = "check the data, the starting point and the losses"


@dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        check: what was looked at.
        figure: what came, ready to read.
        limit: what was expected; empty for a row that only informs.
        flaws: what was found, each with the sentence that names the place; empty when the check passed.
        judged: False where an earlier flaw makes the check meaningless.
    """

    check: str
    figure: str
    limit: str = ""
    flaws: tuple[tuple[Flaw, str], ...] = ()
    judged: bool = True

    @property
    def passed(self) -> bool | None:
        """Whether nothing was found; None where the check was not made."""
        return not self.flaws if self.judged else None

    def as_json(self) -> dict[str, Any]:
        """For `certificate.json`."""
        found = [{"name": flaw.name, "detail": detail, "what to do": flaw.value} for flaw, detail in self.flaws]
        return {"check": self.check, "figure": self.figure, "limit": self.limit, "passed": self.passed, "found": found}


DIFFERENCE = 1e-3  # relative difference that finite differences leave

TITLES = {
    "one_function": "losses are fixed functions",
    "paths": "hyperparameters reached",
    "finite": "finite at the solution",
    "stationarity": "inner problem solved",
    "optimality_and_loss": "optimality fits inner_loss",
    "repeatable": "products repeat",
    "symmetric": "symmetry <u, Hv> = <v, Hu>",
    "smooth": "smooth at the solution",
    "adjoint": "adjoint of the mixed product",
    "spectrum": "curvature",
    "finite_differences": "finite differences of the re-solved problem",
    "method": "the method",
    "first_steps": "the first outer steps",
    "methods": "all methods at the solution",
}


@dataclass(frozen=True)
class Limits:
    """What a certificate tolerates.

    Attributes:
        tolerance: relative error of the hypergradient.
    """

    tolerance: float = 1e-2


def row(check: str, figure: float, limit: float, flaw: Flaw, said: str) -> Row:
    """A check of one figure against its limit, with the flaw and its sentence where that is exceeded."""
    return Row(check, f"{figure:.2g}", f"<= {limit:g}", () if figure <= limit else ((flaw, said),))


def nonfinite_row(check: str, broken: list[str]) -> Row:
    """A row of what is not finite."""
    flaws = tuple((Flaw.nonfinite, said) for said in broken)
    return Row(TITLES[check], f"{len(broken)} not finite" if broken else "yes", "yes", flaws)
