"""What receipts and frozen evaluation add to an outer step of the experiment digits_mlp.

    python -m benchmarks.overhead

Two loops make the experiment's outer steps in turns: the trainer's own, and a bare one that solves, differentiates and
steps the optimiser on the problem's plain functions, with no receipt, record, policy or freezing. The error estimate is
left out, and the linear solver is MINRES, so that both loops can make the same arithmetic.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.common import Claim, Row, experiment_parts, finish, parse, table
from bilevel.batches import StepBatches
from bilevel.errors import ConvergenceWarning
from bilevel.flat import FlatProblem
from bilevel.hypergradient import Implicit
from bilevel.linalg import MINRES
from bilevel.linearisation import linearise
from bilevel.purity import Purity
from bilevel.solvers import run
from bilevel.trainer import Trainer, TrainState
from bilevel.trainer.setup import Setup, set_up
from bilevel.tree import detach

TARGET = 1.05
LINEAR = MINRES(rtol=1e-3, max_steps=200)


class Unfrozen(Purity):
    """Nothing is frozen: functions are handed back as they came."""

    def solve(self) -> Any:
        """No solve."""
        return nullcontext()

    def freeze(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function itself."""
        return function


@dataclass
class Bare:
    """An outer loop with nothing around the arithmetic."""

    problem: FlatProblem
    setup: Setup
    state: TrainState

    def step(self) -> None:
        """Solve, differentiate, step."""
        natural = self.setup.natural(self.state.raw)
        hparams = detach(natural)
        batches = StepBatches(self.problem.problem, self.state.step)
        with torch.no_grad():
            params = run(self.setup.solver, self.problem.objective(None), self.state.params, hparams).params
        with torch.enable_grad():
            leaf = params.detach().requires_grad_()
            loss = self.problem.outer_loss(leaf, hparams, batches.outer)
            (by_params,) = torch.autograd.grad(loss, leaf)
        at = linearise(self.problem, self.setup.solver, params, hparams)
        adjoint = LINEAR.compute(LINEAR.init(at.operator), by_params).value
        mixed = at.mixed(adjoint)
        raw = list(self.state.raw.values())
        parts = torch.autograd.grad(list(natural.values()), raw, [-mixed[name] for name in natural])
        for value, part in zip(raw, parts, strict=True):
            value.grad = part
        self.state.outer.step(float(loss.detach()))
        self.state.params = params
        self.state.step += 1


def prepare() -> tuple[Setup, TrainState]:
    """The experiment's parts, fresh."""
    parts = experiment_parts("digits_mlp")
    method = Implicit(linear_solver=LINEAR, error_estimate=None)
    return set_up(parts.problem, parts.solver, method, parts.optimizer, parts.scheduler)


def measure(num_steps: int) -> list[Row]:
    """Both loops in turns, who goes first changing from step to step."""
    setup, state = prepare()
    bare_setup, bare_state = prepare()
    flat = replace(bare_setup.problem, purity=Unfrozen(bare_setup.problem.purity.holdings))
    trainer, bare = Trainer(num_steps=num_steps), Bare(flat, bare_setup, bare_state)
    seconds: dict[str, list[float]] = {"trainer": [], "bare": []}
    functions: dict[str, Callable[[], Any]] = {"trainer": lambda: trainer.step(setup, state), "bare": bare.step}
    for number in range(num_steps):
        for name in ("trainer", "bare") if number % 2 else ("bare", "trainer"):
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)
    gap = max(float((state.raw[name] - value).detach().abs().max()) for name, value in bare_state.raw.items())
    ratios = [ours / plain for ours, plain in zip(seconds["trainer"], seconds["bare"], strict=True)]
    return [
        {"loop": name, "ms a step (median)": 1e3 * statistics.median(values), "ms in all": 1e3 * sum(values)}
        for name, values in seconds.items()
    ] + [{"loop": "ratio of a step (median)", "ratio": statistics.median(ratios), "difference of hyperparameters": gap}]


def main(argv: list[str] | None = None) -> int:
    """Measure."""
    options = parse(str(__doc__).splitlines()[0], argv, device=False)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)  # the experiment's inner solves are cut short
    torch.set_default_dtype(torch.float64)
    rows = measure(4 if options.quick else 30)
    print(table(rows))
    ratio, gap = rows[-1]["ratio"], rows[-1]["difference of hyperparameters"]
    claims = [
        Claim("an outer step of digits_mlp with receipts and frozen evaluation over one without", ratio, TARGET),
        Claim("difference of the hyperparameters after all steps", gap, 0.0),
    ]
    return finish(options, rows, claims)


if __name__ == "__main__":
    sys.exit(main())
