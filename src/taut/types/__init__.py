"""The words of taut: plain frozen data that every other module speaks. No algorithms, no tensors."""

from typing import Any

from taut.core.deprecation import forward_names
from taut.types.budget import Budget, BudgetLike, Cost
from taut.types.method import (
    Automatic,
    Fitting,
    Looking,
    Method,
    NothingToDo,
    Renumbering,
    Restoring,
    Rewrite,
    Slimming,
    Tracing,
    shrinks,
)
from taut.types.network import Block, Group, Invocation, Layer, Network
from taut.types.plan import Kept, Plan, Setting, Step
from taut.types.schedule import Schedule, Stage, alternate, cascade, check_schedule, ramp

__all__ = [
    "Automatic",
    "Block",
    "Budget",
    "BudgetLike",
    "Cost",
    "Fitting",
    "Group",
    "Invocation",
    "Kept",
    "Layer",
    "Looking",
    "Method",
    "Network",
    "NothingToDo",
    "Plan",
    "Renumbering",
    "Restoring",
    "Rewrite",
    "Schedule",
    "Setting",
    "Slimming",
    "Stage",
    "Step",
    "Tracing",
    "alternate",
    "cascade",
    "check_schedule",
    "ramp",
    "shrinks",
]

__getattr__ = forward_names(__name__, {"Factors": (Any, "the type parameter of taut.types.Method")})
