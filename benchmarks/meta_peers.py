"""One meta-step by other libraries and by loops over the tasks, as their documentation and papers say to write it.

Each function takes a `MetaTask` and returns a function of no arguments that makes one meta-step: the meta-gradient, averaged
over the tasks, by the names of the torch module's parameters. A library that is missing raises `ImportError`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from bilevel.data import Episode
from bilevel.tree import TensorDict

MetaStep = Callable[[], TensorDict]


@dataclass(frozen=True)
class MetaTask:
    """What everyone is to do.

    Attributes:
        network: torch's own layers, images channels first.
        episode: the tasks, images channels first.
        strength: of the proximal term.
        learning_rate: of the inner gradient descent.
        num_steps: of it.
        num_products: of conjugate gradient.
    """

    network: nn.Module
    episode: Episode
    strength: float = 2.0
    learning_rate: float = 0.1
    num_steps: int = 16
    num_products: int = 5

    @property
    def meta(self) -> TensorDict:
        """The starting point of every task."""
        return {name: value.detach() for name, value in self.network.named_parameters()}

    def tasks(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Support images and labels, query images and labels of each task."""
        return list(zip(*self.episode.support, *self.episode.query, strict=True))


SIDES = (14, 7, 4, 2)  # of the images after each layer


def torch_network(way: int, num_filters: int = 64, num_channels: int = 1, num_layers: int = 4) -> nn.Module:
    """The network of the papers in torch's layers; for images of 28 x 28."""
    blocks: list[nn.Module] = []
    for layer in range(num_layers):
        before = num_filters if layer else num_channels
        blocks += [
            nn.Conv2d(before, num_filters, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(num_filters, track_running_stats=False),
            nn.ReLU(),
        ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(SIDES[num_layers - 1] ** 2 * num_filters, way))


def solve_cg(product: Callable[[Tensor], Tensor], vector: Tensor, num_steps: int) -> Tensor:
    """Conjugate gradient from zero, a fixed number of steps; it ends where it meets negative curvature, like ours."""
    x, residual = torch.zeros_like(vector), vector
    direction, rho = vector, vector @ vector
    for _ in range(num_steps):
        image = product(direction)
        curvature = direction @ image
        if curvature <= 0:
            break
        length = rho / curvature
        x, residual = x + length * direction, residual - length * image
        new_rho = residual @ residual
        direction, rho = residual + new_rho / rho * direction, new_rho
    return x


def loop(task: MetaTask) -> MetaStep:
    """Implicit MAML task by task, as well as plain torch goes: one gradient graph a task, the proximal term by hand."""
    meta, network = task.meta, task.network

    def loss(params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs: Tensor = functional_call(network, dict(params), (x,))
        return cross_entropy(outputs, y)

    def of_task(x: Tensor, y: Tensor, x_query: Tensor, y_query: Tensor) -> Tensor:
        leaves = {name: value.clone().requires_grad_() for name, value in meta.items()}
        for _ in range(task.num_steps):
            slopes = grad(loss(leaves, x, y), list(leaves.values()))
            with torch.no_grad():
                leaves = {
                    name: value - task.learning_rate * (slope + task.strength * (value - meta[name]))
                    for (name, value), slope in zip(leaves.items(), slopes, strict=True)
                }
            leaves = {name: value.requires_grad_() for name, value in leaves.items()}
        values = list(leaves.values())
        vector = _flat(grad(loss(leaves, x_query, y_query), values))
        gradient = _flat(grad(loss(leaves, x, y), values, create_graph=True))

        def product(v: Tensor) -> Tensor:
            return _flat(grad(gradient, values, v, retain_graph=True)) / task.strength + v

        return solve_cg(product, vector, task.num_products)

    return _averaged(task, of_task)


def published_loop(task: MetaTask) -> MetaStep:
    """Implicit MAML task by task in the steps of the paper's published code.

    Inner steps are `torch.optim.SGD`'s on the support loss alone; the proximal term, through autograd, takes one step of its
    own after them. The graph of the gradient is made anew for every product.

    Reference: Rajeswaran, Finn, Kakade and Levine (2019), "Meta-learning with implicit gradients", whose code is public.
    """
    meta, network = task.meta, copy.deepcopy(task.network)
    values = list(network.parameters())
    optimizer = torch.optim.SGD(values, lr=task.learning_rate)

    def descend(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def of_task(x: Tensor, y: Tensor, x_query: Tensor, y_query: Tensor) -> Tensor:
        with torch.no_grad():
            for name, value in network.named_parameters():
                value.copy_(meta[name])
        for _ in range(task.num_steps):
            descend(cross_entropy(network(x), y))
        distances = [(value - meta[name]).square().sum() for name, value in network.named_parameters()]
        descend(0.5 * task.strength * torch.stack(distances).sum())
        vector = _flat(grad(cross_entropy(network(x_query), y_query), values))

        def product(v: Tensor) -> Tensor:
            gradient = _flat(grad(cross_entropy(network(x), y), values, create_graph=True))
            return _flat(grad(gradient @ v, values)) / task.strength + v

        return solve_cg(product, vector, task.num_products)

    return _averaged(task, of_task)


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _averaged(task: MetaTask, of_task: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> MetaStep:
    """The mean of the tasks' meta-gradients."""
    meta, tasks = task.meta, task.tasks()

    def step() -> TensorDict:
        total = torch.stack([of_task(*one) for one in tasks]).mean(0)
        parts = total.split([value.numel() for value in meta.values()])
        return {name: part.view_as(value) for (name, value), part in zip(meta.items(), parts, strict=True)}

    return step


def torchopt_imaml(task: MetaTask) -> MetaStep:
    """TorchOpt: `ImplicitMetaGradientModule` with the same conjugate gradient."""
    import torchopt
    from torchopt.nn import ImplicitMetaGradientModule

    solver = torchopt.linear_solve.solve_cg(maxiter=task.num_products, rtol=0.0, atol=0.0)

    class Inner(ImplicitMetaGradientModule, linear_solve=solver):  # type: ignore[call-arg, unused-ignore]
        def __init__(self, meta: nn.Module) -> None:
            super().__init__()
            self.meta = meta
            self.net = copy.deepcopy(meta)
            for value in self.parameters(recurse=True):
                value.requires_grad_()

        def objective(self, x: Tensor, y: Tensor) -> Tensor:
            term = sum(((p - m) ** 2).sum() for p, m in zip(self.net.parameters(), self.meta.parameters(), strict=True))
            return cross_entropy(self.net(x), y) + 0.5 * task.strength * term

        def solve(self, x: Tensor, y: Tensor) -> Any:
            params = tuple(self.parameters())
            optimizer = torch.optim.SGD(params, lr=task.learning_rate)
            with torch.enable_grad():
                for _ in range(task.num_steps):
                    optimizer.zero_grad()
                    self.objective(x, y).backward(inputs=params)
                    optimizer.step()
            return self

    network = copy.deepcopy(task.network)

    def step() -> TensorDict:
        warnings.simplefilter("ignore", FutureWarning)  # it calls functorch's old names
        total = {name: torch.zeros_like(value) for name, value in network.named_parameters()}
        for x, y, x_query, y_query in task.tasks():
            inner = Inner(network)
            inner.solve(x, y)
            slopes = grad(cross_entropy(inner.net(x_query), y_query), list(network.parameters()))
            total = {
                name: value + slope / len(task.tasks())
                for (name, value), slope in zip(total.items(), slopes, strict=True)
            }
        return total

    return step


def higher_maml(task: MetaTask) -> MetaStep:
    """`higher`: MAML, the inner loop recorded; no proximal term, another gradient, the same number of inner steps."""
    import higher

    network = copy.deepcopy(task.network)
    optimizer = torch.optim.SGD(network.parameters(), lr=task.learning_rate)

    def step() -> TensorDict:
        network.zero_grad()
        for x, y, x_query, y_query in task.tasks():
            with higher.innerloop_ctx(network, optimizer, copy_initial_weights=False) as (fast, differentiable):
                for _ in range(task.num_steps):
                    differentiable.step(cross_entropy(fast(x), y))
                (cross_entropy(fast(x_query), y_query) / len(task.tasks())).backward()
        return {name: value.grad for name, value in network.named_parameters() if value.grad is not None}

    return step
