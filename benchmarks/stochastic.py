"""Stochastic methods beside the deterministic one on hyper-cleaning: what their weights are worth, after how many gradients.

    python -m benchmarks.stochastic                 (40 minutes; writes benchmarks/results/stochastic.png)

The deterministic method is the experiment `hyper_cleaning` as shipped, the others `hyper_cleaning_stochastic` with the settings
below. Methods differ in how close their params are to the inner solution, and some hold params that validation examples have
moved; so weights are compared by what is trained with them: the inner problem is solved anew to convergence, and its solution
judged on the test images (`trained anew`; `as they are` are the run's own params). What a run costs is counted in gradients of
single examples: inner gradients and products with the inner Hessian times the examples of an inner batch, with the products
of mixed derivatives, and evaluations of the outer loss times those of an outer batch.

PBGD-Free moves hyperparameters by the outer loss's direct derivative alone, which is zero for weights of training examples: it
has no row, since the library refuses it here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import Claim, Row, experiment_parts, finish, parse, table
from bilevel import fit
from bilevel.flat import FlatProblem
from bilevel.hypergradient import SOBA, HypergradientMethod
from bilevel.problems import HyperCleaning
from bilevel.solvers import LBFGS, run
from bilevel.tree import TensorDict

DETERMINISTIC = "deterministic"
EXPERIMENTS = {DETERMINISTIC: "hyper_cleaning"}


def _fixed(rate: float) -> tuple[str, ...]:
    """One learning rate for params and adjoint that does not fall."""
    return (
        f"solver.learning_rate={rate}",
        f"hypergradient.linear_learning_rate={rate}",
        "hypergradient.exponent=0",
    )


def _batches(inner: int, outer: int) -> tuple[str, ...]:
    return (f"problem.batch_size={inner}", f"problem.outer_batch_size={outer}")


# Chosen on split 20, where the powers of the step number that the presets have from the papers leave a method short.
METHODS: dict[str, tuple[str, ...]] = {
    DETERMINISTIC: (),
    "soba": (),
    "ma_soba": (),
    "saba": (*_fixed(0.05), "outer_optimizer.lr=0.1"),
    "amigo": (
        "solver.learning_rate=0.3",
        "hypergradient.linear_learning_rate=0.05",
        "solver.max_steps=5",
        "trainer.num_steps=1000",
    ),
    "stocbio": (
        *_fixed(0.1),
        "outer_scheduler.exponent=0",
        "solver.max_steps=5",
        "hypergradient.num_products=100",
        "trainer.num_steps=1000",
        *_batches(128, 256),
    ),
    "ttsa": (
        *_fixed(0.1),
        "outer_scheduler.exponent=0",
        "outer_optimizer.lr=0.05",
        "hypergradient.num_products=50",
        "trainer.num_steps=6000",
        *_batches(128, 256),
    ),
    "f2sa": (
        "~hypergradient.linear_learning_rate",
        "solver.learning_rate=0.3",
        "hypergradient.multiplier=3",
        *_batches(256, 256),
    ),
    "bome": (
        "~hypergradient.linear_learning_rate",
        "~hypergradient.exponent",
        "solver.learning_rate=0.1",
        "outer_scheduler.exponent=0",
        "outer_optimizer.lr=0.05",
        "solver.max_steps=100",
        "trainer.num_steps=2500",
        *_batches(128, 256),
    ),
}
PICTURE = Path(__file__).parent / "results" / "stochastic.png"
SEEDS = (0, 1, 2)
POINT = 0.01
QUICK = (
    "problem.num_train=300",
    "problem.num_validation=300",
    "trainer.num_steps=2",
    "trainer.metrics_every=1",
    "threads=1",
)


@dataclass
class Counter:
    """A callback that counts evaluations of the outer loss, and what they and the inner problem have cost by each step.

    Attributes:
        problem: its outer loss is counted.
        method: what makes the products.
        outer: evaluations so far.
        inner: evaluations of inner gradients and products so far.
        spent: gradients of single examples by each step.
    """

    problem: HyperCleaning
    method: HypergradientMethod

    def __post_init__(self) -> None:
        self.outer = self.inner = 0
        self.spent: list[int] = []
        loss = self.problem.outer_loss

        def counted(*args: Any) -> Tensor:
            self.outer += 1
            return loss(*args)

        self.problem.outer_loss = counted  # type: ignore[assignment, method-assign]

    def on_start(self, run: Any) -> None:
        """What the loop tried beforehand is no part of it."""
        self.outer = 0

    def on_step(self, record: dict[str, Any], hparams: dict[str, Tensor]) -> None:
        """Count, at the sizes of the batches."""
        gradients, products = (
            sum(record[f"receipt.{name}"] for name in names)
            for names in (("inner_gradients",), ("inner_products", "products"))
        )
        mixed = products if isinstance(self.method, SOBA) else min(products, 1)  # penalty methods make no products
        self.inner += gradients + products + mixed
        problem = self.problem
        sizes = [
            len(whole) if batches is None else len(batches(record["step"], 0))
            for whole, batches in ((problem.y, problem.inner_batches), (problem.y_validation, problem.outer_batches))
        ]
        self.spent.append(self.inner * sizes[0] + self.outer * sizes[1])

    def on_end(self, summary: dict[str, Any]) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class Run:
    """What a method came to.

    Attributes:
        history: records of the outer steps.
        spent: gradients of single examples by each of them.
        anew: test accuracy of the inner solution for the run's best weights (with minibatches the latest).
        seconds: wall time of the run, its metrics included.
    """

    history: list[dict[str, Any]]
    spent: list[int]
    anew: float
    seconds: float


def trained_anew(problem: HyperCleaning, hparams: TensorDict) -> float:
    """Test accuracy of the inner problem's solution, all examples in it."""
    flat = FlatProblem.of(problem, hparams)
    solved = run(LBFGS(max_steps=1000, atol=1e-5, history=150), flat.objective(None), flat.start(hparams), hparams)
    return problem.metrics(flat.unravel(solved.params), hparams)["test_accuracy"]


