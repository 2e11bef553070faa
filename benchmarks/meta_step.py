"""One meta-step of implicit MAML on the Omniglot network: ours, by plain vmap, by loops, by TorchOpt, and `higher`'s MAML.

    python -m benchmarks.meta_step

5-way 1-shot, 15 queries of a class, 16 tasks, 16 inner steps, 5 steps of conjugate gradient; random images, since only shapes
matter here. All but `higher`, whose MAML has no proximal term, compute the same meta-gradient, which is checked in float64: in
float32 a unit of a task may come to the other side of a ReLU's kink, which a few inner steps make a percent of the gradient.
(TorchOpt's conjugate gradient goes on through negative curvature, where the others' ends: it differs where a task has any.)
The arithmetic alone is worked out from the network's sizes and the speed of a large matrix product, measured beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from benchmarks.common import Claim, Row, finish, interleaved, parse, table
from benchmarks.meta_peers import MetaTask, higher_maml, loop, torch_network, torchopt_imaml
from bilevel.batches import StepBatches
from bilevel.data import ClassEpisodes, Episode, Examples
from bilevel.hypergradient import Implicit, differentiate, start_method
from bilevel.hypergradient.negative_curvature import Truncate
from bilevel.hypergradient.trial import first_look, starting_hparams
from bilevel.linalg import ConjugateGradient
from bilevel.meta import ProximalFewShot
from bilevel.models import Conv4, ModuleNetwork, Network
from bilevel.solvers import GradientDescent
from bilevel.tree import TensorDict

WAY, QUERY, TASKS, INNER, PRODUCTS, FILTERS = 5, 15, 16, 16, 5, 64


def tasks(num_query: int) -> ClassEpisodes:
    """Noise in the shape of Omniglot."""
    images = torch.randint(0, 256, (20, 1 + num_query, 28, 28, 1), dtype=torch.uint8)
    return ClassEpisodes(images, {"train": range(20)}, way=WAY, num_query=num_query, rotations=False)


def library(
    source: ClassEpisodes, network: Network, weights: TensorDict, num_tasks: int, device: str
) -> Callable[[], TensorDict]:
    """A meta-step of this library, at given starting weights; the meta-gradient by the network's own names."""
    problem = ProximalFewShot(source, network, num_tasks=num_tasks).to(device)
    problem.start = {name: value.to(device) for name, value in weights.items()}
    solver = GradientDescent(max_steps=INNER, atol=0.0, learning_rate=0.1)
    method = Implicit(
        warm_start=False,
        linear_solver=ConjugateGradient(rtol=None, max_steps=PRODUCTS),
        negative_curvature=Truncate(),
        error_estimate=None,
    )
    hparams = starting_hparams(problem)
    flat, adapts, start, _, _ = first_look(problem, solver, method, hparams)

    def step() -> TensorDict:
        state = start_method(method, flat, adapts, start, hparams)
        found = differentiate(method, flat, adapts, start, hparams, StepBatches(problem, 0), state)
        return {name.removeprefix("init."): value for name, value in found.gradient.items()}

    return step


def as_ours(weights: TensorDict) -> TensorDict:
    """Weights of torch's layers by our names, channels last."""
    names: TensorDict = {}
    for layer in range(4):
        names[f"conv{layer}.weight"] = weights[f"{3 * layer}.weight"].permute(0, 2, 3, 1).contiguous()
        names[f"conv{layer}.gain"] = weights[f"{3 * layer + 1}.weight"]
        names[f"conv{layer}.bias"] = weights[f"{3 * layer + 1}.bias"]
    order = weights["13.weight"].unflatten(1, (-1, 4)).transpose(1, 2).flatten(1)  # features channels last
    return {**names, "head.weight": order.contiguous(), "head.bias": weights["13.bias"]}


def channels_first(episode: Episode) -> Episode:
    """Images as torch's layers take them."""
    return Episode(*(Examples(part.inputs.movedim(-1, -3).contiguous(), part.targets) for part in episode))


