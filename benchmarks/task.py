"""The problem of the hypergradient benchmark: an MLP, one weight decay for each parameter, the inner solution given."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bilevel.flat import FlatProblem, natural_hparams
from bilevel.problem import Problem
from bilevel.solvers import LBFGS, run
from bilevel.tree import TensorDict, to

DECAY = 1e-2  # with it the Hessian at the solution is positive definite, so that no library's CG ends early


def predict(params: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Logits of tanh layers; parameters alternate between weights `(out, in)` and biases."""
    values = list(params.values())
    hidden = inputs
    for weight, bias in zip(values[:-2:2], values[1:-2:2], strict=True):
        hidden = functional.linear(hidden, weight, bias).tanh()
    return functional.linear(hidden, values[-2], values[-1])


def penalty(params: Mapping[str, Tensor], decay: Mapping[str, Tensor]) -> Tensor:
    """`Σ decay_i w_i² / 2`."""
    terms = [(decay[name] * value.square()).sum() for name, value in params.items()]
    return 0.5 * torch.stack(terms).sum()


class WeightDecay(Problem):
    """Cross-entropy with one weight decay for each parameter, judged by the cross-entropy of a validation split."""

    def __init__(self, sizes: tuple[int, ...], num_examples: int) -> None:
        """Draw inputs, labels by a random network, and the starting weights."""
        draw = torch.Generator().manual_seed(0)
        self.start = draw_weights(sizes, draw)
        teacher = draw_weights(sizes, draw)
        self.train_inputs, self.val_inputs = torch.randn(2, num_examples, sizes[0], generator=draw).unbind()
        self.train_labels = predict(teacher, self.train_inputs).argmax(-1)
        self.val_labels = predict(teacher, self.val_inputs).argmax(-1)

    def init_hparams(self) -> TensorDict:
        """The same decay everywhere."""
        return {name: torch.full_like(value, DECAY) for name, value in self.start.items()}

    def init_params(self, hparams: Mapping[str, Tensor]) -> TensorDict:
        """Random weights."""
        return self.start

    def outputs(self, params: Mapping[str, Tensor], hparams: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Scores of the training examples."""
        return predict(params, self.train_inputs)

    def output_loss(self, outputs: Tensor, hparams: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Cross-entropy of each."""
        return functional.cross_entropy(outputs, self.train_labels, reduction="none")

    def penalty(self, params: Mapping[str, Tensor], hparams: Mapping[str, Tensor]) -> Tensor:
        """Weight decay."""
        return penalty(params, hparams)

    def outer_loss(self, params: Mapping[str, Tensor], hparams: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Validation loss."""
        return functional.cross_entropy(predict(params, self.val_inputs), self.val_labels)


def draw_weights(sizes: tuple[int, ...], draw: torch.Generator) -> TensorDict:
    """Weights of variance one over the fan-in, biases zero."""
    params: TensorDict = {}
    for number, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
        params[f"weight{number}"] = torch.randn(fan_out, fan_in, generator=draw) / fan_in**0.5
        params[f"bias{number}"] = torch.zeros(fan_out)
    return params


@dataclass(frozen=True)
class Task:
    """What every library is given: the same tensors.

    Attributes:
        problem: data and losses.
        params: the inner solution (as far as `num_steps` of L-BFGS went: every library differentiates the same point).
        decay: the hyperparameters.
    """

    problem: WeightDecay
    params: TensorDict
    decay: TensorDict

    @classmethod
    def make(cls, sizes: tuple[int, ...], num_examples: int, num_steps: int, device: str = "cpu") -> Task:
        """Draw the data in float32 and train."""
        problem = WeightDecay(sizes, num_examples)
        problem.to(device)
        decay = natural_hparams(problem)
        flat = FlatProblem.of(problem, decay)
        with torch.no_grad():
            solver = LBFGS(max_steps=num_steps, atol=0.0)
            solution = run(solver, flat.objective(None), flat.start(decay), decay).params
        return cls(problem, {name: value.clone() for name, value in flat.unravel(solution).items()}, decay)

    def cast(self, dtype: torch.dtype) -> Task:
        """The same task in another precision."""
        problem = copy.copy(self.problem).to(dtype=dtype)
        return Task(problem, to(self.params, dtype=dtype), to(self.decay, dtype=dtype))

    @property
    def name(self) -> str:
        """Its sizes."""
        widths = [
            self.problem.train_inputs.shape[1],
            *(len(value) for name, value in self.params.items() if "bias" in name),
        ]
        return f"{'-'.join(map(str, widths))}, n = {len(self.problem.train_inputs):,}"
