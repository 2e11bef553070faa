"""What a Hessian-vector product costs, in gradients (forward + backward of the same function at the same point).

    python -m benchmarks.operators

`HessianOperator` builds the gradient's graph once; "build" is that, "product" is the marginal price of one more
product, and "with its share of the build" is what each of 20 products costs when they share it. The other rows compute
the same product in the ways that are usual elsewhere.

The convolutional network normalises each batch by its own statistics, once by torch's kernel and once in plain
operations (the same function). The kernel's gradient is the faster one and is the unit of all its rows; its second
derivative is slow, so the plain operations make the faster products, and these are what the claim is about.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common import Claim, Row, finish, interleaved, parse, table
from bilevel.linalg import HessianOperator
from bilevel.tree import Layout

PRODUCTS = 20
WAY = 5  # classes of an episode
GRADIENT, BUILD, PRODUCT = "gradient", "build", "product"
SHARED = f"product with its share of the build, of {PRODUCTS}"
REWRITTEN = ", normalisation in plain operations"

Normalise = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Network:
    """A loss as a function of one vector of parameters.

    Attributes:
        name: what it is.
        loss: `(n,) -> ()`.
        point: where to differentiate.
    """

    name: str
    loss: Callable[[Tensor], Tensor]
    point: Tensor


def mlp(sizes: tuple[int, ...], num_examples: int, device: str) -> Network:
    """Softmax regression on top of tanh layers, with weight decay."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(num_examples, sizes[0], generator=draw).to(device)
    labels = torch.randint(sizes[-1], (num_examples,), generator=draw).to(device)
    params: dict[str, Tensor] = {}
    for number, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        params[f"{number}.weight"] = torch.randn(fan_out, fan_in, generator=draw) / fan_in**0.5
        params[f"{number}.bias"] = torch.zeros(fan_out)
    layout = Layout.of(params)

    def loss(vector: Tensor) -> Tensor:
        values = layout.unravel(vector)
        hidden = inputs
        for number in range(len(sizes) - 1):
            hidden = functional.linear(hidden, values[f"{number}.weight"], values[f"{number}.bias"])
            if number < len(sizes) - 2:
                hidden = hidden.tanh()
        return functional.cross_entropy(hidden, labels) + 0.5e-2 * vector.square().sum()

    name = f"MLP {'-'.join(map(str, sizes))}, batch {num_examples:,}"
    return Network(name, loss, layout.ravel(params).to(device))


def convolutional(
    num_examples: int, filters: int, normalise: Normalise, device: str, dtype: torch.dtype = torch.float32
) -> Network:
    """The Omniglot network of MAML: four blocks of 3 x 3 convolution (stride 2), batch normalisation and ReLU."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.rand(num_examples, 1, 28, 28, generator=draw).to(device, dtype)
    labels = (torch.arange(num_examples) % WAY).to(device)
    params: dict[str, Tensor] = {}
    for block in range(4):
        channels = 1 if block == 0 else filters
        params[f"{block}.weight"] = torch.randn(filters, channels, 3, 3, generator=draw) / (9 * channels) ** 0.5
        params[f"{block}.bias"] = torch.zeros(filters)
        params[f"{block}.scale"] = torch.ones(filters)
        params[f"{block}.shift"] = torch.zeros(filters)
    params["head.weight"] = torch.randn(WAY, 4 * filters, generator=draw) / (4 * filters) ** 0.5
    params["head.bias"] = torch.zeros(WAY)
    layout = Layout.of(params)

    def loss(vector: Tensor) -> Tensor:
        values = layout.unravel(vector)
        hidden = inputs
        for block in range(4):
            hidden = functional.conv2d(hidden, values[f"{block}.weight"], values[f"{block}.bias"], stride=2, padding=1)
            hidden = normalise(hidden, values[f"{block}.scale"], values[f"{block}.shift"]).relu()
        logits = functional.linear(hidden.flatten(1), values["head.weight"], values["head.bias"])
        return functional.cross_entropy(logits, labels) + 0.5e-2 * vector.square().sum()

    name = f"4 conv blocks, {filters} filters, {num_examples} images"
    return Network(name, loss, layout.ravel(params).to(device, dtype))


def fused(inputs: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Batch normalisation with the batch's own statistics by torch's kernel: nothing is tracked, so it is pure."""
    return functional.batch_norm(inputs, None, None, scale, shift, training=True)


