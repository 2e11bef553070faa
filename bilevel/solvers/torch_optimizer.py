"""Any optimiser of `torch.optim` as an inner solver."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.solvers.adam import Adam
from bilevel.solvers.gradient_descent import GradientDescent
from bilevel.solvers.objective import Hparams, Objective
from bilevel.solvers.solver import InnerSolver, State, fresh_state, row_norm
from bilevel.solvers.update_rule import UpdateRule, no_rule

Options = dict[str, Any]  # those of a parameter group


def _adam(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params)


@dataclass(frozen=True)
class TorchOptimizer(InnerSolver):
    """Adapter for `torch.optim`; not differentiable, since those optimisers work in place outside the graph.

    Args:
        max_steps: number of steps.
        atol: stop when the gradient norm is at most this.
        rtol: stop as well when it is at most this times that of the starting point.
        optimizer: makes the optimiser from a list of tensors, for instance `partial(torch.optim.Adam, lr=1e-2)`.

    Example:
        >>> from functools import partial
        >>> objective = Objective(lambda x, h: (x ** 2).sum(-1) / 2)
        >>> solver, x = TorchOptimizer(optimizer=partial(torch.optim.SGD, lr=0.5)), torch.ones(1)
        >>> solver.step(x, solver.init(x, objective, {}), objective, {})[0]
        tensor([0.5000])
    """

    differentiable: ClassVar[bool] = False

    optimizer: Callable[..., torch.optim.Optimizer] = _adam

    def init(self, params: Tensor, loss: Objective, hparams: Hparams) -> State:
        """The state of a fresh optimiser."""
        leaf = params.detach().clone().requires_grad_()
        return {**fresh_state(params), "optimizer": self.optimizer([leaf]).state_dict()}

    def step(self, params: Tensor, state: State, loss: Objective, hparams: Hparams) -> tuple[Tensor, State]:
        """One step of the optimiser, which may evaluate the gradient several times (`torch.optim.LBFGS`)."""
        leaf = params.detach().clone().requires_grad_()
        optimizer = self.optimizer([leaf])
        optimizer.load_state_dict(
            copy.deepcopy(state["optimizer"])
        )  # it works in place; the state given stays as it was
        seen: list[Tensor] = []

        def closure() -> Any:
            with torch.no_grad():
                if loss.loss is None:
                    value, gradient = torch.zeros(()), loss.gradient(leaf.detach(), hparams)
                else:
                    value, gradient = loss.value_and_gradient(leaf.detach(), hparams)
            leaf.grad = gradient
            seen.append(row_norm(gradient))
            return value.sum()

        optimizer.step(closure)
        return leaf.detach(), {
            **state,
            "optimizer": optimizer.state_dict(),
            "stationarity": seen[-1],
            "num_gradients": state["num_gradients"] + len(seen),
        }

    def update_rule(self) -> UpdateRule:
        """The step of Adam, AdamW or SGD by the solver of ours that makes the same.

        Raises:
            UsageError: another optimiser, or an option that ours do not have.
        """
        optimizer = self.optimizer([torch.zeros(1, requires_grad=True)])
        for kind, (rule, changes) in RULES.items():
            if type(optimizer) is kind:
                (group,) = optimizer.param_groups
                wrong = [name for name in changes if group.get(name)]
                if kind is torch.optim.Adam and group["weight_decay"] and not group.get("decoupled_weight_decay"):
                    wrong.append("weight_decay")
                if wrong:
                    raise no_rule(
                        f"torch.optim.{kind.__name__} with {wrong[0]}={group[wrong[0]]} has none that is known"
                    )
                return rule(group)
        raise no_rule(f"torch.optim's {type(optimizer).__name__} has none that is known")


def _adam_rule(group: Options) -> UpdateRule:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    solver = Adam(
        learning_rate=float(group["lr"]),
        beta1=beta1,
        beta2=beta2,
        epsilon=group["eps"],
        weight_decay=group["weight_decay"],
    )

    def translate(state: State, params: Tensor) -> State:
        own, others = _entry(state)
        nothing, count = torch.zeros_like(params), torch.tensor(int(own.get("step", 0)))
        first, second = own.get("exp_avg", nothing), own.get("exp_avg_sq", nothing)
        return {**others, "first_moment": first, "second_moment": second, "count": count}

    return UpdateRule(solver, ("first_moment", "second_moment"), translate)


def _sgd_rule(group: Options) -> UpdateRule:
    solver = GradientDescent(
        learning_rate=float(group["lr"]), momentum=float(group["momentum"]), weight_decay=group["weight_decay"]
    )

    def translate(state: State, params: Tensor) -> State:
        own, others = _entry(state)
        velocity = own.get("momentum_buffer")  # there is none without momentum
        return {**others, "velocity": torch.zeros_like(params) if velocity is None else velocity}

    return UpdateRule(solver, ("velocity",), translate)


def _entry(state: State) -> tuple[State, State]:
    """What the optimiser keeps for its one tensor (nothing before the first step), and the rest of the solver's state."""
    return state["optimizer"]["state"].get(0, {}), {key: value for key, value in state.items() if key != "optimizer"}


# For each optimiser: how its options and its state are read, and the options that must be off.
RULES: dict[type[torch.optim.Optimizer], tuple[Callable[[Options], UpdateRule], tuple[str, ...]]] = {
    torch.optim.Adam: (_adam_rule, ("amsgrad", "maximize")),
    torch.optim.AdamW: (_adam_rule, ("amsgrad", "maximize")),
    torch.optim.SGD: (_sgd_rule, ("dampening", "nesterov", "maximize")),
}
