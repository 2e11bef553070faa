"""Compiled products beside eager ones: what they save, what compiling costs, and when it has paid off.

    python -m benchmarks.compiled          (JAXopt takes part when it is installed: the extra `peers`)

"setup" is what a new point costs before its first product: the eager graph, or the part of the traced one that does not
depend on the vector, with the evaluation that guards it. "matrix products alone" is the arithmetic that no way gets
around. Compiling starts with an empty cache, and counts tracing, the compiler and the comparison with eager products;
later processes find the code in torch's cache. The whole hypergradient is that of `python -m benchmarks.hypergradient`:
outer gradient, 20 steps of conjugate gradient, mixed product; JAXopt's is judged at 20 products, too. Where a process
has its tensors in memory changes a time by several per cent, so that each is measured in five fresh processes, and the
median of their ratios is judged.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Claim, Row, finish, in_fresh_processes, interleaved, parse, table, threads
from benchmarks.hypergradient import EXTRA, LARGE, PRODUCTS, SMALL, difference, floor
from benchmarks.operators import Network, convolutional, plain
from benchmarks.peers import JAX, PEERS, Hypergradient, versions
from benchmarks.task import Task
from bilevel.batches import StepBatches
from bilevel.flat import FlatProblem, natural_hparams
from bilevel.hypergradient.outer import outer_gradients
from bilevel.linalg import ConjugateGradient
from bilevel.linalg.compiled import CompiledDerivatives
from bilevel.linalg.differentiate import Derivatives, differentiate
from bilevel.problems import DigitsMLP
from bilevel.tree import TensorDict

EAGER, COMPILED, FLOOR = "bilevel, eager", "bilevel, compiled", "matrix products alone"
PROCESSES = 5  # in which whole hypergradients are timed
FASTER = 3.0  # products of the small network (that of experiment=digits_mlp), over eager ones
At = Callable[..., Derivatives]


@dataclass(frozen=True)
class Case:
    """A loss whose products are timed.

    Attributes:
        name: what it is.
        loss: `(x, args, data) -> ()`.
        point: `x`.
        args: what the mixed product differentiates by.
        task: the bilevel problem that other libraries are given, if there is one.
        rows: training examples of a network of dense layers.
        weights: of its layers; none for other networks.
    """

    name: str
    loss: Callable[[Tensor, TensorDict, Any], Tensor]
    point: Tensor
    args: TensorDict = field(default_factory=dict)
    task: Task | None = None
    rows: int = 0
    weights: TensorDict = field(default_factory=dict)

    @classmethod
    def of_task(cls, task: Task) -> Case:
        """The inner loss of a task at its solution."""
        flat = FlatProblem.of(task.problem, task.decay)
        rows = len(task.problem.train_inputs)
        return cls(task.name, inner_loss(flat), flat.layout.ravel(task.params), task.decay, task, rows, task.params)

    @classmethod
    def of_digits(cls, dtype: torch.dtype, device: str) -> Case:
        """The inner loss of `experiment=digits_mlp`, near its start: a product costs the same everywhere."""
        problem = DigitsMLP(hidden=[32], penalty="per_weight").to(device, dtype)
        decay = natural_hparams(problem)
        flat = FlatProblem.of(problem, decay)
        point = flat.start(decay)
        noise = torch.randn(point.shape, generator=torch.Generator().manual_seed(0)).to(point)
        name = f"digits_mlp, {str(dtype).removeprefix('torch.')}, 1 thread"
        weights = dict(flat.unravel(point))
        return cls(name, inner_loss(flat), point + 0.01 * noise, decay, None, len(problem.x), weights)

    @classmethod
    def of_network(cls, network: Network) -> Case:
        """A network without hyperparameters."""
        return cls(network.name, lambda x, args, data: network.loss(x), network.point)


def inner_loss(flat: FlatProblem) -> Callable[[Tensor, TensorDict, Any], Tensor]:
    """The inner loss of a problem, as what is differentiated."""

    def loss(x: Tensor, args: Mapping[str, Tensor], data: Any) -> Tensor:
        inner = flat.objective(data).loss
        assert inner is not None
        return inner(x, args)

    return loss


def hypergradient(case: Case, at: At) -> Hypergradient:
    """The hypergradient of a task by the theorem, with the products that `at` gives."""
    task = case.task
    assert task is not None
    flat, solver = FlatProblem.of(task.problem, task.decay), ConjugateGradient(rtol=None, max_steps=PRODUCTS)
    batches = StepBatches(task.problem, 0)

    def compute() -> TensorDict:
        _, by_params, direct = outer_gradients(flat, case.point, task.decay, batches)
        here = at(case.loss, case.point, task.decay)
        solution = solver.compute(solver.init(here.operator), by_params)
        assert int(solution.num_mv) == PRODUCTS, "conjugate gradient ended early: the work is not the same"
        return {name: direct[name] - part for name, part in here.mixed(solution.value).items()}

    return compute


def measure_products(case: Case, rounds: int, device: str) -> list[Row]:
    """One row for each way to make a product; compiles first."""
    vector = torch.randn(case.point.shape, generator=torch.Generator().manual_seed(1)).to(case.point)
    compiled = CompiledDerivatives()
    ways: dict[str, At] = {EAGER: differentiate, COMPILED: compiled.at}
    here = {name: way(case.loss, case.point, case.args) for name, way in ways.items()}
    fallback = here[COMPILED].fallback
    repeats = 10 if len(case.point) < 100_000 else 1

    def product(name: str) -> None:
        for _ in range(repeats):
            here[name].operator.mv(vector)

    functions: dict[str, Callable[[], Any]] = {}
    for name, way in ways.items():
        functions[name] = partial(product, name)
        functions[f"{name}, setup"] = partial(way, case.loss, case.point, case.args)
    if case.weights:
        functions[FLOOR] = floor(case.rows, case.weights, PRODUCTS)
        functions[f"{FLOOR}, setup"] = floor(case.rows, case.weights, 0)
    seconds = interleaved(functions, rounds, device=device)
    before, after = seconds[EAGER] / repeats, seconds[COMPILED] / repeats
    spent = sum(compiled.seconds.values())
    rows: list[Row] = [
        {"problem": case.name, "product": EAGER, "ms": 1e3 * before, "setup ms": 1e3 * seconds[f"{EAGER}, setup"]},
        {"problem": case.name, "product": COMPILED, "ms": 1e3 * after, "setup ms": 1e3 * seconds[f"{COMPILED}, setup"],
         "times faster": before / after, **{f"{what} s": value for what, value in compiled.seconds.items()},
         "paid off after products": spent / (before - after) if before > after else None},
    ]  # fmt: skip
    if fallback is not None:
        rows[1]["note"] = fallback
    if case.weights:
        each = (seconds[FLOOR] - seconds[f"{FLOOR}, setup"]) / PRODUCTS
        rows.append({"problem": case.name, "product": FLOOR, "ms": 1e3 * each, "times faster": before / each})
    return rows


def time_hypergradients(
    widths: tuple[int, ...], num_examples: int, num_steps: int, rounds: int, device: str
) -> dict[str, float]:
    """Seconds for 20 products of each way to a whole hypergradient, in this process."""
    task = Task.make(widths, num_examples, num_steps, device)
    case = Case.of_task(task)
    functions = {COMPILED: hypergradient(case, CompiledDerivatives().at), EAGER: hypergradient(case, differentiate)}
    with suppress(ImportError):
        functions[JAX] = PEERS[JAX](task, PRODUCTS)
    functions[FLOOR] = floor(case.rows, case.weights, PRODUCTS)
    seconds = interleaved(functions, rounds, device=device)
    return {name: spent * PRODUCTS / (PRODUCTS + EXTRA.get(name, 0)) for name, spent in seconds.items()}


def summarise(name: str, processes: Sequence[Mapping[str, float]]) -> list[Row]:
    """One row for each way to a whole hypergradient: medians over processes, and the smallest and the largest ratio."""
    rows: list[Row] = []
    for way in processes[0]:
        ratios = [seconds[COMPILED] / seconds[way] for seconds in processes]
        rows.append(
            {"problem": name, "hypergradient": way, "compiled / it": median(ratios), "least": min(ratios),
             "most": max(ratios), "processes": len(processes),
             "ms for 20 products": 1e3 * median(seconds[way] for seconds in processes)}
        )  # fmt: skip
    if JAX not in processes[0]:
        rows.append({"problem": name, "hypergradient": JAX, "note": "not installed"})
    return rows


def disagreement(task: Task) -> float:
    """Relative difference of the compiled hypergradient from the eager one in float64."""
    case = Case.of_task(task.cast(torch.float64))
    return difference(hypergradient(case, differentiate)(), hypergradient(case, CompiledDerivatives().at)())


def ratio(rows: list[Row], way: str, name: str, figure: str) -> float | None:
    """A figure of one row; None when it was not measured."""
    (value,) = (row.get(figure) for row in rows if row.get(way) == name)
    return value


def main(argv: list[str] | None = None) -> int:
    """Measure the products of two networks of dense layers and a convolutional one, and two hypergradients."""
    options = parse(str(__doc__).splitlines()[0], argv)
    device, quick = options.device, options.quick
    rows: list[Row] = []
    claims: list[Claim] = []
    tasks = {"small": ((16, 16, 16, 4), 200, 100)} if quick else {"small": (*SMALL, 100), "large": (*LARGE, 60)}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        for dtype in (torch.float32, torch.float64):
            case = Case.of_digits(dtype, device)
            with threads(1):  # as the experiment runs it
                products = measure_products(case, 3 if quick else 21, device)
            faster = ratio(products, "product", COMPILED, "times faster")
            claims.append(
                Claim(f"compiled products, times faster than eager, {case.name}", faster, FASTER, at_least=True)
            )
            rows += products
        for size, (widths, num_examples, num_steps) in tasks.items():
            task = Task.make(widths, num_examples, num_steps, device)
            case, rounds = Case.of_task(task), 3 if quick else 21 if size == "small" else 7
            products = measure_products(case, rounds, device)
            repeated = in_fresh_processes(
                1 if quick else PROCESSES, time_hypergradients, widths, num_examples, num_steps, rounds, device
            )
            whole = summarise(task.name, repeated)
            claims += [
                Claim(f"time of the compiled hypergradient over JAXopt's, {size}",
                      ratio(whole, "hypergradient", JAX, "compiled / it"), 1.0),
                Claim(f"difference of the compiled hypergradient from the eager one in float64, {size}",
                      disagreement(task), 1e-6),
            ]  # fmt: skip
            rows += products + whole
        if not quick:
            rows += measure_products(Case.of_network(convolutional(25, 64, plain, device)), 7, device)
    print(table([row for row in rows if "product" in row]))
    print()
    print(table([row for row in rows if "hypergradient" in row]))
    return finish(options, rows, claims, {"peers": versions()})


if __name__ == "__main__":
    sys.exit(main())
