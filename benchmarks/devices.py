"""Every hypergradient method on an accelerator beside the CPU: the same numbers, and the time of each.

    python -m benchmarks.devices --device cuda          (two minutes)

`experiment=digits_mlp`'s network in float64, one hypergradient from its start: products, sketches, factors, compiled
products, recorded steps. The theorem's methods differentiate at a solution, the others through a fixed number of steps.
"""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import torch

from benchmarks.common import Claim, Row, finish, parse, table
from bilevel.errors import ConvergenceWarning
from bilevel.hypergradient import (
    SAMA,
    Evaluation,
    FiniteDifference,
    FixedAccuracy,
    ForwardMode,
    HypergradientMethod,
    Implicit,
    ImplicitUpdate,
    OneStep,
    Unrolled,
    hypergradient_at,
)
from bilevel.linalg import GMRES, MINRES, AutoSolver, ConjugateGradient, DenseCholesky, IdentitySolver, NeumannSeries
from bilevel.preconditioner import KFAC, Jacobi, LBFGSPairs, Nystrom
from bilevel.problems import DigitsMLP
from bilevel.solvers import LBFGS, Adam, GradientDescent, InnerSolver
from bilevel.tree import Layout

SAME = 1e-6  # relative: rounding, enlarged by the condition number
CG = ConjugateGradient(rtol=1e-8)
DESCENT = GradientDescent(learning_rate=0.3, max_steps=20, atol=0.0)
SOLVED = LBFGS(max_steps=500, atol=1e-10, history=50)

# For each row the method, the inner solver, and how the penalties are shared.
METHODS: dict[str, tuple[HypergradientMethod, InnerSolver, str]] = {
    "implicit_auto": (
        Implicit.auto(accuracy=FixedAccuracy(), linear_solver=AutoSolver(rtol=1e-8)), SOLVED, "per_weight",
    ),
    "implicit_cg": (Implicit(linear_solver=CG), SOLVED, "per_weight"),
    "implicit_cg, compiled": (Implicit(linear_solver=CG, compile=True), SOLVED, "per_weight"),
    "implicit_minres": (Implicit(linear_solver=MINRES(rtol=1e-8)), SOLVED, "per_weight"),
    "implicit_neumann": (Implicit(linear_solver=NeumannSeries(rtol=None, max_steps=50)), SOLVED, "per_weight"),
    "implicit_dense_cholesky": (
        Implicit(linear_solver=DenseCholesky(), error_estimate=None), SOLVED, "per_weight",
    ),
    "implicit_identity": (Implicit(linear_solver=IdentitySolver()), SOLVED, "per_weight"),
    "preconditioner=jacobi": (Implicit(linear_solver=CG, preconditioner=Jacobi()), SOLVED, "per_weight"),
    "preconditioner=nystrom": (Implicit(linear_solver=CG, preconditioner=Nystrom()), SOLVED, "per_weight"),
    "preconditioner=kfac": (Implicit(linear_solver=CG, preconditioner=KFAC()), SOLVED, "per_weight"),
    "preconditioner=lbfgs_pairs": (Implicit(linear_solver=CG, preconditioner=LBFGSPairs()), SOLVED, "shared"),
    "implicit_update": (ImplicitUpdate(linear_solver=GMRES(rtol=None, max_steps=20)), DESCENT, "per_weight"),
    "sama": (SAMA(), Adam(max_steps=20, atol=0.0), "per_weight"),
    "unrolled": (Unrolled(), DESCENT, "per_weight"),
    "forward": (ForwardMode(), DESCENT, "per_tensor"),
    "one_step": (OneStep(), DESCENT, "per_weight"),
    "finite_difference": (FiniteDifference(), SOLVED, "per_weight"),}  # fmt: skip


def evaluate(name: str, device: str) -> tuple[Evaluation, float]:
    """One hypergradient on a device, and the seconds of a second one."""
    method, solver, penalty = METHODS[name]
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    problem = DigitsMLP(hidden=[32], start=0.1, penalty=penalty).to(device, torch.float64)

    def once() -> Evaluation:
        return hypergradient_at(problem, method=method, solver=solver)

    found = once()
    wait()
    begun = time.perf_counter()
    once()
    wait()
    return found, time.perf_counter() - begun


def compare(name: str, device: str) -> Row:
    """A method on both devices."""
    (here, seconds), (there, others) = evaluate(name, "cpu"), evaluate(name, device)
    layout = Layout.of(here.gradient)
    expected, found = layout.ravel(here.gradient), layout.ravel(there.gradient)
    row: dict[str, Any] = {
        "method": name, "device": str(found.device), "difference": float((found.cpu() - expected).norm() / expected.norm()),
        "ms": 1e3 * others, "ms on the CPU": 1e3 * seconds, "products": there.receipt.products,
        "products on the CPU": here.receipt.products,
    }  # fmt: skip
    if there.receipt.fallback is not None:
        row["note"] = there.receipt.fallback
    return row


def main(argv: list[str] | None = None) -> int:
    """Both devices, method by method."""
    options = parse(str(__doc__).splitlines()[0], argv)
    warnings.simplefilter("ignore", ConvergenceWarning)
    torch.set_num_threads(1)  # as the experiment does: small tensors
    names = list(METHODS)[:2] if options.quick else list(METHODS)
    rows = [compare(name, options.device) for name in names]
    print(table(rows))
    worst = max(row["difference"] for row in rows)
    return finish(options, rows, [Claim("largest relative difference from the CPU's hypergradient", worst, SAME)])


if __name__ == "__main__":
    sys.exit(main())
