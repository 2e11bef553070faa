"""Peak memory of one hypergradient against the number of inner steps: implicit is flat, unrolling grows by the step.

    python -m benchmarks.memory          (writes benchmarks/results/memory.png)

Every point is a process of its own. It builds the problem, makes one small hypergradient so that the libraries' own
buffers exist, reads its resident memory (the baseline), makes one hypergradient, and reports by how much the peak of its
resident memory exceeded the baseline. The problem is a small network on many examples: few operations, but activations
that make one recorded step larger than 20 MB.

glibc is told to give large blocks back when they are freed (`MALLOC_MMAP_THRESHOLD_`), for both methods: with its
default, blocks that it keeps for later use add or take some 20 MB at random, at any number of steps.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks.common import Claim, Row, finish, parse, table
from bilevel.batches import StepBatches
from bilevel.flat import FlatProblem
from bilevel.hypergradient import HypergradientMethod, Implicit, Unrolled
from bilevel.linalg import ConjugateGradient
from bilevel.problem import Problem
from bilevel.solvers import GradientDescent
from bilevel.tree import TensorDict

MODULE = "benchmarks.memory"
MB = 1e6
WIDTH = 16
EXAMPLES, QUICK_EXAMPLES = 160_000, 20_000
STEPS = {"implicit": (10, 100, 1000, 10_000), "unrolled": (10, 20, 30, 40)}
QUICK_STEPS = {"implicit": (10, 100), "unrolled": (5, 10)}
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
PICTURE = Path(__file__).parent / "results" / "memory.png"


class Curve(Problem):
    """Regression by a network with one hidden layer; one weight decay for each of its tensors."""

    def __init__(self, num_examples: int) -> None:
        """Draw a noisy sine."""
        draw = torch.Generator().manual_seed(0)
        self.inputs = torch.rand(num_examples, 1, generator=draw) * 6 - 3
        self.targets = self.inputs.sin() + 0.1 * torch.randn(num_examples, 1, generator=draw)
        self.val_inputs = torch.rand(1000, 1, generator=draw) * 6 - 3
        self.weight = torch.randn(WIDTH, 1, generator=draw)

    def init_hparams(self) -> TensorDict:
        """Decay of each tensor."""
        return {name: torch.tensor(1e-2) for name in ("weight1", "bias1", "weight2", "bias2")}

    def init_params(self, hparams: Mapping[str, Tensor]) -> TensorDict:
        """Random hidden units, no output."""
        zeros = torch.zeros
        return {"weight1": self.weight, "bias1": zeros(WIDTH), "weight2": zeros(1, WIDTH), "bias2": zeros(1)}

    def predict(self, params: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """The network."""
        hidden = torch.nn.functional.linear(inputs, params["weight1"], params["bias1"]).tanh()
        return torch.nn.functional.linear(hidden, params["weight2"], params["bias2"])

    def inner_loss(self, params: Mapping[str, Tensor], hparams: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Mean squared error and weight decay."""
        error = (self.predict(params, self.inputs) - self.targets).square().mean()
        return error + sum(hparams[name] * value.square().sum() for name, value in params.items())

    def outer_loss(self, params: Mapping[str, Tensor], hparams: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Error against the noiseless curve."""
        return (self.predict(params, self.val_inputs) - self.val_inputs.sin()).square().mean()


def method(name: str) -> HypergradientMethod:
    """The two that are compared, both from the same start and with the same number of products at any length."""
    if name == "unrolled":
        return Unrolled()
    return Implicit(warm_start=False, linear_solver=ConjugateGradient(rtol=None, max_steps=20))


def one(name: str, num_steps: int, num_examples: int) -> float:
    """Seconds of one hypergradient."""
    problem = Curve(num_examples)
    hparams = problem.init_hparams()
    flat = FlatProblem.of(problem, hparams)
    params = flat.start(hparams)
    begun = time.perf_counter()
    solver = GradientDescent(learning_rate=0.05, max_steps=num_steps, atol=0.0)
    result = method(name).compute(flat, solver, params, hparams, StepBatches(problem, 0), {})
    assert result.receipt.inner_steps == num_steps
    return time.perf_counter() - begun


def resident() -> float:
    """Resident memory now, bytes."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak()
    return float(pages * resource.getpagesize())


def peak() -> float:
    """Largest resident memory so far, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def reset_peak() -> None:
    """Forget the peak of the setting up, where the system can; elsewhere the baseline must be that peak."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def child(seconds_of: Callable[[str, int, int], float], name: str, num_steps: int, size: int, small: int) -> Row:
    """One point, in this process.

    Args:
        seconds_of: makes one hypergradient by a method's name, with a number of inner steps, at a size of the problem.
        name: of the method.
        num_steps: inner steps.
        size: of the problem.
        small: the size at which it is made before, so that the libraries' own buffers exist.
    """
    torch.set_num_threads(1)  # the question is memory: one thread a point leaves less to chance
    seconds_of(name, 2, small)
    reset_peak()
    baseline = max(resident(), peak())
    seconds = seconds_of(name, num_steps, size)
    return {
        "method": name,
        "inner steps": num_steps,
        "MB above baseline": (peak() - baseline) / MB,
        "baseline MB": baseline / MB,
        "seconds": seconds,
    }


def point(module: str, name: str, num_steps: int, size: int) -> Row:
    """One point, in a fresh process of a benchmark's own."""
    command = [sys.executable, "-m", module, "--point", name, str(num_steps), str(size)]
    environment = {**os.environ, **ALLOCATOR}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"the point {name} with {num_steps} steps failed:\n{done.stderr}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    print(table([row]).splitlines()[-1], flush=True)
    return row


def answered(arguments: Sequence[str], seconds_of: Callable[[str, int, int], float], small: int) -> bool:
    """Whether this process was started for a point, which it has measured and printed then; see `point`."""
    if list(arguments[:1]) != ["--point"]:
        return False
    print(json.dumps(child(seconds_of, arguments[1], int(arguments[2]), int(arguments[3]), small)))
    return True


def points(module: str, lengths: Mapping[str, Sequence[int]], size: int) -> list[Row]:
    """All points of a benchmark, printed as they come and as a table."""
    print("method, inner steps, MB above baseline, baseline MB, seconds")
    rows = [point(module, name, steps, size) for name, several in lengths.items() for steps in several]
    print()
    print(table(rows))
    return rows


def increments(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and megabytes of one method."""
    mine = [row for row in rows if row["method"] == name]
    return [row["inner steps"] for row in mine], [row["MB above baseline"] for row in mine]


def fit(rows: list[Row]) -> tuple[float, float]:
    """Slope (MB a step) and intercept (MB) of the unrolled method."""
    slope, intercept = numpy.polyfit(*increments(rows, "unrolled"), 1)
    return float(slope), float(intercept)


def plot(rows: list[Row], path: Path, names: Sequence[str] = ("implicit", "unrolled")) -> None:
    """Memory against steps, both logarithmic; the fitted line goes on where nobody has that much memory.

    Args:
        rows: all points.
        path: of the picture.
        names: what implicit differentiation and unrolling are called in it.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    from bilevel.report.style import LIGHT, Plate, Theme, blank, draw

    slope, intercept = fit(rows)
    longest = max(row["inner steps"] for row in rows)

    def paint(theme: Theme) -> Figure:
        figure, (axes,) = blank(1, 1, 3.2)
        labels = {"implicit": names[0], "unrolled": f"{names[1]}, {slope:.0f} MB a step (line: fitted)"}
        for name, colour in zip(labels, theme.series, strict=False):
            steps, megabytes = increments(rows, name)
            axes.plot(
                steps, megabytes, "o-" if name == "implicit" else "o", markersize=4, color=colour, label=labels[name]
            )
        line = numpy.geomspace(10, longest, 50)
        axes.plot(line, slope * line + intercept, color=theme.series[1], linewidth=1, linestyle="--")
        axes.set(xscale="log", yscale="log", xlabel="inner steps", ylabel="peak memory above the baseline")
        axes.set_yticks([10, 100, 1e3, 1e4, 1e5], ["10 MB", "100 MB", "1 GB", "10 GB", "100 GB"])
        axes.set_xticks([10, 100, 1000, 10_000], ["10", "100", "1,000", "10,000"])
        axes.set_ylim(10, 4 * slope * longest)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.legend(loc="upper left")
        return figure

    caption = "Implicit needs the graph of one gradient, however long the inner solve."
    draw(Plate(path.stem, "Memory of one hypergradient", caption, paint), LIGHT, path.parent)


def main(argv: list[str] | None = None) -> int:
    """Measure all points."""
    arguments = sys.argv[1:] if argv is None else argv
    if answered(arguments, one, small=100):
        return 0
    options = parse(str(__doc__).splitlines()[0], arguments, device=False)
    rows = points(MODULE, *((QUICK_STEPS, QUICK_EXAMPLES) if options.quick else (STEPS, EXAMPLES)))
    if options.quick:
        return finish(options, rows, [])
    slope, _ = fit(rows)
    print(f"\nunrolled grows by {slope:.1f} MB a step (fitted)")
    plot(rows, PICTURE)
    _, flat = increments(rows, "implicit")
    claims = [
        Claim("implicit memory at 10,000 inner steps over that at 10", flat[-1] / flat[0], 1.1),
        Claim("MB that ten unrolled steps add", 10 * slope, 200.0, at_least=True),
    ]
    return finish(options, rows, claims, {"unrolled MB a step": slope})


if __name__ == "__main__":
    sys.exit(main())
