"""FLOPs of an algorithm: its matmuls and convolutions, counted in its jaxpr, whatever the hardware executes.

A matmul of (m, k) and (k, n) counts 2 m k n. Recomputation, padding and elementwise ops count nothing, so that model FLOPs
utilization, the ratio to a chip's peak (Chowdhery et al. 2022, appendix B), does not reward them. The backward pass of a
network is taken to need twice its forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend


def count(function: Callable, *args: Any) -> float:
    """FLOPs of function(*args); the arguments may be shapes."""
    return _of(jax.make_jaxpr(function)(*args).jaxpr)


def _of(jaxpr: Any) -> float:
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name in ("dot_general", "conv_general_dilated"):
        (left, right), out = (var.aval.shape for var in equation.invars), equation.outvars[0].aval.shape
        if name == "dot_general":
            each = math.prod(left[dim] for dim in params["dimension_numbers"][0][0])
        else:
            each = math.prod(right) / right[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(out) * each
    inner = [_of(getattr(part, "jaxpr", part)) for part in jax.extend.core.jaxprs_in_params(params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)
