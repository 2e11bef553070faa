"""Penalties of sparse models: LassoCV's optimum, what only the support costs, and sparho's outer loop beside ours.

    python -m benchmarks.sparse_penalties          (sparho takes part where it is installed: pip install sparho==0.2.0 celer)

Three things. Ten outer steps of `experiment=sparse_penalties` on several designs, beside the least cross-validated error of
scikit-learn's `LassoCV` with its 100 penalties, and both times. One hypergradient, without its inner solve, with 1,000
features, and with 9,000 more that no penalty here lets in: the support is the same. And ten outer steps on genes and on words,
beside `sparho.hoag_search` from the same starting penalty on the same five folds, with warm starts, with each of its solvers
that is installed; sparho's targets and features are centred as a whole, ours fold by fold, which moves losses of squared
errors a little.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse import csc_array

from benchmarks.common import Claim, Row, finish, interleaved, parse, table
from benchmarks.peers import versions
from bilevel import Fit, fit
from bilevel.hypergradient import Implicit
from bilevel.hypergradient.method import solve_without_graph
from bilevel.hypergradient.outer import outer_gradients
from bilevel.hypergradient.support import around
from bilevel.hypergradient.trial import first_look, starting_hparams
from bilevel.linalg import DenseCholesky, linear_solve
from bilevel.linearisation import linearise
from bilevel.problems import GlossDesign, KhanDesign, LeastSquares, Logistic, RandomDesign, SparsePenalties
from bilevel.problems.sparse_designs import Design, Source
from bilevel.problems.sparse_penalties import LinearModel as Model
from bilevel.solvers import ProximalNewton, SoftThreshold
from bilevel.sparse import SparseMatrix
from bilevel.trainer.optimizer import OptimizerFactory

NUM_STEPS = 10
SOLVER = ProximalNewton(200, 1e-8, proximal=SoftThreshold("penalty"))
METHOD = Implicit(linear_solver=DenseCholesky(), error_estimate=None)


def quasi_newton(raw: list[torch.Tensor]) -> torch.optim.Optimizer:
    """As shipped."""
    return torch.optim.LBFGS(raw, lr=1.0, max_iter=1)


def adam(raw: list[torch.Tensor]) -> torch.optim.Optimizer:
    """Steps of bounded length, as sparho's are."""
    return torch.optim.Adam(raw, lr=0.3, betas=(0.7, 0.95))


def tuned(problem: SparsePenalties, optimizer: OptimizerFactory = quasi_newton) -> tuple[Fit, float]:
    """Ten outer steps, and their seconds."""
    start = time.perf_counter()
    fitted = fit(
        problem,
        solver=SOLVER,
        hypergradient=METHOD,
        optimizer=optimizer,
        num_steps=NUM_STEPS,
    )
    return fitted, time.perf_counter() - start


def losses(fitted: Fit) -> list[float]:
    """Of the outer steps."""
    return [record["outer_loss"] for record in fitted.history]


def beside_lasso_cv(design: RandomDesign) -> Row:
    """The least error that each finds, and the step at which ours is within 1e-4."""
    from sklearn.linear_model import LassoCV

    x, y, _ = design.load()
    assert isinstance(x, torch.Tensor)
    start = time.perf_counter()
    path = LassoCV(cv=5, max_iter=100_000, tol=1e-6).fit(x.numpy(), y.numpy()).mse_path_
    theirs, best = time.perf_counter() - start, float(path.mean(1).min())
    fitted, seconds = tuned(SparsePenalties(design))
    excess = [loss / best - 1 for loss in losses(fitted)]
    return {
        "what": f"{design.num_examples} x {design.num_features}, seed {design.seed}",
        "LassoCV's least": best,
        "ours over it, less 1": min(excess),
        "step within 1e-4": next((step for step, value in enumerate(excess) if value <= 1e-4), None),
        "seconds": seconds,
        "LassoCV's seconds": theirs,
    }


