"""Meta-learning: few-shot problems, and the hypergradients that only they have."""

from bilevel.meta.callback import FewShotEvaluation
from bilevel.meta.evaluation import Adaptation, Mean, evaluate
from bilevel.meta.few_shot import FewShot, HeadFewShot, LearnedRateFewShot, ProximalFewShot
from bilevel.meta.first_order import FirstOrder, Reptile
from bilevel.meta.objectives import Classification, Regression, TaskObjective
from bilevel.meta.ridge import RidgeFewShot

__all__ = [
    "Adaptation",
    "Classification",
    "FewShot",
    "FewShotEvaluation",
    "FirstOrder",
    "HeadFewShot",
    "LearnedRateFewShot",
    "Mean",
    "ProximalFewShot",
    "Regression",
    "Reptile",
    "RidgeFewShot",
    "TaskObjective",
    "evaluate",
]