def plain(inputs: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The same function in plain operations: its gradient costs more than the kernel's, its second derivative less."""
    variance, mean = torch.var_mean(inputs, (0, 2, 3), correction=0)
    factor = (variance + 1e-5).rsqrt() * scale
    return inputs * factor[:, None, None] + (shift - mean * factor)[:, None, None]


def gradient(network: Network) -> Tensor:
    """Forward and backward."""
    leaf = network.point.detach().requires_grad_()
    return torch.autograd.grad(network.loss(leaf), leaf)[0]


def ways_of(network: Network, vector: Tensor) -> dict[str, Callable[[], Tensor]]:
    """A gradient, and the same product in several ways."""
    loss, point = network.loss, network.point
    operator = HessianOperator(loss, point)

    def rebuilt() -> Tensor:
        leaf = point.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        return torch.autograd.grad(slope, leaf, vector)[0]

    return {
        GRADIENT: lambda: gradient(network),
        BUILD: lambda: HessianOperator(loss, point).gradient,
        PRODUCT: lambda: operator.mv(vector),
        "graph rebuilt for each product": rebuilt,
        "jvp of grad (torch.func)": lambda: torch.func.jvp(torch.func.grad(loss), (point,), (vector,))[1],
    }


def measure(network: Network, rounds: int, device: str, rewritten: Network | None = None) -> list[Row]:
    """One row for each way to make a product.

    Args:
        network: its gradient is the unit.
        rounds: timed calls of each way.
        device: where it runs.
        rewritten: the same function written otherwise, whose products are measured too (in the same unit).
    """
    vector = torch.randn(network.point.shape, generator=torch.Generator().manual_seed(1)).to(device)
    ways = ways_of(network, vector)
    if rewritten is not None:
        ways |= {f"{what}{REWRITTEN}": way for what, way in ways_of(rewritten, vector).items()}
    seconds = interleaved(ways, rounds, device=device)
    for suffix in ("", REWRITTEN) if rewritten is not None else ("",):
        total = seconds[BUILD + suffix] + PRODUCTS * seconds[PRODUCT + suffix]
        seconds[SHARED + suffix] = total / PRODUCTS
    unit = seconds[GRADIENT]
    return [
        {"network": network.name, "cost of": what, "gradients": value / unit, "ms": 1e3 * value}
        for what, value in seconds.items()
    ]


def check_agreement(device: str) -> None:
    """All ways compute the same product, whichever way the normalisation is written (small, in float64)."""
    networks = [convolutional(10, 8, normalise, device, torch.float64) for normalise in (fused, plain)]
    vector = torch.linspace(-1, 1, len(networks[0].point)).to(networks[0].point)
    reference = HessianOperator(networks[0].loss, networks[0].point).mv(vector)
    for network in networks:
        for what, way in ways_of(network, vector).items():
            if what not in (GRADIENT, BUILD):
                assert (way() - reference).norm() <= 1e-9 * reference.norm(), f"{what} computes another product"


def cost(rows: list[Row], what: str) -> float:
    """The figure in gradients of one row."""
    (figure,) = (row["gradients"] for row in rows if row["cost of"] == what)
    return float(figure)


def main(argv: list[str] | None = None) -> int:
    """Measure all networks."""
    options = parse(str(__doc__).splitlines()[0], argv)
    device, rounds = options.device, 3 if options.quick else 15
    check_agreement(device)
    sizes, num_examples, filters = ((64, 64, 10), 200, 8) if options.quick else ((784, 512, 512, 10), 2000, 64)
    rows = measure(mlp(sizes, num_examples, device), rounds, device)
    claims = [Claim("product of the MLP, in gradients", cost(rows, PRODUCT), 2.0)]
    for images in (WAY * 1,) if options.quick else (WAY * 5, 4 * WAY * 5):
        conv = convolutional(images, filters, fused, device)
        part = measure(conv, rounds, device, rewritten=convolutional(images, filters, plain, device))
        name = f"product of the convolutional network with the build, {images} images, in gradients"
        claims.append(Claim(name, cost(part, SHARED + REWRITTEN), 2.8))
        rows += part
    print(table(rows))
    return finish(options, rows, claims)


if __name__ == "__main__":
    sys.exit(main())