def measure(method: str, seed: int, *keys: str) -> Run:
    """One run, and the training with its weights."""
    preset = () if method == DETERMINISTIC else (f"hypergradient={method}",)
    name = EXPERIMENTS.get(method, "hyper_cleaning_stochastic")
    parts = experiment_parts(
        name, f"seed={seed}", f"problem.split_seed={seed}", "callbacks=none", *preset, *METHODS[method], *keys
    )
    problem = parts.problem
    assert isinstance(problem, HyperCleaning)
    counter = Counter(problem, parts.hypergradient)
    begun = time.perf_counter()
    found = fit(problem, **{**parts.keywords, "callbacks": [counter]}, seed=seed)
    seconds = time.perf_counter() - begun
    return Run(found.history, counter.spent, trained_anew(problem, found.hparams), seconds)


def row_of(method: str, runs: list[Run], reference: list[Run]) -> Row:
    """Means over the seeds."""

    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    return {
        "method": method,
        "trained anew": mean([run.anew for run in runs]),
        "over the deterministic": mean([run.anew - other.anew for run, other in zip(runs, reference, strict=True)]),
        "as they are": mean([run.history[-1]["metrics.test_accuracy"] for run in runs]),
        "f1": mean([run.history[-1]["metrics.f1"] for run in runs]),
        "outer steps": len(runs[0].history),
        "gradients": round(mean([run.spent[-1] for run in runs])),
        "of the deterministic's": mean([run.spent[-1] / other.spent[-1] for run, other in zip(runs, reference, strict=True)]),
        "seconds": mean([run.seconds for run in runs]),
    }  # fmt: skip


def plot(runs: dict[str, list[Run]], path: Path) -> None:
    """Loss on the images left out, and F1, against what has been spent; the first seed."""
    from matplotlib.figure import Figure

    from bilevel.report.style import LIGHT, Plate, Theme, blank, draw, log_axis

    def paint(theme: Theme) -> Figure:
        figure, axes = blank(1, 2, 3.6)
        shown: list[float] = []
        for place, (name, found) in enumerate(runs.items()):
            first, colour = found[0], theme.series[(place - 1) % len(theme.series)] if place else theme.ink
            known = [number for number, record in enumerate(first.history) if "metrics.f1" in record]
            spent = [first.spent[number] for number in known]
            style = "o-" if name == DETERMINISTIC else ("-" if place <= len(theme.series) else "--")
            for panel, metric in zip(axes, ("metrics.holdout_loss", "metrics.f1"), strict=True):
                values = [first.history[number][metric] for number in known]
                panel.plot(spent, values, style, color=colour, markersize=3, linewidth=1, label=name)
                shown += values if panel is axes[0] else []
        axes[0].set(xlabel="gradients of single examples", ylabel="loss on the images left out")
        axes[1].set(xlabel="gradients of single examples", ylabel="F1 of the wrong labels", ylim=(0.5, 1.0))
        log_axis(axes[0], shown)
        for panel in axes:
            panel.set_xscale("log")
        axes[0].legend(ncols=2, loc="lower left", fontsize=7)  # nothing is there: who spent little has not got far
        return figure

    caption = (
        "Hyper-cleaning by each method, against the gradients of single training and validation images that it took."
    )
    draw(Plate(path.stem, "Stochastic methods", caption, paint), LIGHT, path.parent)


def main(argv: list[str] | None = None) -> int:
    """Clean with every method, and compare."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of splits and runs (default: 0 1 2)")
    own.add_argument("--methods", nargs="+", choices=list(METHODS)[1:], default=list(METHODS)[1:], metavar="METHOD")
    options = parse(str(__doc__).splitlines()[0], argv, device=False, parents=[own])
    seeds, keys = (options.seeds[:1], QUICK) if options.quick else (options.seeds, ())
    torch.set_num_threads(1)  # the work of a step is small
    runs: dict[str, list[Run]] = {}
    rows: list[Row] = []
    for method in (DETERMINISTIC, *options.methods):
        runs[method] = [measure(method, seed, *keys) for seed in seeds]
        rows.append(row_of(method, runs[method], runs[DETERMINISTIC]))
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    if options.quick:
        return finish(options, rows, [])
    plot(runs, PICTURE)
    return finish(options, rows, claims_of(rows[1:]))


def claims_of(rows: list[Row]) -> list[Claim]:
    """Of the stochastic methods."""
    near = [row for row in rows if row["over the deterministic"] >= -POINT]
    least = min((row["of the deterministic's"] for row in near), default=None)
    return [
        Claim(
            "test accuracy over the deterministic method's, the least of all methods",
            min(row["over the deterministic"] for row in rows),
            -POINT,
            at_least=True,
        ),
        Claim("gradients over the deterministic method's, the least of those within a point", least, 0.2),
    ]


if __name__ == "__main__":
    sys.exit(main())
