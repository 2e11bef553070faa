"""One hypergradient at equal products, side by side with TorchOpt, higher and JAXopt.

    python -m benchmarks.hypergradient          (peers: the extra `peers`)

The inner solution is given; each library makes 20 steps of conjugate gradient (higher: 20 recorded gradient steps, whose
backward pass makes 20 products) in float32 on the same tensors, in one process, in rounds. The method is timed whole,
as a training loop calls it: outer gradient, linear system, mixed product, receipt. TorchOpt and JAXopt spend one
further product on applying the matrix to a zero start; the ratio that is judged charges them for 20 only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import Claim, Row, finish, interleaved, parse, table
from benchmarks.peers import JAX, PEERS, PYTORCH, Hypergradient, versions
from benchmarks.task import Task
from bilevel.batches import StepBatches
from bilevel.flat import FlatProblem
from bilevel.hypergradient import Implicit
from bilevel.linalg import ConjugateGradient
from bilevel.linalg.matmul import is_large, is_narrow, linear, prefers_onednn
from bilevel.solvers import InnerSolver, Objective
from bilevel.solvers.objective import Hparams
from bilevel.solvers.solver import State, fresh_state
from bilevel.tree import TensorDict

PRODUCTS = 20
EXTRA = {"TorchOpt custom_root": 1, JAX: 1}  # products beyond the steps
OURS, FLOOR = "bilevel", "matrix products alone"
SMALL, LARGE = ((64, 64, 64, 10), 800), ((784, 512, 512, 10), 2000)


@dataclass(frozen=True)
class Given(InnerSolver):
    """The inner solver of a problem that is solved already: hands back its start."""

    def init(self, params: Tensor, loss: Objective, hparams: Hparams) -> State:
        """Nothing."""
        return fresh_state(params)

    def step(self, params: Tensor, state: State, loss: Objective, hparams: Hparams) -> tuple[Tensor, State]:
        """Stationary at once."""
        return params, {**state, "stationarity": torch.zeros_like(state["stationarity"])}


def ours(task: Task, num_steps: int) -> Hypergradient:
    """`Implicit` with a budget of conjugate gradient steps."""
    method = Implicit(linear_solver=ConjugateGradient(rtol=None, max_steps=num_steps), error_estimate=None)
    flat = FlatProblem.of(task.problem, task.decay)
    params, batches = flat.layout.ravel(task.params), StepBatches(task.problem, 0)

    def compute() -> TensorDict:
        result = method.compute(flat, Given(), params, task.decay, batches, {})
        assert result.receipt.num_mv == num_steps, "conjugate gradient ended early: the work is not the same"
        return result.gradient

    return compute


def floor(rows: int, params: TensorDict, num_products: int) -> Hypergradient:
    """The matrix products that nobody gets around: two for the first layer and six for each other one, a product.

    Twice two and three more for the inner and the outer gradient; the mixed product costs none for a weight decay.

    Args:
        rows: training examples.
        params: of the network; its layers are those with two dimensions.
        num_products: Hessian products.
    """
    products = []
    for weight in (v for v in params.values() if v.ndim == 2):
        inputs, outputs = (torch.ones(rows, size).to(weight) for size in reversed(weight.shape))
        products.append([_fastest(inputs, weight.T), _fastest(outputs.T, inputs), _fastest(outputs, weight)])

    def compute() -> TensorDict:
        for number, layer in enumerate(products):
            counts = [6 if number else 2] * num_products + [3 if number else 2] * 2
            for count in counts:  # in equal parts forward, to the weights, to the inputs
                for each in range(count):
                    layer[each % 3]()
        return {}

    return compute


def _fastest(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    """The product in the way that compiled products make it."""
    if prefers_onednn() and left.device.type == "cpu" and is_large(left, right):
        return partial(linear, left.contiguous(), right.T.contiguous())
    if is_narrow(left, right):
        return partial(torch.mm, right.T, left.T)
    return partial(torch.mm, left, right)


def find_peers(task: Task) -> tuple[dict[str, Hypergradient], dict[str, str]]:
    """The peers that are installed, and for each of the others why it is not run."""
    found: dict[str, Hypergradient] = {}
    missing: dict[str, str] = {}
    for name, build in PEERS.items():
        try:
            found[name] = build(task, PRODUCTS)
        except ImportError as error:
            missing[name] = f"not installed ({error.name or error})"
    return found, missing


def difference(mine: TensorDict, theirs: TensorDict) -> float:
    """Norm of the difference over the norm of mine."""
    pairs = [(mine[name].cpu(), theirs[name].cpu()) for name in mine]
    gap = torch.cat([(a - b).flatten() for a, b in pairs]).norm()
    return float(gap / torch.cat([a.flatten() for a, _ in pairs]).norm())


def measure(task: Task, rounds: int, device: str) -> list[Row]:
    """One row for each library."""
    peers, missing = find_peers(task)
    functions = {
        OURS: ours(task, PRODUCTS),
        **peers,
        FLOOR: floor(len(task.problem.train_inputs), task.params, PRODUCTS),
    }
    seconds = interleaved(functions, rounds, device=device)
    wide = task.cast(torch.float64)
    mine = ours(wide, PRODUCTS)()
    rows: list[Row] = []
    for name in functions:
        spent = PRODUCTS + EXTRA.get(name, 0)
        at_equal = seconds[name] * PRODUCTS / spent
        row = {"problem": task.name, "library": name, "bilevel / it": seconds[OURS] / at_equal,
               "ms": 1e3 * seconds[name], "products": spent, "ms for 20 products": 1e3 * at_equal}  # fmt: skip
        if name in peers:
            row["difference (float64)"] = difference(mine, PEERS[name](wide, PRODUCTS)())
        rows.append(row)
    return rows + [{"problem": task.name, "library": name, "note": why} for name, why in missing.items()]


def make_claims(size: str, rows: list[Row], jax_target: float) -> list[Claim]:
    """The claims for one size; without the peers that one is about it is not measured."""
    ratios = {row["library"]: row.get("bilevel / it") for row in rows}
    differences = {row["library"]: row.get("difference (float64)") for row in rows}
    pytorch = [ratio for name in PYTORCH if (ratio := ratios[name]) is not None]
    return [
        Claim(
            f"time over the fastest PyTorch peer's, {size}", max(pytorch) if len(pytorch) == len(PYTORCH) else None, 1.0
        ),
        Claim(f"time over JAXopt's, {size}", ratios[JAX], jax_target),
        Claim(f"difference from JAXopt's numbers in float64, {size}", differences[JAX], 1e-6),
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure both sizes."""
    options = parse(str(__doc__).splitlines()[0], argv)
    if options.quick:
        small = measure(Task.make((16, 16, 16, 4), 200, 100, options.device), 3, options.device)
        large: list[Row] = []
    else:
        small = measure(Task.make(*SMALL, 100, options.device), 21, options.device)
        large = measure(Task.make(*LARGE, 60, options.device), 7, options.device)
    print(table(small + large))
    claims = [] if options.quick else make_claims("small", small, 1.5) + make_claims("large", large, 1.1)
    return finish(options, small + large, claims, {"peers": versions()})


if __name__ == "__main__":
    sys.exit(main())
