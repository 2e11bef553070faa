"""One meta-step of implicit MAML on the Omniglot network: ours, by plain vmap, by loops, by TorchOpt, and `higher`'s MAML.

    python -m benchmarks.meta_step

5-way 1-shot, 15 queries of a class, 16 tasks, 16 inner steps, 5 steps of conjugate gradient; random images, since only shapes
matter here. All but `higher`, whose MAML has no proximal term, and the published code, whose inner steps have none, compute the
same meta-gradient, which is checked in float64: in float32 a unit of a task may come to the other side of a ReLU's kink, which
a few inner steps make a percent of the gradient.
(TorchOpt's conjugate gradient goes on through negative curvature, where the others' ends: its meta-gradient differs there, and
where the proximal term outweighs every curvature it has to be the same, which is checked too.)
Each runs in fresh processes of its own, as its users run it: this library has the allocator keep freed memory, which helps
whatever else is in the process. All are called in turns, and `over ours` is the median of the ratios within a turn. A loop
with that help is a row, but not what the claim compares with: its users have not got it. Ours is compiled, as one would have
it for a long run: `first one` is what that costs, once on a machine, and the row `ours` is what comes without. The arithmetic
alone is worked out from the network's sizes and the speed of a large matrix product, measured beside it. Tasks are drawn in a
thread of their own while the step before is made (`Prefetched`); what a step still waits for them is measured over thirty
steps of a run.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch._inductor.utils import fresh_cache

from benchmarks.common import (
    Claim,
    Row,
    finish,
    in_fresh_processes,
    in_turns,
    interleaved,
    parse,
    relative_difference,
    table,
)
from benchmarks.meta_peers import (
    SIDES,
    MetaStep,
    MetaTask,
    higher_maml,
    loop,
    published_loop,
    torch_network,
    torchopt_imaml,
)
from benchmarks.peers import versions
from bilevel.batches import StepBatches
from bilevel.data import ClassEpisodes, Episode, Examples
from bilevel.hypergradient import Hypergradient, Implicit, differentiate, start_method
from bilevel.hypergradient.negative_curvature import Truncate
from bilevel.hypergradient.trial import first_look, starting_hparams
from bilevel.linalg import ConjugateGradient
from bilevel.linalg.allocator import keep_freed_memory
from bilevel.meta import ProximalFewShot
from bilevel.models import Conv4, ModuleNetwork, Network
from bilevel.solvers import GradientDescent
from bilevel.tree import TensorDict

WAY, QUERY, TASKS, INNER, PRODUCTS, FILTERS, LAYERS = 5, 15, 16, 16, 5, 64, 4


def tasks(num_query: int) -> ClassEpisodes:
    """Noise in the shape of Omniglot."""
    images = torch.randint(0, 256, (20, 1 + num_query, 28, 28, 1), dtype=torch.uint8)
    return ClassEpisodes(images, {"train": range(20)}, way=WAY, num_query=num_query)


def as_shipped(num_query: int) -> ClassEpisodes:
    """As many classes as experiments on Omniglot train on, turned and moved as they are, for the time that a draw takes."""
    images = torch.randint(0, 256, (914, 20, 28, 28, 1), dtype=torch.uint8)
    classes = {"train": range(len(images))}
    return ClassEpisodes(images, classes, way=WAY, num_query=num_query, rotated_parts=["train"], shift=2)


def few_shot(
    source: ClassEpisodes, network: Network, weights: TensorDict, num_tasks: int, device: str
) -> ProximalFewShot:
    """The problem, at given starting weights."""
    at_once = (
        None if torch.device(device).type == "cuda" else 1
    )  # what stays in a CPU's cache, and all that a GPU can take
    problem = ProximalFewShot(source, network, num_tasks=num_tasks, tasks_at_once=at_once).to(device)
    problem.start = {name: value.to(device) for name, value in weights.items()}
    return problem


def library(problem: ProximalFewShot, compiled: bool = False) -> Callable[[StepBatches], Hypergradient]:
    """A meta-step of this library."""
    solver = GradientDescent(max_steps=INNER, atol=0.0, learning_rate=0.1, compile=compiled)
    method = Implicit(
        warm_start=False,
        linear_solver=ConjugateGradient(rtol=None, max_steps=PRODUCTS),
        negative_curvature=Truncate(),
        error_estimate=None,
        compile=compiled,
    )
    hparams = starting_hparams(problem)
    flat, adapts, start, _, _ = first_look(problem, solver, method, hparams)

    def step(batches: StepBatches) -> Hypergradient:
        state = start_method(method, flat, adapts, start, hparams)
        return differentiate(method, flat, adapts, start, hparams, batches, state)

    return step


def as_ours(weights: TensorDict) -> TensorDict:
    """Weights of torch's layers by our names, channels last."""
    names: TensorDict = {}
    last = max(int(name.partition(".")[0]) for name in weights)  # the linear layer, after a Flatten
    layers = range(last // 3)
    for layer in layers:
        names[f"conv{layer}.weight"] = weights[f"{3 * layer}.weight"].permute(0, 2, 3, 1).contiguous()
        names[f"conv{layer}.gain"] = weights[f"{3 * layer + 1}.weight"]
        names[f"conv{layer}.bias"] = weights[f"{3 * layer + 1}.bias"]
    order = (
        weights[f"{last}.weight"].unflatten(1, (-1, SIDES[layers[-1]] ** 2)).transpose(1, 2).flatten(1)
    )  # channels last
    return {**names, "head.weight": order.contiguous(), "head.bias": weights[f"{last}.bias"]}


def channels_first(episode: Episode) -> Episode:
    """Images as torch's layers take them."""
    return Episode(*(Examples(part.inputs.movedim(-1, -3).contiguous(), part.targets) for part in episode))


def operations(num_query: int, num_tasks: int, num_filters: int, num_layers: int) -> float:
    """Floating-point operations of the convolutions of one meta-step.

    A gradient takes three products of a layer's size (two where the input's is not wanted), a product with the Hessian six
    (two).
    """
    gradient = product = 0.0
    for layer, side in enumerate(SIDES[:num_layers]):
        size = 2 * side * side * 9 * (num_filters if layer else 1) * num_filters
        gradient += (3 if layer else 2) * size
        product += (6 if layer else 2) * size
    support, query = WAY, WAY * num_query
    return num_tasks * (gradient * ((INNER + 1) * support + query) + product * PRODUCTS * support)


def speed(device: str) -> float:
    """Operations a second of a large matrix product."""
    matrix = torch.rand(4096, 4096, dtype=torch.float32, device=device)
    return 2 * 4096**3 / interleaved({"product": lambda: matrix @ matrix}, 3, device=device)["product"]


Sizes = tuple[int, int, int, int, str, torch.dtype]  # queries of a class, tasks, filters, layers, device, dtype
Steps = dict[str, MetaStep]
OURS, EAGER, VMAP = "ours, compiled", "ours", "ours, torch's layers under vmap"
LOOP, PUBLISHED = "loop over tasks, one graph a task", "loop over tasks, as the published code"
HELPED = "loop over tasks, one graph a task, freed memory kept"
TORCHOPT, MAML = "TorchOpt iMAML", "higher MAML"


def helped_loop(task: MetaTask) -> MetaStep:
    """The loop in a process whose allocator keeps freed memory, as this library has it do."""
    keep_freed_memory()
    return loop(task)


def drawn(sizes: Sizes) -> tuple[ClassEpisodes, MetaTask]:
    """Where tasks come from, and the first ones with the network."""
    num_query, num_tasks, num_filters, num_layers, device, dtype = sizes
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # that of the images and weights that are drawn
    source, network = tasks(num_query), torch_network(WAY, num_filters, num_layers=num_layers).to(device)
    episode = source.draw("train", num_tasks, 0, 0)
    moved = Episode(*(Examples(*(value.to(device) for value in part)) for part in channels_first(episode)))
    return source, MetaTask(network, moved, num_steps=INNER, num_products=PRODUCTS)


def everyone(sizes: Sizes) -> dict[str, Callable[[], MetaStep]]:
    """What makes a meta-step, by everyone, on the same tasks."""
    _, num_tasks, num_filters, num_layers, device, _ = sizes
    source, task = drawn(sizes)
    weights, ours = as_ours(task.meta), Conv4(WAY, num_filters, num_layers=num_layers)

    def first(network: Network, weights: TensorDict, compiled: bool = False) -> MetaStep:
        problem = few_shot(source, network, weights, num_tasks, device)
        step = library(problem, compiled)

        def gradient() -> TensorDict:  # by the network's own names
            found = step(StepBatches(problem, 0))
            assert found.receipt.fallback is None, found.receipt.fallback  # else eager numbers, under another name
            return {name.removeprefix("init."): value for name, value in found.gradient.items()}

        return gradient

    return {
        OURS: lambda: first(ours, weights, compiled=True),
        EAGER: lambda: first(ours, weights),
        VMAP: lambda: first(ModuleNetwork(task.network), task.meta),
        LOOP: lambda: loop(task),
        HELPED: lambda: helped_loop(task),
        PUBLISHED: lambda: published_loop(task),
        TORCHOPT: lambda: torchopt_imaml(task),
        MAML: lambda: higher_maml(task),
    }


def made(sizes: Sizes) -> Steps:
    """The meta-steps of those that can be imported."""
    steps: Steps = {}
    for name, make in everyone(sizes).items():
        try:
            steps[name] = make()
        except ImportError as error:
            print(f"{name} takes no part: {error}", file=sys.stderr)
    return steps


def one_of(name: str, sizes: Sizes) -> MetaStep:
    """A meta-step by its name; nothing else is made in this process."""
    return everyone(sizes)[name]()


def waiting(sizes: Sizes, num_steps: int) -> tuple[float, float]:
    """Seconds that a compiled meta-step waits for its tasks, which are drawn beside the one before, and that it takes.

    The mean of so many steps after the first, each on tasks of its own.
    """
    num_query, num_tasks, num_filters, num_layers, device, _ = sizes
    _, task = drawn(sizes)
    ours = Conv4(WAY, num_filters, num_layers=num_layers)
    problem = few_shot(as_shipped(num_query), ours, as_ours(task.meta), num_tasks, device)
    step, waited = library(problem, compiled=True), 0.0
    step(StepBatches(problem, 0))  # draws, compiles, and is not counted
    begin = time.perf_counter()
    for number in range(1, num_steps + 1):
        start = time.perf_counter()
        batches = StepBatches(problem, number)
        assert batches.inner(0) is not None  # keeps the tasks
        waited += time.perf_counter() - start
        step(batches)
    return waited / num_steps, (time.perf_counter() - begin) / num_steps


def differences(steps: Steps) -> dict[str, float]:
    """Relative difference of everyone's meta-gradient from that of the loop."""
    expected = as_ours(steps[LOOP]())
    found = {name: step() for name, step in steps.items() if name not in (MAML, PUBLISHED)}
    return {
        name: relative_difference(one if name in (OURS, EAGER) else as_ours(one), expected)
        for name, one in found.items()
    }


def convex_difference(sizes: Sizes) -> float:
    """Relative difference of TorchOpt's meta-gradient from that of the loop where no task has negative curvature."""
    task = replace(drawn(sizes)[1], strength=100.0, learning_rate=0.005)
    return relative_difference(torchopt_imaml(task)(), loop(task)())


def main(argv: list[str] | None = None) -> int:
    """Print the table and the claims."""
    options = parse(__doc__.splitlines()[0], argv)
    num_query, num_tasks, num_filters, num_layers = (2, 3, 8, 1) if options.quick else (QUERY, TASKS, FILTERS, LAYERS)
    sizes = (num_query, num_tasks, num_filters, num_layers, options.device)
    timed = torch.float64 if options.quick else torch.float32  # quick: what is timed and checked is compiled once
    rounds, turns = (1, 2) if options.quick else (3, 5)
    steps = made((*sizes, torch.float64))
    with fresh_cache():  # of the compiler, in the first round
        found = in_turns(list(steps), one_of, (*sizes, timed), rounds=rounds, turns=turns, device=options.device)
        errors = differences(steps)
        ((waited, step_seconds),) = in_fresh_processes(1, waiting, (*sizes, timed), 3 if options.quick else 30)
    convex = convex_difference((*sizes, torch.float64)) if TORCHOPT in steps else None
    seconds = {name: statistics.median(times.turns) for name, times in found.items()}
    over_ours = {
        name: statistics.median(theirs / ours for theirs, ours in zip(times.turns, found[OURS].turns, strict=True))
        for name, times in found.items()
    }
    floor = operations(num_query, num_tasks, num_filters, num_layers) / speed(options.device)
    rows: list[Row] = [
        {"meta-step": name, "seconds": value, "over ours": over_ours[name], "difference": errors.get(name),
         "first one": max(found[name].first)}
        for name, value in seconds.items()
    ]  # fmt: skip
    rows.append({"meta-step": "arithmetic alone", "seconds": floor, "over ours": floor / seconds[OURS]})
    source = as_shipped(num_query)
    draw = interleaved({"draw": lambda: source.draw("train", num_tasks, 1, 0)}, turns)["draw"]
    rows += [
        {"meta-step": "drawing its tasks, beside the one before", "seconds": draw, "over ours": draw / seconds[OURS]},
        {"meta-step": "waiting for them", "seconds": waited, "over ours": waited / step_seconds},
    ]
    print(table(rows))
    peers = {LOOP, PUBLISHED, TORCHOPT, MAML}
    complete = peers <= seconds.keys()  # no claim without all of them
    fastest = min(over_ours[name] for name in peers) if complete else None
    honest = seconds[LOOP]
    torchopt = seconds.get(TORCHOPT)
    if torchopt is not None:
        print(f"\nthe loop with one graph a task takes {honest / torchopt:.2f} of TorchOpt's time")
    target = 20.0 if torch.device(options.device).type == "cuda" else 2.5
    claims = [
        Claim("fastest of the others over ours", fastest, target, at_least=True),
        Claim("waiting for the tasks of a step over the step", waited / step_seconds, 0.01),
        Claim(
            "relative difference of the meta-gradients", max(errors[name] for name in errors if "ours" in name), 1e-9
        ),
        Claim("difference of TorchOpt's meta-gradient where all is convex", convex, 1e-9),
    ]
    return finish(options, rows, claims, {"peers": versions()})


if __name__ == "__main__":
    raise SystemExit(main())
