"""Products and seconds until a hypergradient is right to 1e-3, on an ill-conditioned network.

    python -m benchmarks.time_to_accuracy       (eight minutes; peers take part when installed: the extra `peers`)

The digits on a 64-64-64-10 network with one weight decay for each of its 8,970 parameters, all exp(-9); the inner problem is
solved in float64 by L-BFGS with a long history, whose curvature pairs one of the preconditioners uses. The truth is a dense
Cholesky solve. Two figures for each way: the fewest products of a solve whose hypergradient is right to 1e-3, which
only somebody who knows the truth can stop at, and the products to a residual of 1e-8. The latter is what plain conjugate
gradient has to be asked for here: the smallest eigenvalue is some 1e-6 of the largest, and the residual that bounds the
error by 1e-3 is smaller than the wanted error by as much. The claims about products compare with that; the shares of the
products at which plain conjugate gradient happens to be right are in the table beside it. Set-up is counted in all.

The race is run in float64 and, from the same inner solution rounded, in float32: there a product costs half, the accuracy
is still within reach, and rounding costs plain conjugate gradient many more steps than a preconditioned one. Everybody's
fastest way in either precision counts. The peers are given, as number of steps, what plain conjugate gradient needs for
1e-3 in that precision: they are stopped by the truth, too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor

from benchmarks.common import Claim, Row, finish, interleaved, parse, table
from benchmarks.hypergradient import difference
from benchmarks.peers import PEERS, Hypergradient, versions
from benchmarks.task import Task, WeightDecay, draw_weights
from bilevel.batches import StepBatches
from bilevel.data import load_digits
from bilevel.flat import FlatProblem, natural_hparams
from bilevel.hypergradient.outer import outer_gradients
from bilevel.linalg import ConjugateGradient, DenseCholesky
from bilevel.linearisation import Linearisation, linearise, linearise_compiled
from bilevel.preconditioner import EKFAC, KFAC, LBFGSPairs, NoPreconditioner, Nystrom, Preconditioner, Prepared
from bilevel.solvers import LBFGS, InnerSolution, run
from bilevel.tree import TensorDict

ACCURACY = 1e-3
SAFE = 1e-8
MOST = 20_000  # steps
WIDTHS = (64, 64, 64, 10)
OURS, PLAIN, NYSTROM = "bilevel", "conjugate gradient", "Nystrom"
EAGER, COMPILED = "", ", compiled"
WAYS: dict[str, Preconditioner] = {
    PLAIN: NoPreconditioner(),
    NYSTROM: Nystrom(rank=100),
    "K-FAC": KFAC(),
    "EKFAC": EKFAC(),
    "L-BFGS pairs": LBFGSPairs(),
    "L-BFGS pairs on Nystrom": LBFGSPairs(Nystrom(rank=50)),
    "L-BFGS pairs on K-FAC": LBFGSPairs(KFAC()),
}
RACED = (PLAIN, NYSTROM, "K-FAC", "EKFAC")  # not with pairs, whose application costs more than a product


class Digits(WeightDecay):
    """The task's problem on scikit-learn's digits."""

    def __init__(self, widths: tuple[int, ...], decay: float, seed: int) -> None:
        """Split the data, and draw the starting weights."""
        train, validation, _ = load_digits(0)
        self.train_inputs, self.train_labels = train.x, train.y
        self.val_inputs, self.val_labels = validation.x, validation.y
        self.decay, self.start = decay, draw_weights(widths, torch.Generator().manual_seed(seed))

    def init_hparams(self) -> TensorDict:
        """The same decay everywhere."""
        return {name: torch.full_like(value, self.decay) for name, value in self.start.items()}


@dataclass
class Case:
    """The solved problem with its exact hypergradient.

    Attributes:
        task: what peers are given.
        inner: the inner solve, for the preconditioner that is made of it.
        truth: the exact hypergradient, in float64.
        flat: its problem between vectors.
        at: the inner problem at its solution.
    """

    task: Task
    inner: InnerSolution
    truth: TensorDict = field(default_factory=dict)
    flat: FlatProblem = field(init=False)
    at: Linearisation = field(init=False)

    def __post_init__(self) -> None:
        """Linearise, and solve densely where the truth is not known."""
        self.flat = FlatProblem.of(self.task.problem, self.task.decay)
        self.at = linearise(self.flat, LBFGS(), self.inner.params, self.task.decay)
        if self.truth:
            return
        solver = DenseCholesky(max_size=len(self.inner.params))
        state = solver.init(self.at.operator)
        solution = solver.compute(state, self.by_params())
        assert solution.successful, "the inner solution is no minimum: another seed, or a tighter inner tolerance"
        self.truth = {name: -part for name, part in self.at.mixed(solution.value).items()}

    @classmethod
    def make(cls, widths: tuple[int, ...], decay: float, history: int, seed: int, device: str) -> Case:
        """Draw and train."""
        problem = Digits(widths, decay, seed)
        problem.to(device, torch.float64)
        hparams = natural_hparams(problem)
        flat = FlatProblem.of(problem, hparams)
        with torch.no_grad():
            solver = LBFGS(max_steps=20_000, atol=1e-8, history=history)
            inner = run(solver, flat.objective(None), flat.start(hparams), hparams)
        assert inner.result.successful, f"the inner problem is not solved: {inner.result}"
        params = {name: value.clone() for name, value in flat.unravel(inner.params).items()}
        return cls(Task(problem, params, hparams), inner)

    def single(self) -> Case:
        """The same problem and solution rounded to float32; the truth stays."""
        inner = replace(self.inner, params=self.inner.params.float())
        return Case(self.task.cast(torch.float32), inner, self.truth)

    def by_params(self) -> Tensor:
        """The right-hand side."""
        _, by_params, _ = outer_gradients(
            self.flat, self.inner.params, self.task.decay, StepBatches(self.task.problem, 0)
        )
        return by_params

    def hypergradient(self, way: Preconditioner, rtol: float | None, max_steps: int, compiled: bool = False) -> Answer:
        """All that a hypergradient takes after the inner solve: outer gradient, linearisation, set-up, solve, mixed product."""
        by_params = self.by_params()
        make = linearise_compiled if compiled else linearise
        at = make(self.flat, LBFGS(), self.inner.params, self.task.decay)
        prepared = way.build(at, self.inner)
        solver = ConjugateGradient(rtol=rtol, max_steps=max_steps)
        solution = solver.compute(solver.init(at.operator), by_params, preconditioner=prepared.operator)
        gradient = {name: -part for name, part in at.mixed(solution.value).items()}
        return Answer(gradient, prepared, int(solution.num_mv))

    def timed(self, way: Preconditioner, steps: int, compiled: bool) -> Hypergradient:
        """As a peer's function."""
        return lambda: self.hypergradient(way, None, steps, compiled).gradient

    def error(self, gradient: TensorDict) -> float:
        """Relative to the truth."""
        return difference(self.truth, {name: value.double() for name, value in gradient.items()})


