"""The words of taut: plain frozen data that every other module speaks. No algorithms, no tensors."""

from taut.types.budget import Budget, Cost
from taut.types.method import Factors, Method, Rewrite
from taut.types.network import Group, Invocation, Layer, Network
from taut.types.plan import Kept, Plan, Setting, Step
from taut.types.schedule import Schedule, Stage, cascade, check_schedule

__all__ = [
    "Budget",
    "Cost",
    "Factors",
    "Group",
    "Invocation",
    "Kept",
    "Layer",
    "Method",
    "Network",
    "Plan",
    "Rewrite",
    "Schedule",
    "Setting",
    "Stage",
    "Step",
    "cascade",
    "check_schedule",
]