def operations(num_query: int, num_tasks: int, num_filters: int) -> float:
    """Floating-point operations of the convolutions of one meta-step.

    A gradient takes three products of a layer's size (two where the input's is not wanted), a product with the Hessian twice
    as many.
    """
    gradient = product = 0.0
    for layer, side in enumerate((14, 7, 4, 2)):
        size = 2 * side * side * 9 * (num_filters if layer else 1) * num_filters
        gradient += (3 if layer else 2) * size
        product += (6 if layer else 2) * size
    support, query = WAY, WAY * num_query
    return num_tasks * (gradient * ((INNER + 1) * support + query) + product * PRODUCTS * support)


def speed(device: str) -> float:
    """Operations a second of a large matrix product."""
    matrix = torch.rand(4096, 4096, device=device)
    return 2 * 4096**3 / interleaved({"product": lambda: matrix @ matrix}, 3, device=device)["product"]


def agreement(one: TensorDict, other: TensorDict) -> float:
    """Norm of the difference over the norm."""
    first, second = (torch.cat([value[name].flatten() for name in one]) for value in (one, other))
    return float((first - second).norm() / second.norm())


Steps = dict[str, Callable[[], TensorDict]]
LOOP, PUBLISHED, MAML = "loop over tasks, one graph a task", "loop over tasks, as the published code", "higher MAML"


def everyone(num_query: int, num_tasks: int, num_filters: int, device: str, dtype: torch.dtype) -> Steps:
    """A meta-step by everyone who can be imported, on the same tasks."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # that of the images and weights that are drawn
    source, network = tasks(num_query), torch_network(WAY, num_filters).to(device)
    episode = source.draw("train", num_tasks, 0, 0)
    moved = Episode(*(Examples(*(value.to(device) for value in part)) for part in channels_first(episode)))
    task = MetaTask(network, moved, num_steps=INNER, num_products=PRODUCTS)
    weights = as_ours(task.meta)
    steps: Steps = {
        "ours": library(source, Conv4(WAY, num_filters), weights, num_tasks, device),
        "ours, torch's layers under vmap": library(source, ModuleNetwork(network), task.meta, num_tasks, device),
        LOOP: loop(task, rebuild=False),
        PUBLISHED: loop(task, rebuild=True),
    }
    for name, make in (("TorchOpt iMAML", torchopt_imaml), (MAML, higher_maml)):
        try:
            steps[name] = make(task)
        except ImportError as error:
            print(f"{name} takes no part: {error}", file=sys.stderr)
    return steps


def differences(steps: Steps) -> dict[str, float]:
    """Relative difference of everyone's meta-gradient from that of the loop."""
    expected = as_ours(steps[LOOP]())
    found = {name: step() for name, step in steps.items() if name != MAML}
    return {name: agreement(one if name == "ours" else as_ours(one), expected) for name, one in found.items()}


def main(argv: list[str] | None = None) -> int:
    """Print the table and the claims."""
    options = parse(__doc__.splitlines()[0], argv)
    num_query, num_tasks, num_filters = (2, 3, 8) if options.quick else (QUERY, TASKS, FILTERS)
    sizes = (num_query, num_tasks, num_filters, options.device)
    errors = differences(everyone(*sizes, torch.float64))
    steps = everyone(*sizes, torch.float32)
    seconds = interleaved(steps, 2 if options.quick else 7, device=options.device)
    floor = operations(num_query, num_tasks, num_filters) / speed(options.device)
    rows: list[Row] = [
        {"meta-step": name, "seconds": value, "over ours": value / seconds["ours"], "difference": errors.get(name)}
        for name, value in seconds.items()
    ]
    rows.append({"meta-step": "arithmetic alone", "seconds": floor, "over ours": floor / seconds["ours"]})
    print(table(rows))
    fastest = min(value for name, value in seconds.items() if not name.startswith("ours"))
    honest = seconds[LOOP]
    torchopt = seconds.get("TorchOpt iMAML")
    if torchopt is not None:
        print(f"\nthe loop with one graph a task takes {honest / torchopt:.2f} of TorchOpt's time")
    target = 20.0 if torch.device(options.device).type == "cuda" else 2.5
    claims = [
        Claim("fastest of the others over ours", fastest / seconds["ours"], target, at_least=True),
        Claim(
            "relative difference of the meta-gradients", max(errors[name] for name in errors if "ours" in name), 1e-9
        ),
    ]
    return finish(options, rows, claims)


if __name__ == "__main__":
    raise SystemExit(main())
