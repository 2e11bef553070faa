"""The same hypergradient by other libraries, as their documentation says to write it.

Each function takes a `Task` and a number of steps and returns a function of no arguments that computes the hypergradient
once, as a dictionary of tensors. Libraries are imported inside: a missing one raises `ImportError`, and nothing else.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.task import Task, penalty
from bilevel.tree import TensorDict

Hypergradient = Callable[[], TensorDict]


def torchopt_custom_root(task: Task, num_steps: int) -> Hypergradient:
    """TorchOpt: `custom_root` with its conjugate gradient."""
    from torchopt.diff.implicit import custom_root
    from torchopt.linear_solve import solve_cg

    problem, names = task.problem, list(task.params)

    def inner(params: tuple[Tensor, ...], decay: tuple[Tensor, ...]) -> Tensor:
        return problem.inner_loss(dict(zip(names, params, strict=True)), dict(zip(names, decay, strict=True)), None)

    optimality = torch.func.grad(inner)

    def residual(params: tuple[Tensor, ...], decay: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        slope: tuple[Tensor, ...] = optimality(params, decay)
        return slope

    @custom_root(residual, argnums=1, solve=solve_cg(maxiter=num_steps, rtol=0.0, atol=0.0))
    def solve(params: tuple[Tensor, ...], decay: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return params

    def compute() -> TensorDict:
        warnings.simplefilter("ignore", FutureWarning)  # it calls functorch's old names
        decay = tuple(value.detach().requires_grad_() for value in task.decay.values())
        solution: Any = solve(tuple(task.params.values()), decay)
        loss = problem.outer_loss(dict(zip(names, solution, strict=True)), {}, None)
        return dict(zip(names, torch.autograd.grad(loss, decay), strict=True))

    return compute


def sequential(params: Mapping[str, Tensor]) -> torch.nn.Sequential:
    """The network as a module with copies of the weights."""
    values = list(params.values())
    modules: list[torch.nn.Module] = []
    for weight, bias in zip(values[::2], values[1::2], strict=True):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        modules += [linear, torch.nn.Tanh()]
    return torch.nn.Sequential(*modules[:-1])


def higher_unrolling(task: Task, num_steps: int) -> Hypergradient:
    """`higher`: gradient descent from the solution, recorded; the backward pass makes one product a step."""
    import higher

    problem = task.problem
    model = sequential(task.params)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def compute() -> TensorDict:
        decay = {name: value.detach().requires_grad_() for name, value in task.decay.items()}
        with higher.innerloop_ctx(model, optimizer) as (network, differentiable):
            for _ in range(num_steps):
                loss = functional.cross_entropy(network(problem.train_inputs), problem.train_labels)
                params = dict(zip(decay, network.parameters(), strict=True))
                differentiable.step(loss + penalty(params, decay))
            outer = functional.cross_entropy(network(problem.val_inputs), problem.val_labels)
            return dict(zip(decay, torch.autograd.grad(outer, list(decay.values())), strict=True))

    return compute


def jaxopt_custom_root(task: Task, num_steps: int) -> Hypergradient:
    """JAXopt: `custom_root` with its conjugate gradient, all in one `jit`."""
    import jax
    import jax.numpy as jnp
    from jaxopt.implicit_diff import custom_root
    from jaxopt.linear_solve import solve_cg

    jax.config.update("jax_enable_x64", True)  # float32 arrays stay float32
    names = list(task.params)

    def logits(params: Any, inputs: Any) -> Any:
        hidden = inputs
        for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
            hidden = jnp.tanh(hidden @ weight.T + bias)
        return hidden @ params[-2].T + params[-1]

    def cross_entropy(params: Any, inputs: Any, labels: Any) -> Any:
        scores = jax.nn.log_softmax(logits(params, inputs))
        return -jnp.take_along_axis(scores, labels[:, None], axis=1).mean()

    def inner(params: Any, decay: Any, inputs: Any, labels: Any) -> Any:
        terms = sum((d * p**2).sum() for p, d in zip(params, decay, strict=True))
        return cross_entropy(params, inputs, labels) + 0.5 * terms

    solve = functools.partial(solve_cg, maxiter=num_steps, tol=0.0, atol=0.0)

    @custom_root(jax.grad(inner), solve=solve)
    def solver(params: Any, decay: Any, inputs: Any, labels: Any) -> Any:
        return params

    def outer(decay: Any, params: Any, train: Any, val: Any) -> Any:
        return cross_entropy(solver(params, decay, *train), *val)

    hypergradient = jax.jit(jax.grad(outer))

    def give(value: Tensor) -> Any:
        return jnp.asarray(value.cpu().numpy())

    problem = task.problem
    params, decay = ([give(value) for value in values.values()] for values in (task.params, task.decay))
    train = give(problem.train_inputs), give(problem.train_labels)
    val = give(problem.val_inputs), give(problem.val_labels)

    def compute() -> TensorDict:
        result = jax.block_until_ready(hypergradient(decay, params, train, val))
        return {name: torch.from_dlpack(value) for name, value in zip(names, result, strict=True)}

    return compute


def versions(names: Sequence[str] = ("torchopt", "higher", "jaxopt", "jax")) -> dict[str, str]:
    """What is installed of the libraries that take part."""
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


PEERS: dict[str, Callable[[Task, int], Hypergradient]] = {
    "TorchOpt custom_root": torchopt_custom_root,
    "higher unrolling": higher_unrolling,
    "JAXopt custom_root, jitted": jaxopt_custom_root,
}
PYTORCH = ("TorchOpt custom_root", "higher unrolling")
JAX = "JAXopt custom_root, jitted"
