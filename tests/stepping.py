"""Hypergradients one after the other, as an outer loop asks for them."""

from bilevel.batches import StepBatches
from bilevel.flat import FlatProblem
from bilevel.hypergradient import differentiate, start_method


def along(problem, method, solver, settings, warm=True):
    """One at each of some hyperparameters, with the method's state of the one before, and from its solution if `warm`."""
    state, found = None, []
    for number, hparams in enumerate(settings):
        flat = FlatProblem.of(problem, hparams)
        params = found[-1].params if warm and found else flat.start(hparams)
        state = start_method(method, flat, solver, params, hparams) if state is None else state
        result = differentiate(method, flat, solver, params, hparams, StepBatches(problem, number), state)
        state = result.state
        found.append(result)
    return found
