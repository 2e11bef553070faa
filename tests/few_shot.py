"""Few-shot problems that are quickly solved: quadratic tasks with a closed form, small images of noisy prototypes."""

import functools

import torch

from bilevel import Positive, Problem
from bilevel.data import ClassEpisodes
from bilevel.hypergradient import Implicit
from bilevel.linalg import ConjugateGradient
from bilevel.models import Conv4, FeatureNetwork
from bilevel.tree import flatten_names

ADAM = functools.partial(torch.optim.Adam, lr=0.01)
EXACT = Implicit(warm_start=False, linear_solver=ConjugateGradient(rtol=1e-12), error_estimate=None)


def start_of(problem):
    return problem.place(flatten_names(problem.init_hparams()))


def images(num_classes=10, side=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    prototypes = torch.randint(0, 256, (num_classes, 1, side, side, 1), generator=draw)
    noise = torch.randint(-40, 40, (num_classes, 8, side, side, 1), generator=draw)
    return (prototypes + noise).clamp(0, 255).to(torch.uint8)


def characters(way=3, **sizes):
    return ClassEpisodes(
        images(), {"train": range(6), "test": range(7, 10)}, way=way, num_query=2, rotated_parts=["train"], **sizes
    )


def conv(way=3, activation="softplus"):
    return Conv4(way, num_filters=3, image_size=8, num_layers=2, activation=activation)


class OneTask(FeatureNetwork):
    """The network as a user would write it: for one task, in torch's own operations."""

    handles_tasks = False
    num_outputs = 3

    def __init__(self, loops=False):
        self.network, self.loops = conv(), loops

    def init(self, seed):
        return self.network.init(seed)

    def features(self, params, inputs):
        x = inputs.permute(0, 3, 1, 2)
        if self.loops and float(inputs.sum()) < 0:  # what vmap cannot do
            return x
        for layer in range(2):
            weight, gain, bias = (params[f"conv{layer}.{part}"] for part in ("weight", "gain", "bias"))
            x = torch.nn.functional.conv2d(x, weight.permute(0, 3, 1, 2), None, 2, 1)
            mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
            x = (x - mean) / (variance + 1e-5).sqrt() * gain.view(-1, 1, 1) + bias.view(-1, 1, 1)
            x = torch.nn.functional.softplus(x)
        return x.permute(0, 2, 3, 1).flatten(1)


class Spelled(Problem):
    """`x^T A_t x / 2 - b_t^T x + strength ‖x - init‖² / 2` and `‖x - c_t‖² / 2`, five tasks of six unknowns."""

    constraints = {"strength": Positive()}
    num_tasks = 5

    def __init__(self, seed, per_tensor=False):
        draw = torch.Generator().manual_seed(seed)
        self.init = {name: torch.randn(3, generator=draw) for name in ("u", "v")}
        self.strengths = {"strength.u": torch.tensor(0.7), "strength.v": torch.tensor(1.9)}
        self.per_tensor = per_tensor

    def episodes(self, step):
        draw = torch.Generator().manual_seed(step)
        root = torch.randn(5, 6, 6, generator=draw)
        inner = {"A": root @ root.mT / 6, "b": torch.randn(5, 6, generator=draw)}
        return inner, {"c": torch.randn(5, 6, generator=draw)}

    def init_hparams(self):
        return {"init": self.init, **(self.strengths if self.per_tensor else {"strength": torch.tensor(1.3)})}

    def init_params(self, hparams):
        return {name: hparams[f"init.{name}"] for name in ("u", "v")}

    def support_loss(self, params, batch):
        x = torch.cat([params["u"], params["v"]])
        return x @ batch["A"] @ x / 2 - batch["b"] @ x

    def inner_loss(self, params, hparams, batch):
        strengths = {name: hparams[f"strength.{name}" if self.per_tensor else "strength"] for name in params}
        term = sum(strengths[n] * (params[n] - hparams[f"init.{n}"]).square().sum() for n in params)
        return self.support_loss(params, batch) + term / 2

    def outer_loss(self, params, hparams, batch):
        return (torch.cat([params["u"], params["v"]]) - batch["c"]).square().sum() / 2

    def closed_form(self, hparams, step):
        inner, outer = self.episodes(step)
        strength = (
            torch.cat([hparams[f"strength.{name}"].expand(3) for name in ("u", "v")])
            if self.per_tensor
            else hparams["strength"].expand(6)
        )
        init = torch.cat([hparams["init.u"], hparams["init.v"]])
        x = torch.linalg.solve(inner["A"] + strength.diag(), inner["b"] + strength * init)
        return (x - outer["c"]).square().sum(-1).mean() / 2


class Quadratics(Spelled):
    """The same with the term as an anchor."""

    def inner_loss(self, params, hparams, batch):
        return self.support_loss(params, batch)

    def anchor(self, hparams):
        strengths = (
            {name: hparams[f"strength.{name}"] for name in ("u", "v")} if self.per_tensor else hparams["strength"]
        )
        return strengths, self.init_params(hparams)