class Padded(Source):
    """A design with further features that are too small to be let in."""

    def __init__(self, design: RandomDesign, more: int) -> None:
        """So many more."""
        self.design, self.more = design, more

    def load(self) -> Design:
        """The further ones at the end."""
        x, y, _ = self.design.load()
        assert isinstance(x, torch.Tensor)
        noise = torch.randn(len(y), self.more, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        return Design(torch.cat([x, 0.01 * noise], 1), y)


def derivative_alone(problem: SparsePenalties) -> tuple[Callable[[], Any], int]:
    """The hypergradient at a solution, and how many weights of all folds are not zero there."""
    hparams = starting_hparams(problem)
    flat, solver, start, batches, _ = first_look(problem, SOLVER, METHOD, hparams)
    inner = solve_without_graph(flat, solver, start, hparams, batches, False)
    here = around(flat, solver, inner, hparams, None)  # looks at the gradient of all features once, for kinks

    def derivative() -> Any:
        _, by_params, direct = outer_gradients(here.problem, here.params, hparams, batches)
        at = linearise(here.problem, here.solver, here.params, hparams)
        adjoint = linear_solve(at.operator, by_params, DenseCholesky()).value
        return {name: direct[name] - part for name, part in at.mixed(adjoint).items()}

    return derivative, len(here.params)


def support_costs(quick: bool) -> list[Row]:
    """Seconds of the derivative for several supports, with and without the further features."""
    design = RandomDesign(num_features=100 if quick else 1000)
    functions, sizes = {}, {}
    for share in (0.3, 0.1, 0.03):
        for more in (0, 900 if quick else 9000):
            problem = SparsePenalties(Padded(design, more), start=share)
            functions[(share, more)], sizes[(share, more)] = derivative_alone(problem)
    seconds = interleaved({str(key): function for key, function in functions.items()}, 2 if quick else 9)
    return [
        {"what": f"{design.num_features + more:,} features", "in the support": sizes[(share, more)],
         "derivative, ms": 1e3 * seconds[str((share, more))],
         "over fewer features": seconds[str((share, more))] / seconds[str((share, 0))]}
        for share, more in functions
    ]  # fmt: skip


def sparho_adapters(model: Model) -> dict[str, Any]:
    """Its solvers of a model that can be imported, by name."""
    from sparho import adapters

    if isinstance(model, Logistic):
        return {"scikit-learn": adapters.SklearnLogisticRegression(tol=1e-6)}
    found = {"scikit-learn": adapters.SklearnLasso(tol=1e-8)}
    try:
        import celer  # noqa: F401

        found["celer"] = adapters.CelerLasso(tol=1e-8)
    except ImportError:
        pass
    return found


def by_sparho(problem: SparsePenalties, design: Design, model: Model, solver: Any) -> tuple[float, float]:
    """Its least loss in ten outer steps, and their seconds."""
    import sparho

    x, y = design.x, design.y.numpy()
    if isinstance(x, SparseMatrix):
        rows = x.rows
        features: Any = csc_array(
            (x.columns.values().numpy(), x.columns.col_indices().numpy(), x.columns.crow_indices().numpy()),
            shape=tuple(rows.shape),
        )
    else:
        features = np.asfortranarray(x.numpy())
    logistic = isinstance(model, Logistic)
    inner = sparho.Problem(
        sparho.LogisticLoss() if logistic else sparho.SquaredLoss(),
        sparho.L1(),
        features,
        y if logistic else y - y.mean(),
    )
    base = sparho.HeldOutLogistic if logistic else sparho.HeldOutMSE
    numbers = [[np.flatnonzero(part[fold]) for part in (problem.train, problem.validation)] for fold in range(5)]
    folds = sparho.CrossVal(tuple((train, held_out) for train, held_out in numbers), base, warm_start=not logistic)
    penalty = problem.start_share * problem.largest * (0.8 * len(y) if logistic else 1.0)  # its logistic loss is a sum
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sparho.hoag_search(inner, penalty, solver=solver, criterion=folds, n_iter=NUM_STEPS, inner_tol=1e-6)
    return min(record.value for record in found.history), time.perf_counter() - start


def beside_sparho(name: str, source: Source, model: Model) -> list[Row]:
    """Seconds of ten outer steps, and the least loss in them."""
    design, problem = source.load(), SparsePenalties(source, model, split_seed=0)
    fitted, seconds = tuned(problem, adam)
    rows: list[Row] = [
        {"what": f"{name}: ours", "seconds": seconds, "least loss": min(losses(fitted)),
         "weights of a fold": fitted.history[-1]["metrics.num_nonzero"]}
    ]  # fmt: skip
    try:
        adapters = sparho_adapters(model)
    except ImportError as error:
        print(f"sparho takes no part: {error}", file=sys.stderr)
        return rows
    for solver, adapter in adapters.items():
        loss, theirs = by_sparho(problem, design, model, adapter)
        rows.append(
            {
                "what": f"{name}: sparho, {solver}",
                "seconds": theirs,
                "least loss": loss,
                "ours over it": seconds / theirs,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure and judge."""
    options = parse(str(__doc__).splitlines()[0], argv, device=False)
    sizes = [(60, 80)] if options.quick else [(200, 1000), (100, 300), (400, 2000)]
    tuned(SparsePenalties(RandomDesign(40, 50)))  # what is imported at the first call
    cv = [beside_lasso_cv(RandomDesign(*size, seed=seed)) for seed, size in enumerate(sizes)]
    print(table(cv), end="\n\n", flush=True)
    support = support_costs(options.quick)
    print(table(support), end="\n\n", flush=True)
    texts = 300 if options.quick else 10_000
    cases = {
        "genes, least squares": (KhanDesign(), LeastSquares()),
        "genes, logistic": (KhanDesign(), Logistic()),
        "words, logistic": (GlossDesign(num_texts=texts), Logistic()),
        "words, least squares": (GlossDesign(num_texts=texts), LeastSquares()),
    }
    peers: list[Row] = []
    for name, (source, model) in cases.items():
        peers += beside_sparho(name, source, model)
        print(table(peers), end="\n\n", flush=True)
    over = {row["what"]: row.get("ours over it") for row in peers}
    claims = [
        Claim(
            "LassoCV's optimum in ten steps, largest relative excess",
            max(row["ours over it, less 1"] for row in cv),
            1e-4,
        ),
        Claim(
            "ten times the features, same support: derivative over",
            max(row["over fewer features"] for row in support),
            1.25,
        ),
        *(
            Claim(f"{name}: wall time over sparho's with scikit-learn", over.get(f"{name}: sparho, scikit-learn"), 1.0)
            for name in cases
        ),
    ]
    return finish(options, [*cv, *support, *peers], claims, {"peers": versions(["sparho", "celer", "scikit-learn"])})


if __name__ == "__main__":
    sys.exit(main())
