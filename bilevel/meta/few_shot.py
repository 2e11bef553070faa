r"""Few-shot learning as a bilevel problem: tasks adapt a network to their support sets, and are judged on their query sets.

    min_init  mean over tasks of query_loss(params*),     params* = adapt(init, support)

A problem here says what is learned, what adapts and from where; how tasks adapt is the inner solver's affair, how that is
differentiated the hypergradient method's:

| method | problem | inner solver | hypergradient |
|---|---|---|---|
| iMAML | `ProximalFewShot` | gradient descent, or Newton-CG (Hessian-free) | implicit |
| MAML | `FewShot` | gradient descent | unrolled |
| first-order MAML | `FewShot` | gradient descent | first order |
| Reptile | `FewShot` | gradient descent, Adam | Reptile |
| ANIL | `HeadFewShot` | gradient descent | unrolled |
| Meta-SGD | `LearnedRateFewShot` | gradient descent at the learned rates | unrolled |
| ridge head (R2D2) | `RidgeFewShot` | Newton-CG | implicit |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.broadcast import Groups
from bilevel.constraints import Positive
from bilevel.data import Episode, Examples, Prefetched, TaskSource
from bilevel.errors import UsageError
from bilevel.meta.objectives import Classification, TaskObjective
from bilevel.meta.strengths import learned_strengths, strengths_of
from bilevel.models import FeatureNetwork, Network
from bilevel.problem import Problem
from bilevel.tree import TensorDict

Tensors = Mapping[str, Tensor]
INIT, BODY = "init", "body"
HEAD = ("head.weight", "head.bias")


class FewShot(Problem):
    """Learn the starting point of a network from which tasks adapt all of it.

    Args:
        tasks: where tasks come from.
        network: what adapts.
        objective: loss and score of a task.
        num_tasks: tasks in an outer step (the meta-batch).
        tasks_at_once: how many tasks' query losses are differentiated at a time; fewer take less memory, and less time
            where activations of all would not fit into the processor's cache.
        seed: of the starting weights and of the tasks that are drawn.
        zero_head: let the head of every task start at zero, unlearned. The classes of a task come in no order, so that rows of
            their own say nothing, and tasks have to unlearn them; rows that are all the same cancel in a softmax.

    References: Finn, Abbeel and Levine (2017), "Model-agnostic meta-learning for fast adaptation of deep networks"; Nichol,
    Achiam and Schulman (2018), "On first-order meta-learning algorithms"; Kao, Chiu and Chen (2022), "MAML is a noisy
    contrastive learner in classification" (the head that starts at zero).
    """

    needs_features: ClassVar[bool] = False  # whether the network has to have a head

    def __init__(
        self,
        tasks: TaskSource,
        network: Network,
        objective: TaskObjective | None = None,
        num_tasks: int = 16,
        tasks_at_once: int | None = 2,
        seed: int = 0,
        zero_head: bool = False,
    ) -> None:
        """Draw the starting weights."""
        for name, value, kind in (("tasks", tasks, TaskSource), ("network", network, Network)):
            if not isinstance(value, kind):
                raise UsageError(
                    f"{type(self).__name__}.{name} was expected to be a {kind.__name__}, but is {value!r}."
                )
        if tasks_at_once is not None and (not isinstance(tasks_at_once, int) or tasks_at_once < 1):
            raise UsageError(
                f"tasks_at_once was expected to be an integer of at least 1, or None, but is {tasks_at_once!r}."
            )
        self.tasks, self.network, self.objective = tasks, network, objective or Classification()
        self.num_tasks, self.tasks_at_once = num_tasks, tasks_at_once
        self.handles_tasks = network.handles_tasks
        self.start, self.zero_head = network.init(seed), zero_head
        if self.needs_features:
            need_features(self, network)
        if zero_head:
            need_features(self, network, " with zero_head", "leave zero_head out")
        way, outputs = getattr(tasks, "way", None), getattr(network, "num_outputs", None)
        if way is not None and outputs is not None and way != outputs:
            raise UsageError(
                f"tasks have {way} classes (data.way), but the network has {outputs} outputs (model.num_outputs): "
                "make them equal."
            )
        self.episodes = Prefetched(partial(_episode, tasks, num_tasks, seed))

    def init_hparams(self) -> dict[str, Any]:
        """The starting point."""
        return {INIT: self.learned_start()}

    def init_params(self, hparams: Tensors) -> TensorDict:
        """The starting point, of which every task has a copy."""
        start = under(INIT, hparams)
        if self.zero_head:
            start |= {name: torch.zeros_like(value) for name, value in self.start.items() if name in HEAD}
        return start

    def learned_start(self) -> TensorDict:
        """What is learned of the starting point: all of it, or all but a head that starts at zero."""
        return {name: value for name, value in self.start.items() if not (self.zero_head and name in HEAD)}

    def predict(self, params: Tensors, hparams: Tensors, support: Examples, inputs: Tensor) -> Tensor:
        """Outputs `(*batch, N, O)` of adapted parameters for inputs of the same tasks."""
        return self.network(params, inputs)

    def inner_loss(self, params: Tensors, hparams: Tensors, batch: Examples) -> Tensor:
        """The loss on the support set."""
        return self.objective.loss(self.predict(params, hparams, batch, batch.inputs), batch.targets)

    def outer_loss(self, params: Tensors, hparams: Tensors, batch: Episode) -> Tensor:
        """The loss on the query set."""
        outputs = self.predict(params, hparams, batch.support, batch.query.inputs)
        return self.objective.loss(outputs, batch.query.targets)


class ProximalFewShot(FewShot):
    r"""Adaptation that is held near the starting point: `support_loss + strength ‖params - init‖² / 2` (implicit MAML).

    The term makes an adapted point a function of the starting point by the implicit function theorem, however it was found.

    Args:
        tasks: where tasks come from.
        network: what adapts.
        objective: loss and score of a task.
        num_tasks: tasks in an outer step.
        tasks_at_once: tasks whose query losses are differentiated at a time.
        seed: of the starting weights and of the tasks.
        zero_head: let the head of every task start at zero, unlearned.
        strength: of the term; its starting value where it is learned.
        strengths: those of some tensors, by beginnings or patterns of their names, of which the first that fits counts:
            `{"head": 0.5}` lets the head move further than the rest.
        learned: None holds the strength fixed; `shared`, `per_layer`, `per_tensor`, `per_weight` or groups (see `Broadcast`)
            learn that many, as positive hyperparameters.

    Raises:
        UsageError: a strength is not above 0, a pattern decides about no tensor, or tensors that are to share a learned
            strength have different ones.

    Reference: Rajeswaran, Finn, Kakade and Levine (2019), "Meta-learning with implicit gradients".
    """

    def __init__(
        self,
        tasks: TaskSource,
        network: Network,
        objective: TaskObjective | None = None,
        num_tasks: int = 16,
        tasks_at_once: int | None = 2,
        seed: int = 0,
        zero_head: bool = False,
        strength: float = 2.0,
        strengths: Mapping[str, float] | None = None,
        learned: str | Groups | None = None,
    ) -> None:
        """Check the strength."""
        super().__init__(tasks, network, objective, num_tasks, tasks_at_once, seed, zero_head)
        self.strengths = strengths_of({} if strengths is None else strengths, strength, self.start)
        self.broadcast = None if learned is None else learned_strengths(learned, self.strengths, self.start)
        if self.broadcast is not None:
            self.constraints = {"strength": Positive()}  # type: ignore[misc]  # a hyperparameter of some objects only

    def init_hparams(self) -> dict[str, Any]:
        """The starting point, and the strengths that are learned."""
        if self.broadcast is None:
            return super().init_hparams()
        learned = self.broadcast.start(1.0, next(iter(self.start.values())))
        for name, owner in self.broadcast.owners.items():
            learned[owner] = torch.full_like(learned[owner], self.strengths[name])
        return {**super().init_hparams(), **learned}

    def anchor(self, hparams: Tensors) -> tuple[Any, TensorDict]:
        """The strengths and the starting point."""
        centre = self.init_params(hparams)
        if self.broadcast is not None:
            return self.broadcast.expand(hparams), centre
        if len(set(self.strengths.values())) == 1:
            return next(iter(self.strengths.values())), centre
        return {name: value.new_full((), self.strengths[name]) for name, value in centre.items()}, centre


class HeadFewShot(FewShot):
    """Learn the features and the starting point of the head, which alone adapts (ANIL).

    References: Raghu, Raghu, Bengio and Vinyals (2020), "Rapid learning or feature reuse? Towards understanding the
    effectiveness of MAML".
    """

    network: FeatureNetwork
    needs_features = True

    def init_hparams(self) -> dict[str, Any]:
        """The body, and the head's starting point."""
        start = self.learned_start()
        head = {name: value for name, value in start.items() if name in HEAD}
        return {BODY: {name: value for name, value in start.items() if name not in head}, INIT: head}

    def predict(self, params: Tensors, hparams: Tensors, support: Examples, inputs: Tensor) -> Tensor:
        """The adapted head on the features."""
        return self.network.head(params, self.network.features(under(BODY, hparams), inputs))


