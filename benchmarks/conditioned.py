"""Problems of a wished condition number, drawn at random, with their exact solutions and hypergradients.

Ridge, logistic regression and a damped MLP of 20 to 200 parameters; one shared penalty, or one for each parameter; spectra
that are log-uniform, a power law or geometric, with the penalty as their floor. The truth is the inner problem solved to
rounding by Newton's method with a dense Hessian, and a dense linear solve there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bilevel.batches import StepBatches
from bilevel.flat import FlatProblem
from bilevel.hypergradient.outer import outer_gradients
from bilevel.linalg import as_matrix
from bilevel.linearisation import Linearisation, linearise
from bilevel.problem import Problem
from bilevel.solvers import LBFGS
from bilevel.tree import TensorDict


def uniform(draw: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    """One number."""
    return low + (high - low) * float(torch.rand((), generator=draw))


def spectrum(size: int, kappa: float, draw: torch.Generator) -> Tensor:
    """Variances of the features along their principal axes, the largest 1."""
    kind = int(torch.randint(3, (), generator=draw))
    if kind == 0:  # log-uniform down to the penalty
        return kappa ** -torch.rand(size, generator=draw)
    if kind == 1:
        return (1.0 + torch.arange(size)) ** -uniform(draw, 1, 3)
    return 10 ** (-uniform(draw, 2, 10) * torch.arange(size) / size)


class Regression(Problem):
    """Squared error of a linear model, with a penalty for each parameter or a shared one, judged on a validation split."""

    warm = False

    def __init__(self, size: int, kappa: float, draw: torch.Generator) -> None:
        """Draw everything; the Hessian at the solution will have a condition number near `kappa`, mostly."""
        self.draw_data(size, kappa, draw)
        top = self.largest_curvature() / kappa
        many = uniform(draw) < 0.5
        self.penalty = top * 10 ** torch.rand(len(self.start), generator=draw) if many else torch.tensor(top)

    def lower_curvature(self, hparams: Mapping[str, Tensor]) -> float:
        """What the user declares: the smallest penalty."""
        return float(self.penalty.min())

    def draw_data(self, size: int, kappa: float, draw: torch.Generator) -> None:
        """Features with a given spectrum in random axes, a linear signal, noise."""
        axes = torch.linalg.qr(torch.randn(size, size, generator=draw))[0]
        variances = spectrum(size, kappa, draw)
        number = int(size * uniform(draw, 0.5, 4)) + 5
        num_val = max(number // 2, 10)
        self.inputs, self.val_inputs = (
            (torch.randn(rows, size, generator=draw) * variances.sqrt()) @ axes.T for rows in (number, num_val)
        )
        truth = axes @ (torch.randn(size, generator=draw) / (variances * size).sqrt().clamp(min=1e-3))
        signal, val_signal = self.inputs @ truth, self.val_inputs @ truth
        scale, noise = signal.std(), 10 ** uniform(draw, -1, 0)
        self.targets = self.label(signal / scale + noise * torch.randn(number, generator=draw))
        self.val_targets = self.label(val_signal / scale + noise * torch.randn(num_val, generator=draw))
        self.start = torch.zeros(size)

    def largest_curvature(self) -> float:
        """Of the training loss without penalty."""
        return float(torch.linalg.matrix_norm(self.inputs, 2) ** 2) / len(self.inputs)

    def label(self, value: Tensor) -> Tensor:
        """Targets from the noisy signal."""
        return value

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Half the mean squared error."""
        return 0.5 * (outputs - targets).square().mean()

    def predict(self, w: Tensor, inputs: Tensor) -> Tensor:
        """The model."""
        return inputs @ w

    def init_hparams(self) -> TensorDict:
        """The penalty."""
        return {"penalty": self.penalty}

    def init_params(self, hparams: Mapping[str, Tensor]) -> TensorDict:
        """Where the inner solver starts."""
        return {"w": self.start}

    def inner_loss(self, params: Mapping[str, Tensor], hparams: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Training loss and penalty."""
        penalty = 0.5 * (hparams["penalty"] * params["w"].square()).sum()
        return self.loss(self.predict(params["w"], self.inputs), self.targets) + penalty

    def outer_loss(self, params: Mapping[str, Tensor], hparams: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Validation loss."""
        return self.loss(self.predict(params["w"], self.val_inputs), self.val_targets)


class Logistic(Regression):
    """Logistic loss of a linear model."""

    def largest_curvature(self) -> float:
        """At zero."""
        return super().largest_curvature() / 4

    def label(self, value: Tensor) -> Tensor:
        """-1 and 1."""
        return value.sign()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Logistic."""
        return functional.softplus(-outputs * targets).mean()


class Network(Regression):
    """Squared error of a tanh network with one hidden layer, its weights ravelled; damped by the penalty."""

    warm = True  # starts from the solution for another penalty, as in an outer loop

    def draw_data(self, size: int, kappa: float, draw: torch.Generator) -> None:
        """A noisy teacher of the same size."""
        self.fan_in = int(torch.randint(2, 9, (), generator=draw))
        self.width = max(2, round((size - 1) / (self.fan_in + 2)))
        size = self.width * (self.fan_in + 2) + 1
        scales = 10 ** -torch.rand(self.fan_in, generator=draw)
        self.inputs, self.val_inputs = (
            torch.randn(rows, self.fan_in, generator=draw) * scales for rows in (2 * size, size)
        )
        teacher, noise = torch.randn(size, generator=draw), 10 ** uniform(draw, -1, 0)
        signal, val_signal = self.predict(teacher, self.inputs), self.predict(teacher, self.val_inputs)
        self.targets = signal / signal.std() + noise * torch.randn(2 * size, generator=draw)
        self.val_targets = val_signal / signal.std() + noise * torch.randn(size, generator=draw)
        self.start = torch.randn(size, generator=draw) / math.sqrt(self.fan_in)

    def largest_curvature(self) -> float:
        """At the start."""
        hessian = torch.func.hessian(lambda w: self.loss(self.predict(w, self.inputs), self.targets))(self.start)
        return float(torch.linalg.eigvalsh(hessian)[-1])

    def predict(self, w: Tensor, inputs: Tensor) -> Tensor:
        """Input weights, hidden biases, output weights, output bias."""
        first, bias, last, shift = w.split([self.width * self.fan_in, self.width, self.width, 1])
        return (inputs @ first.reshape(self.fan_in, self.width) + bias).tanh() @ last + shift


PROBLEMS: dict[str, type[Regression]] = {"ridge": Regression, "logistic": Logistic, "MLP": Network}


@dataclass(frozen=True)
class Truth:
    """The exact solution and hypergradient.

    Attributes:
        params: where.
        gradient: the hypergradient, ravelled.
        eigenvalues: of the Hessian, ascending.
        stationarity: what rounding has left of the gradient.
    """

    params: Tensor
    gradient: Tensor
    eigenvalues: Tensor
    stationarity: float


def descend(flat: FlatProblem, params: Tensor, hparams: TensorDict, num_steps: int) -> tuple[Linearisation, Tensor]:
    """Newton's method with a dense Hessian, its negative eigenvalues reflected, and a line search, as far as it goes."""
    objective = flat.objective(None)
    for _ in range(num_steps):
        at = linearise(flat, LBFGS(), params, hparams)
        matrix = as_matrix(at.operator)
        gradient = at.optimality.detach()
        values, vectors = torch.linalg.eigh(matrix)
        step = vectors @ ((vectors.T @ gradient) / values.abs().clamp(min=1e-12 * float(values.abs().max())))
        for halvings in range(20):
            trial = params - 0.5**halvings * step
            value, slope = objective.value_and_gradient(trial, hparams)
            change, slack = float(value) - at.inner_loss, 1e-13 * abs(at.inner_loss)
            lower = change < -slack and change <= -1e-4 * 0.5**halvings * float(gradient @ step)
            if lower or (change <= slack and float(slope.norm()) < 0.9 * float(gradient.norm())):
                break
        else:
            break
        params = trial
    return at, matrix


def truth_near(flat: FlatProblem, params: Tensor, hparams: TensorDict) -> Truth:
    """Solve to rounding, and differentiate there by a dense solve."""
    at, matrix = descend(flat, params, hparams, 100)
    _, rhs, direct = outer_gradients(flat, at.params, hparams, StepBatches(flat.problem, 0))
    adjoint = torch.linalg.solve(matrix, rhs)
    gradient = direct["penalty"] - at.mixed(adjoint)["penalty"]
    values = torch.linalg.eigvalsh(matrix)
    return Truth(at.params.detach(), gradient.reshape(-1), values, float(at.optimality.detach().norm()))
