"""Peak memory of one meta-step against the number of inner steps: iMAML's is flat, MAML's grows by the step.

    python -m benchmarks.meta_memory          (writes benchmarks/results/meta_memory.png)

5-way 1-shot on the Omniglot network, 15 queries of a class, 16 tasks; five steps of conjugate gradient. Measured as
`benchmarks.memory` does: every point is a process of its own, and reports by how much the peak of its resident memory exceeded
that after one small meta-step.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.common import Claim, finish, parse
from benchmarks.memory import answered, fit, increments, plot, points
from benchmarks.meta_step import PRODUCTS, QUERY, TASKS, WAY, tasks
from bilevel import hypergradient_at
from bilevel.hypergradient import HypergradientMethod, Implicit, Unrolled
from bilevel.hypergradient.negative_curvature import Truncate
from bilevel.linalg import ConjugateGradient
from bilevel.meta import FewShot, ProximalFewShot
from bilevel.models import Conv4
from bilevel.solvers import GradientDescent

STEPS = {"implicit": (10, 100, 1000), "unrolled": (2, 4, 8, 16)}
QUICK_STEPS = {"implicit": (2, 4), "unrolled": (2, 4)}
MODULE = "benchmarks.meta_memory"
PICTURE = Path(__file__).parent / "results" / "meta_memory.png"


def seconds_of(name: str, num_steps: int, num_tasks: int) -> float:
    """Seconds of one meta-step."""
    kind = ProximalFewShot if name == "implicit" else FewShot
    problem = kind(tasks(QUERY), Conv4(WAY), num_tasks=num_tasks)
    method: HypergradientMethod = Unrolled()
    if name == "implicit":
        solver = ConjugateGradient(rtol=None, max_steps=PRODUCTS)
        method = Implicit(warm_start=False, linear_solver=solver, negative_curvature=Truncate(), error_estimate=None)
    begun = time.perf_counter()
    descent = GradientDescent(learning_rate=0.03, max_steps=num_steps, atol=0.0)
    found = hypergradient_at(problem, method=method, solver=descent)
    assert found.receipt.inner_steps == num_steps
    return time.perf_counter() - begun


def main(argv: list[str] | None = None) -> int:
    """Measure all points."""
    arguments = sys.argv[1:] if argv is None else argv
    if answered(arguments, seconds_of, small=1):
        return 0
    options = parse(str(__doc__).splitlines()[0], arguments, device=False)
    rows = points(MODULE, *((QUICK_STEPS, 2) if options.quick else (STEPS, TASKS)))
    if options.quick:
        return finish(options, rows, [])
    slope, _ = fit(rows)
    print(f"\nMAML grows by {slope:.1f} MB a step (fitted)")
    plot(rows, PICTURE, names=("iMAML", "MAML"))
    _, flat = increments(rows, "implicit")
    claims = [Claim("iMAML's memory at 1,000 inner steps over that at 10", flat[-1] / flat[0], 1.1)]
    return finish(options, rows, claims, {"MAML, MB a step": slope})


if __name__ == "__main__":
    sys.exit(main())
