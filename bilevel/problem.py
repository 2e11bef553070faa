"""What a user writes: an inner problem, an outer loss, and hyperparameters in natural units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bilevel.broadcast import Broadcast
from bilevel.constraints import Constraint
from bilevel.errors import UsageError
from bilevel.tree import Nested, to

Batches = Callable[[int, int], Any]  # (outer step, inner step) -> batch, a pure function of both
Episodes = Callable[[int], tuple[Any, Any]]  # outer step -> (inner batch, outer batch), a pure function of it


class Problem:
    r"""A bilevel problem: `min_hparams outer_loss(params*, hparams)` with `params* = argmin inner_loss(params, hparams)`.

    Write `init_hparams`, `init_params`, `outer_loss` and one of

    * `inner_loss(params, hparams, batch)`, a scalar to minimise;
    * `outputs(params, hparams, batch)`, `output_loss(outputs, hparams, batch) -> (B,)` and, if wanted,
      `penalty(params, hparams)`, from which `inner_loss` follows as mean plus penalty;
    * `optimality(params, hparams, batch)`, a dictionary like `params` that is zero at the solution, for an inner problem
      that is no minimisation (equilibria, fixed points).

    A method `anchor(hparams) -> (strength, centre)` adds the proximal term `½ Σ strength (params - centre)²` to the inner
    loss, which solvers differentiate without autograd; `strength` is a number or a dictionary like `params`, `centre` is one.

    A method `restricted(kept) -> Problem`, of boolean masks by the names of `params`, returns the same problem with the entries
    that are kept, as vectors, and all others zero: sparse solutions then cost what their entries cost (`ProximalNewton`,
    `Implicit`).

    Tensors that the problem holds as attributes move with `to`, and starting values and batches follow. Everything is
    written for *one* system; set `num_tasks` and give batches a leading task dimension to have that many solved at once
    and their outer losses averaged.

    Attributes:
        constraints: typed hyperparameters, by name or by dotted prefix, for instance `{"penalty": Positive()}`.
        num_tasks: number of systems, or None for a single one without a task dimension.
        inner_batches: None for a full-batch inner problem, else `(step, inner_step) -> batch`, unbiased.
        outer_batches: likewise for the outer loss; called with inner step 0.
        episodes: None, or `step -> (inner batch, outer batch)`, both fixed within a step: every outer step has an inner problem
            of its own, as the tasks of meta-learning are, so that none starts where another has ended.
        handles_tasks: whether the functions above take all tasks at once, `params` and batch with the leading task dimension,
            and return losses `(num_tasks,)`; else they are written for one task, and run under `vmap`.
        tasks_at_once: how many tasks' outer losses are differentiated at a time, which bounds memory; None: all.
        broadcasts: which hyperparameter belongs to which tensor of params, for options of the inner solver: wanted where their
            names do not say it, as those of groups.

    Example:
        >>> from bilevel.constraints import Positive
        >>> class Ridge(Problem):
        ...     constraints = {"penalty": Positive()}
        ...     def __init__(self):
        ...         self.x, self.y = torch.eye(2), torch.tensor([1.0, 2.0])
        ...     def init_hparams(self):
        ...         return {"penalty": torch.tensor(1.0)}
        ...     def init_params(self, hparams):
        ...         return {"w": torch.zeros(2)}
        ...     def inner_loss(self, params, hparams, batch):
        ...         return (self.x @ params["w"] - self.y).square().sum() + hparams["penalty"] * params["w"].square().sum()
        ...     def outer_loss(self, params, hparams, batch):
        ...         return (params["w"] - self.y).square().sum()
        >>> Ridge().to(dtype=torch.float64).x.dtype
        torch.float64
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {}
    num_tasks: int | None = None
    inner_batches: Batches | None = None
    outer_batches: Batches | None = None
    episodes: Episodes | None = None
    handles_tasks: bool = False
    tasks_at_once: int | None = None
    broadcasts: Sequence[Broadcast] = ()
    _device: torch.device | None = None
    _dtype: torch.dtype | None = None

    def init_hparams(self) -> Mapping[str, Any]:
        """Starting hyperparameters in natural units; may be nested, names become dotted."""
        raise UsageError(
            f"{type(self).__name__} needs a method init_hparams(self) that returns a dictionary of tensors."
        )

    def init_params(self, hparams: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """Starting point of the inner solve, for one task; may depend on the hyperparameters."""
        raise UsageError(f"{type(self).__name__} needs a method init_params(self, hparams) that returns a dictionary.")

    def inner_loss(self, params: Mapping[str, Tensor], hparams: Mapping[str, Tensor], batch: Any) -> Tensor:
        """The inner objective, a scalar; by default the mean of `output_loss` plus the `penalty`."""
        if not hasattr(self, "outputs") or not hasattr(self, "output_loss"):
            raise UsageError(
                f"{type(self).__name__} needs inner_loss(self, params, hparams, batch), or outputs and output_loss."
            )
        loss: Tensor = self.output_loss(self.outputs(params, hparams, batch), hparams, batch).mean()
        return loss + self.penalty(params, hparams) if hasattr(self, "penalty") else loss

    def outer_loss(self, params: Mapping[str, Tensor], hparams: Mapping[str, Tensor], batch: Any) -> Tensor:
        """The outer objective, a scalar."""
        raise UsageError(f"{type(self).__name__} needs a method outer_loss(self, params, hparams, batch).")

    def lower_curvature(self, hparams: Mapping[str, Tensor]) -> float | None:
        """A lower bound of the eigenvalues of the inner Hessian, for the error estimate: it is certified if there is one.

        For a convex loss with a penalty `λ ‖x‖² / 2` on all parameters the smallest `λ`; a damping. None: unknown.
        """
        return None

    def metrics(self, params: Mapping[str, Tensor], hparams: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Figures to log after each outer step, besides the losses."""
        return {}

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Self:
        """Move what the problem holds (tensors, modules, containers of them); floating-point tensors also change dtype.

        Device and dtype are remembered: starting values and batches follow, wherever the problem's methods make them.
        """
        for name, value in vars(self).items():
            setattr(self, name, to(value, device, dtype))
        self._device = self._device if device is None else torch.device(device)
        self._dtype = dtype or self._dtype
        return self

    def place(self, value: Nested) -> Nested:
        """Tensors, however nested, on the device and in the dtype of the latest `to`; untouched if there was none."""
        return to(value, self._device, self._dtype)