class LearnedRateFewShot(FewShot):
    """Learn the starting point and a learning rate for each weight, which the solver takes by name (Meta-SGD).

    Args:
        tasks: where tasks come from.
        network: what adapts.
        objective: loss and score of a task.
        num_tasks: tasks in an outer step.
        tasks_at_once: tasks whose query losses are differentiated at a time.
        seed: of the starting weights and of the tasks.
        zero_head: let the head of every task start at zero, unlearned; its rates are learned.
        rate: where every learning rate starts; it may become negative, as in the paper.

    Raises:
        UsageError: the rate is no finite number.

    Reference: Li, Zhou, Chen and Li (2017), "Meta-SGD: learning to learn quickly for few-shot learning".
    """

    def __init__(
        self,
        tasks: TaskSource,
        network: Network,
        objective: TaskObjective | None = None,
        num_tasks: int = 16,
        tasks_at_once: int | None = 2,
        seed: int = 0,
        zero_head: bool = False,
        rate: float = 0.1,
    ) -> None:
        """Check the rate."""
        if not (isinstance(rate, int | float) and math.isfinite(rate)):
            raise UsageError(f"rate, where all learning rates start, was expected to be a number, but is {rate!r}.")
        super().__init__(tasks, network, objective, num_tasks, tasks_at_once, seed, zero_head)
        self.rate = rate

    def init_hparams(self) -> dict[str, Any]:
        """The starting point and the rates."""
        rates = {name: torch.full_like(value, self.rate) for name, value in self.start.items()}
        return {INIT: self.learned_start(), "rate": rates}


def under(prefix: str, hparams: Tensors) -> TensorDict:
    """The hyperparameters of a group, by their names inside it.

    Example:
        >>> under("init", {"init.w": torch.ones(1), "strength": torch.ones(())})
        {'w': tensor([1.])}
    """
    return {name.removeprefix(f"{prefix}."): value for name, value in hparams.items() if name.startswith(f"{prefix}.")}


def need_features(
    problem: Problem, network: Network, what: str = "", instead: str = "let all of it adapt (FewShot)"
) -> None:
    """Refuse a network that cannot be taken apart into features and head."""
    if not isinstance(network, FeatureNetwork):
        raise UsageError(
            f"{type(problem).__name__}{what} needs a network of features and a head (a FeatureNetwork such as Conv4), but "
            f"{type(network).__name__} is not: derive it from FeatureNetwork, or {instead}."
        )


def _episode(tasks: TaskSource, num_tasks: int, seed: int, step: int) -> tuple[Examples, Episode]:
    """The tasks of an outer step as inner and outer batch."""
    episode = tasks.draw("train", num_tasks, seed, step)
    return episode.support, episode