@dataclass(frozen=True)
class Answer:
    """A hypergradient and what it took."""

    gradient: TensorDict
    prepared: Prepared
    num_mv: int


def fewest(case: Case, way: Preconditioner) -> tuple[int, float]:
    """The fewest steps whose hypergradient is right to `ACCURACY`, by doubling and halving, and its error."""

    def error(steps: int) -> float:
        return case.error(case.hypergradient(way, None, steps).gradient)

    high = 16
    while error(high) > ACCURACY:
        high *= 2
        assert high <= MOST, "this way does not reach the accuracy in this precision"
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error(middle) <= ACCURACY else (middle, high)
    return high, error(high)


def count(case: Case) -> list[Row]:
    """Products of every way."""
    rows: list[Row] = []
    for name, way in WAYS.items():
        steps, error = fewest(case, way)
        safe = case.hypergradient(way, SAFE, MOST)
        setup = safe.prepared.num_mv
        rows.append({"way": name, "set-up": setup, "products to 1e-3": setup + steps, "error": error,
                     "products to residual 1e-8": setup + safe.num_mv})  # fmt: skip
        print(f"{name}: {setup} + {steps}", file=sys.stderr)
    plain = rows[0]
    for row in rows[1:]:
        row["share of plain"] = row["products to 1e-3"] / plain["products to 1e-3"]
        row["share of plain, safe"] = row["products to 1e-3"] / plain["products to residual 1e-8"]
    return rows


def race(cases: Sequence[Case], rounds: int, device: str) -> list[Row]:
    """Wall time of the whole hypergradient, set-up included, of all that reach the accuracy; rows for the others."""
    runners: dict[str, tuple[Row, Case, Hypergradient]] = {}
    missing: list[Row] = []
    for case in cases:
        precision = str(case.at.params.dtype).removeprefix("torch.")
        steps = {name: fewest(case, WAYS[name])[0] for name in RACED}
        for name, kind in product(RACED, (EAGER, COMPILED)):
            row = {"library": f"{OURS}, {name}{kind}", "precision": precision, "steps": steps[name]}
            runners[f"{row['library']}, {precision}"] = row, case, case.timed(WAYS[name], steps[name], kind == COMPILED)
        for name, build in PEERS.items():
            row = {"library": name, "precision": precision, "steps": steps[PLAIN]}
            try:
                function = build(case.task, steps[PLAIN])
                error = case.error(function())
            except ImportError as reason:
                missing.append({**row, "note": f"not installed ({reason.name or reason})"})
                continue
            if error > 1.1 * ACCURACY:
                missing.append({**row, "error": error, "note": "does not reach 1e-3"})
            else:
                runners[f"{name}, {precision}"] = row, case, function
    seconds = interleaved({key: function for key, (_, _, function) in runners.items()}, rounds, device=device)
    found = [
        {**row, "ms": 1e3 * seconds[key], "error": case.error(function())}
        for key, (row, case, function) in runners.items()
    ]
    return found + missing


def main(argv: list[str] | None = None) -> int:
    """Count, race, judge."""
    options = parse(str(__doc__).splitlines()[0], argv)
    if options.quick:
        case = Case.make((64, 8, 10), math.exp(-5), 50, 0, options.device)
    else:
        case = Case.make(WIDTHS, math.exp(-9), 300, 0, options.device)
    rows = count(case)
    print(table(rows))
    times = race([case, case.single()], 1 if options.quick else 5, options.device)
    print()
    print(table(times))
    by_way = {row["way"]: row for row in rows}
    ours = [row["ms"] for row in times if row["library"].startswith(OURS)]
    theirs = [row["ms"] for row in times if row["library"] in PEERS and "ms" in row]
    claims = [
        Claim("products with Nystrom over plain conjugate gradient's to the safe residual",
              by_way[NYSTROM]["share of plain, safe"], 1 / 3),
        Claim("products with K-FAC over plain conjugate gradient's to the safe residual",
              by_way["K-FAC"]["share of plain, safe"], 1 / 5),
        Claim("the fastest peer's time over ours at the same error", min(theirs) / min(ours) if theirs else None, 3.0,
              at_least=True),
    ]  # fmt: skip
    facts = {"inner steps": case.inner.num_steps, "stationarity": float(case.inner.stationarity), "peers": versions()}
    return finish(options, [*rows, *times], claims, facts)


if __name__ == "__main__":
    sys.exit(main())
