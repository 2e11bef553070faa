"""A problem between plain vectors: ravelled once, placed on its device, tasks batched, shapes checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from bilevel.batches import check_tasks, take
from bilevel.errors import UsageError
from bilevel.problem import Problem
from bilevel.purity import Purity
from bilevel.solvers import Anchored, Objective
from bilevel.tree import Layout, TensorDict, flatten_names

if TYPE_CHECKING:
    from bilevel.solvers.compiled import CompiledGradients

Kept = TypeVar("Kept")
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
        looped: whether tasks are evaluated one after the other: where a function of the problem cannot run under `vmap`.
        beginning: where inner solves begin, instead of at the problem's `init_params`.
    """

    problem: Problem
    layout: Layout
    purity: Purity = field(repr=False, compare=False)
    looped: bool = False
    beginning: Tensor | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, problem: Problem, hparams: Mapping[str, Tensor]) -> FlatProblem:
        """Look at the starting parameters once."""
        with torch.no_grad():
            return cls(problem, Layout.of(_starting_params(problem, hparams)), Purity.of(problem))

    @property
    def num_batch(self) -> int:
        """Leading dimensions of `params`: 1 with tasks, else 0."""
        return 0 if self.problem.num_tasks is None else 1

    @property
    def is_comparable(self) -> bool:
        """Whether outer losses of different steps are those of one problem; else the latest step counts as the best."""
        return self.problem.episodes is None and self.problem.outer_batches is None

    def start(self, hparams: Mapping[str, Tensor]) -> Tensor:
        """The starting point, differentiable in the hyperparameters; the same for every task."""
        if self.beginning is not None:
            return self.beginning
        x = self.layout.ravel(_starting_params(self.problem, hparams))
        return x if self.problem.num_tasks is None else x.expand(self.problem.num_tasks, -1).clone()

    def beginning_at(self, params: Tensor) -> FlatProblem:
        """The same problem with its inner solves beginning at a given point, also where each step is an episode of its own."""
        return replace(self, beginning=params.detach())

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
        if hasattr(self.problem, "anchor"):
            raise UsageError(
                f"{type(self.problem).__name__} has an optimality and an anchor, which belongs to an inner_loss: add "
                "strength (params - centre) to the optimality."
            )

        def residual(params: Mapping[str, Tensor], hparams: Mapping[str, Tensor], data: Any) -> Tensor:
            try:
                return self.layout.ravel(flatten_names(optimality(params, hparams, data)))
            except UsageError as error:
                raise UsageError(f"optimality was expected to return a dictionary like params: {error}") from error

        return Objective(optimality=self._over_tasks(residual, "optimality", "inner_batches", batch, is_scalar=False))

    def compiled_objective(self, batch: Any) -> Objective:
        """The same, its value and gradient as machine code where nothing is recorded; compiled once for each of its shapes."""
        gradients = self.compiled("the gradients of inner steps are")
        return replace(self.objective(batch), compiled=gradients.of(self.objective, batch, self.purity.active))

    def compiled(self, what: str) -> CompiledGradients:
        """The compiled gradients of one function of the problem, kept as long as the problem itself."""
        from bilevel.solvers.compiled import CompiledGradients  # the compiler takes half a second to import

        return self.kept(what, lambda: CompiledGradients(what))

    def kept(self, key: Any, make: Callable[[], Kept]) -> Kept:
        """What has been made under a key, for this layout, and lives as long as the problem itself: compiled programs."""
        found = _KEPT.setdefault(self.problem, {})
        key = (self.layout, self.looped, key)
        if key not in found:
            found[key] = make()
        return cast("Kept", found[key])

    def loss_objective(self, batch: Any) -> Objective:
        """The problem's `inner_loss` and anchor on a batch, also where it has an `optimality` besides."""
        loss = self._over_tasks(self.problem.inner_loss, "inner_loss", "inner_batches", batch)
        restricted = self._restricted_objective(batch) if hasattr(self.problem, "restricted") else None
        if not hasattr(self.problem, "anchor"):
            return Objective(loss=loss, restricted=restricted)
        anchored = Anchored(loss, self._anchor)
        return Objective(
            lambda x, hparams: loss(x, hparams) + anchored.value(x, hparams), anchored=anchored, restricted=restricted
        )

    def restricted(self, kept: Tensor) -> FlatProblem:
        """The problem of the entries that a mask `(n,)` keeps, all others zero; one that has a method `restricted`."""
        masks = self.layout.unravel(kept)
        smaller = Layout(self.layout.names, tuple((int(mask.sum()),) for mask in masks.values()))
        return replace(self, problem=self.problem.restricted(masks), layout=smaller, beginning=None)  # type: ignore[attr-defined]

    def _restricted_objective(self, batch: Any) -> Callable[[Tensor], Objective]:
        return lambda kept: self.restricted(kept).loss_objective(batch)

    def in_parts(self, params: Tensor, batch: Any) -> Iterator[tuple[FlatProblem, Tensor, Any]]:
        """The problem, its params and a batch, cut into as many tasks at a time as the problem's `tasks_at_once` says."""
        number, size = self.problem.num_tasks, self.problem.tasks_at_once
        if number is None or size is None or size >= number:
            yield self, params, batch
            return
        for begin in range(0, number, size):
            tasks = slice(begin, begin + size)
            yield self.with_tasks(len(params[tasks])), params[tasks], take(batch, tasks)

    def with_tasks(self, num_tasks: int) -> FlatProblem:
        """The same problem for another number of tasks."""
        problem = copy.copy(self.problem)
        problem.num_tasks = num_tasks
        return replace(self, problem=problem)

    def _anchor(self, hparams: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Strength and centre of the problem's anchor as plain vectors."""
        name = type(self.problem).__name__
        try:
            strength, centre = self.problem.anchor(hparams)  # type: ignore[attr-defined]
            flat = self.layout.ravel(flatten_names(centre))
            if isinstance(strength, Mapping):
                shapes = dict(zip(self.layout.names, self.layout.shapes, strict=True))
                strength = self.layout.ravel({key: value.expand(shapes[key]) for key, value in strength.items()})
        except (UsageError, TypeError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UsageError(
                f"{name}.anchor was expected to return a pair of strength (a number, or a dictionary like params) and centre "
                f"(a dictionary like params): {reason}."
            ) from error
        return torch.as_tensor(strength, dtype=flat.dtype, device=flat.device), flat

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
            shape = self.over_tasks(shaped, "inner_loss", "inner_batches", batch)(params, hparams).shape[
                self.num_batch :
            ]

        def flat_outputs(x: Tensor, h: Mapping[str, Tensor], data: Any) -> Tensor:
            return shaped(x, h, data).flatten()

        def mean_loss(flat: Tensor, h: Mapping[str, Tensor], data: Any) -> Tensor:
            value: Tensor = output_loss(flat.reshape(shape), h, data)
            return value.mean()

        return Model(
            outputs=self.over_tasks(flat_outputs, "inner_loss", "inner_batches", batch),
            output_loss=self.over_tasks(mean_loss, "output_loss", "inner_batches", batch),
            penalty=self._penalty(batch),
        )

    def _penalty(self, batch: Any) -> Batched | None:
        """Everything in the inner loss that is no loss of outputs: penalty and anchor."""
        penalty = getattr(self.problem, "penalty", None)
        own: Batched | None = None
        if penalty is not None:
            own = self.over_tasks(
                lambda x, h, data: penalty(self.layout.unravel(x), h), "penalty", "inner_batches", batch
            )
        if not hasattr(self.problem, "anchor"):
            return own
        rest = own or (lambda x, hparams: x.new_zeros(x.shape[:-1]))
        anchored = Anchored(rest, self._anchor)
        return lambda x, hparams: rest(x, hparams) + anchored.value(x, hparams)

    def _over_tasks(self, function: Loss, name: str, source: str, batch: Any, *, is_scalar: bool = True) -> Batched:
        def single(x: Tensor, hparams: Mapping[str, Tensor], data: Any) -> Tensor:
            value = function(self.layout.unravel(x), hparams, data)
            if is_scalar and (not isinstance(value, Tensor) or value.shape != x.shape[:-1]):
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                wanted = (
                    f"a tensor {tuple(x.shape[:-1])}, a scalar for each task,"
                    if x.ndim > 1
                    else "a scalar tensor for one task,"
                )
                raise UsageError(
                    f"{name} was expected to return {wanted} but returned {shape}: take the mean or the sum."
                )
            return value

        return self.over_tasks(single, name, source, batch)

    def over_tasks(
        self, single: Callable[[Tensor, Mapping[str, Tensor], Any], Tensor], name: str, source: str, batch: Any
    ) -> Batched:
        """A function of one task, applied to all of them with their parts of the batch; one fixed function in a solve.

        Args:
            single: of a task's params `(n,)`, hyperparameters and part of the batch; of all tasks at once where the problem
                handles them.
            name: of the user's function in it.
            source: of the batch, for messages.
            batch: of all tasks.

        Raises:
            UsageError: the batch is not that of so many tasks.
        """
        frozen = self.purity.freeze(single, name)
        if self.problem.num_tasks is None:
            return lambda x, hparams: frozen(x, hparams, batch)
        source = source if self.problem.episodes is None else "episodes"
        if batch is not None:
            check_tasks(batch, self.problem.num_tasks, source)
        if self.problem.handles_tasks:
            return lambda x, hparams: frozen(x, hparams, batch)
        if self.looped:
            return lambda x, hparams: torch.stack([frozen(one, hparams, take(batch, i)) for i, one in enumerate(x)])
        over = torch.vmap(frozen, in_dims=(0, None, None if batch is None else 0), randomness="different")
        return lambda x, hparams: over(x, hparams, batch)


# problem -> {(layout, looped, key): what is kept}; by identity, as problems may not hash
_KEPT: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _starting_params(problem: Problem, hparams: Mapping[str, Tensor]) -> TensorDict:
    return problem.place(flatten_names(problem.init_params(hparams)))
