"""A problem between plain vectors: ravelled once, placed on its device, tasks batched, shapes checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.errors import UsageError
from bilevel.problem import Batches, Problem
from bilevel.purity import Purity
from bilevel.solvers import Objective
from bilevel.tree import Layout, TensorDict, flatten_names

Loss = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Any], Tensor]
Batched = Callable[[Tensor, Mapping[str, Tensor]], Tensor]  # over the tasks' leading dimension, if there is one


class Model(NamedTuple):
    """An inner loss `mean output_loss(outputs(x)) + penalty(x)` in its parts, each a function of `(tensor, hparams)`.

    Attributes:
        outputs: `(*batch, n) -> (*batch, m)`, flattened.
        output_loss: `(*batch, m) -> (*batch,)`, the mean over examples.
        penalty: `(*batch, n) -> (*batch,)`; None where the problem has none.
    """

    outputs: Batched
    output_loss: Batched
    penalty: Batched | None


def natural_hparams(problem: Problem) -> TensorDict:
    """The starting hyperparameters under their dotted names, in natural units, where the problem is."""
    return problem.place(flatten_names(problem.init_hparams()))


@dataclass(frozen=True)
class FlatProblem:
    """A `Problem` as solvers and hypergradient methods see it: `params` are vectors `(n,)` or `(num_tasks, n)`.

    Attributes:
        problem: what the user wrote.
        layout: names and shapes of one task's parameters.
        purity: keeps the problem's functions fixed inside a solve.
    """

    problem: Problem
    layout: Layout
    purity: Purity = field(repr=False, compare=False)

    @classmethod
    def of(cls, problem: Problem, hparams: Mapping[str, Tensor]) -> FlatProblem:
        """Look at the starting parameters once."""
        with torch.no_grad():
            return cls(problem, Layout.of(_starting_params(problem, hparams)), Purity.of(problem))

    @property
    def num_batch(self) -> int:
        """Leading dimensions of `params`: 1 with tasks, else 0."""
        return 0 if self.problem.num_tasks is None else 1

    def start(self, hparams: Mapping[str, Tensor]) -> Tensor:
        """The starting point, differentiable in the hyperparameters; the same for every task."""
        x = self.layout.ravel(_starting_params(self.problem, hparams))
        return x if self.problem.num_tasks is None else x.expand(self.problem.num_tasks, -1).clone()

    def unravel(self, params: Tensor) -> TensorDict:
        """Named parameters, with a leading task dimension if there are tasks."""
        return self.layout.unravel(params)

    def objective(self, batch: Any) -> Objective:
        """The inner problem on a batch.

        Raises:
            UsageError: there are tasks, and a tensor of the batch has no leading dimension of their number.
        """
        optimality = getattr(self.problem, "optimality", None)
        if optimality is None:
            return self.loss_objective(batch)

        def residual(params: Mapping[str, Tensor], hparams: Mapping[str, Tensor], data: Any) -> Tensor:
            try:
                return self.layout.ravel(flatten_names(optimality(params, hparams, data)))
            except UsageError as error:
                raise UsageError(f"optimality was expected to return a dictionary like params: {error}") from error

        return Objective(optimality=self._over_tasks(residual, "optimality", "inner_batches", batch, is_scalar=False))

    def loss_objective(self, batch: Any) -> Objective:
        """The problem's `inner_loss` on a batch, also where it has an `optimality` besides."""
        return Objective(loss=self._over_tasks(self.problem.inner_loss, "inner_loss", "inner_batches", batch))

    def outer_loss(self, params: Tensor, hparams: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Outer loss of each task, `(*batch,)`; raises `UsageError` as `objective` does."""
        return self._over_tasks(self.problem.outer_loss, "outer_loss", "outer_batches", batch)(params, hparams)

    def model(self, params: Tensor, hparams: Mapping[str, Tensor], batch: Any) -> Model:
        """The parts that `inner_loss` is made of: outputs, their mean loss, and the penalty.

        Raises:
            UsageError: the problem defines no `outputs` and `output_loss`, or an `inner_loss` of its own beside them.
        """
        problem = self.problem
        outputs, output_loss = getattr(problem, "outputs", None), getattr(problem, "output_loss", None)
        if outputs is None or output_loss is None or type(problem).inner_loss is not Problem.inner_loss:
            raise UsageError(
                "the Gauss-Newton matrix (and K-FAC) needs a problem whose inner loss is made of outputs and output_loss (and "
                f"penalty), but {type(problem).__name__} defines inner_loss as a whole: write outputs(params, hparams, batch) "
                "and output_loss(outputs, hparams, batch) instead, or take what needs the Hessian alone "
                "(preconditioner=nystrom, negative_curvature=minres)."
            )

        def shaped(x: Tensor, h: Mapping[str, Tensor], data: Any) -> Tensor:
            value: Tensor = outputs(self.layout.unravel(x), h, data)
            return value

        with torch.no_grad():  # under the name of inner_loss, as flat_outputs, to meet its random numbers
            shape = self._tasks(shaped, "inner_loss", "inner_batches", batch)(params, hparams).shape[self.num_batch :]

        def flat_outputs(x: Tensor, h: Mapping[str, Tensor], data: Any) -> Tensor:
            return shaped(x, h, data).flatten()

        def mean_loss(flat: Tensor, h: Mapping[str, Tensor], data: Any) -> Tensor:
            value: Tensor = output_loss(flat.reshape(shape), h, data)
            return value.mean()

        penalty = getattr(problem, "penalty", None)
        return Model(
            outputs=self._tasks(flat_outputs, "inner_loss", "inner_batches", batch),
            output_loss=self._tasks(mean_loss, "output_loss", "inner_batches", batch),
            penalty=None
            if penalty is None
            else self._tasks(lambda x, h, data: penalty(self.layout.unravel(x), h), "penalty", "inner_batches", batch),
        )

    def _over_tasks(self, function: Loss, name: str, source: str, batch: Any, *, is_scalar: bool = True) -> Batched:
        def single(x: Tensor, hparams: Mapping[str, Tensor], data: Any) -> Tensor:
            value = function(self.layout.unravel(x), hparams, data)
            if is_scalar and (not isinstance(value, Tensor) or value.ndim != 0):
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise UsageError(
                    f"{name} was expected to return a scalar tensor for one task, but returned {shape}: "
                    "take the mean or the sum."
                )
            return value

        return self._tasks(single, name, source, batch)

    def _tasks(
        self, single: Callable[[Tensor, Mapping[str, Tensor], Any], Tensor], name: str, source: str, batch: Any
    ) -> Batched:
        """A function of one task, applied to all of them with their parts of the batch; one fixed function in a solve."""
        frozen = self.purity.freeze(single, name)
        if self.problem.num_tasks is None:
            return lambda x, hparams: frozen(x, hparams, batch)
        if batch is not None:
            _check_tasks(batch, self.problem.num_tasks, source)
        over = torch.vmap(frozen, in_dims=(0, None, None if batch is None else 0), randomness="different")
        return lambda x, hparams: over(x, hparams, batch)


@dataclass(frozen=True)
class StepBatches:
    """The batches of one outer step, each a pure function of the step's number, so that nothing has to be stored.

    Attributes:
        problem: where they come from, and on whose device they are put.
        step: number of the outer step.
    """

    problem: Problem
    step: int

    @property
    def stochastic(self) -> bool:
        """Whether the inner problem has minibatches."""
        return self.problem.inner_batches is not None

    def inner(self, inner_step: int) -> Any:
        """The batch of an inner step; None for the full batch."""
        return self._drawn(self.problem.inner_batches, inner_step)

    @property
    def curvature(self) -> Any:
        """The one inner batch that all Hessian products of this step share: the operator must not change between them."""
        return self.inner(-1)

    @property
    def outer(self) -> Any:
        """The batch of the outer loss."""
        return self._drawn(self.problem.outer_batches, 0)

    def _drawn(self, batches: Batches | None, inner_step: int) -> Any:
        return None if batches is None else self.problem.place(batches(self.step, inner_step))


def _starting_params(problem: Problem, hparams: Mapping[str, Tensor]) -> TensorDict:
    return problem.place(flatten_names(problem.init_params(hparams)))


def _check_tasks(batch: Any, num_tasks: int, source: str) -> None:
    for name, part in named_parts(batch, source):
        if not isinstance(part, Tensor):
            came = f"is a {type(part).__name__}"
        elif part.ndim == 0 or part.shape[0] != num_tasks:
            came = f"has shape {tuple(part.shape)}"
        else:
            continue
        raise UsageError(
            f"{name} was expected to be a tensor with num_tasks={num_tasks} as its leading dimension, but {came}: "
            "stack the tasks' data along dimension 0."
        )


def named_parts(batch: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What a batch of nested dictionaries, lists and tuples consists of, each part with its place.

    Example:
        >>> [place for place, _ in named_parts({"x": (1, 2), "y": 3}, "batch")]
        ["batch['x'][0]", "batch['x'][1]", "batch['y']"]
    """
    if isinstance(batch, Mapping):
        for key, part in batch.items():
            yield from named_parts(part, f"{name}[{key!r}]")
    elif isinstance(batch, list | tuple):
        for index, part in enumerate(batch):
            yield from named_parts(part, f"{name}[{index}]")
    else:
        yield name, batch
