"""Steps within a trust region, for a batch of models that need not be convex."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bilevel.linalg import LinearOperator
from bilevel.linalg.system import columns, divide
from bilevel.solvers.line_search import Point


class ModelStep(NamedTuple):
    """A step that lowers the model `g'd + ½ d'Hd` of each system.

    Attributes:
        direction: the step, `(*batch, n)`.
        predicted: by how much it lowers the model, `(*batch,)`.
        bounded: whether it was ended by the region, or by a curvature that is negative or unknown, `(*batch,)`.
        num_mv: products with `H`.
    """

    direction: Tensor
    predicted: Tensor
    bounded: Tensor
    num_mv: int


def truncated_cg(
    hessian: LinearOperator, gradient: Tensor, radius: Tensor, tolerance: Tensor, max_products: int
) -> ModelStep:
    r"""Steihaug's method: conjugate gradient on `H d = -g`, ended at the boundary `‖d‖ = radius` of each system's region.

    Iterates of CG grow longer with each step, so the first to leave the region is cut at its boundary. Along a direction of
    negative curvature the model falls for ever, so there the step goes to the boundary as well; where the region has none
    (an infinite radius), as far as a curvature of the other sign would send it, which is a length in the model's own units.
    Where no curvature says how far (it is zero, or not finite) the first step is the gradient's own, `d = -g`, and a later
    one is left out. A linear solver could not do this: its steps know of no boundary, and it has no use for a direction of
    negative curvature. The residual is never computed anew: what float32 loses in 200 steps is a thousandth of the decrease.

    Args:
        hessian: symmetric, definite or not.
        gradient: `g`, `(*batch, n)`.
        radius: of each region, `(*batch,)`.
        tolerance: norm of the residual `g + Hd` that is small enough, `(*batch,)`.
        max_products: largest number of products with `H`.

    Reference: Steihaug (1983), "The conjugate gradient method and trust regions in large scale optimization".
    """
    inner = hessian.inner
    step, residual = torch.zeros_like(gradient), -gradient
    direction, rho = residual, inner(residual, residual)
    going = rho.sqrt() > tolerance
    bounded = torch.zeros_like(going)
    num_mv = 0
    while num_mv < max_products and bool(going.any()):
        product = hessian.mv(direction)
        num_mv += 1
        curvature = inner(direction, product)
        finite = curvature.isfinite()
        if not bool(finite.all()):
            product = torch.where(columns(finite), product, 0.0)
        room = _room(hessian, step, direction, radius)
        natural = rho / curvature.abs()
        told = finite & natural.isfinite()  # how far
        natural = torch.where(told, natural, 1.0 if num_mv == 1 else 0.0)
        ends = ~told | (curvature < 0) | (natural >= room)
        length = torch.where(ends & room.isfinite(), room, natural).where(going, 0.0)
        step = torch.addcmul(step, columns(length), direction)
        residual = torch.addcmul(residual, columns(length), product, value=-1)
        new_rho = inner(residual, residual)
        bounded, going = bounded | (going & ends), going & ~ends & (new_rho.sqrt() > tolerance)
        direction = torch.addcmul(residual, columns(divide(new_rho, rho)), direction)
        rho = new_rho
    # H d = -(g + residual), so that the model is -½ (residual'd - g'd) without another product.
    return ModelStep(step, (inner(residual, step) - inner(gradient, step)) / 2, bounded, num_mv)


def _room(hessian: LinearOperator, step: Tensor, direction: Tensor, radius: Tensor) -> Tensor:
    """The positive `t` with `‖step + t direction‖ = radius`, where `step'direction >= 0`, in the form that does not cancel."""
    square, mixed = hessian.inner(direction, direction), hessian.inner(step, direction)
    left = (radius.square() - hessian.inner(step, step)).clamp(min=0)
    return divide(left, mixed + (mixed.square() + square * left).sqrt()).where(radius.isfinite(), torch.inf)


def next_radius(radius: Tensor, start: Point, end: Point, model: ModelStep) -> Tensor:
    """The region after a step: smaller where the model promised too much, larger where it held up to the boundary.

    A step that a line search shortened makes its length the radius. Where the promised decrease is below the rounding of the
    loss there is nothing to judge by, and the region stays.

    Reference: Nocedal and Yuan (1998), "Combining trust region and line search techniques".
    """
    asked, taken = (torch.linalg.vector_norm(one, dim=-1) for one in (model.direction, end.params - start.params))
    decrease = start.value - end.value
    shortened = taken < 0.9 * asked  # a line search halves
    poor, good = decrease < 0.25 * model.predicted, decrease > 0.75 * model.predicted
    region = torch.where(model.bounded, torch.where(good, 2 * asked, asked), radius)
    region = torch.where(poor, asked / 4, region)
    region = torch.where(shortened & (taken > 0), taken, region)
    judged = model.predicted > 10 * torch.finfo(decrease.dtype).eps * start.value.abs()
    return torch.where(judged, region, radius)
