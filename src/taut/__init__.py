"""taut makes a trained PyTorch network smaller and faster, and proves it with measurements.

    net   = taut.trace(model, example)
    stats = taut.observe(net, model, calibration)
    plan  = taut.plan(net, stats, budget=taut.Budget(macs=0.25))
    small = taut.apply(model, plan, stats, data=calibration)
    print(taut.compare(model, small, accuracy, example))
    taut.save(small, plan, "small/")

Whole networks are pruned by `taut.whole(net, "mfbp", sparsity=0.95)`, in steps of `taut.ramp`.
`taut.compress` is these verbs in a row; `taut.explore` measures what a model can become; `taut.finetune` trains;
`taut.export` writes ONNX and OpenVINO files.
"""

import importlib as _importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taut.artifact.checkpoint import load, save
    from taut.artifact.comparison import Comparison, compare
    from taut.artifact.exporting import Export, export
    from taut.errors import ArtifactError, BudgetError, CallError, DataError, ModelError, TautError
    from taut.measure.accuracy import Metric
    from taut.planning.application import apply
    from taut.planning.damage_measurement import sensitivity
    from taut.planning.plan import plan, whole
    from taut.report.inspection import Inspection, inspect
    from taut.search.compression import compress
    from taut.search.exploration import explore
    from taut.search.finishing import Result
    from taut.search.front import Front
    from taut.structure.observation import observe
    from taut.structure.rules import register_channel_rule
    from taut.structure.statistics import Statistics
    from taut.structure.tracing import trace
    from taut.training.finetuning import Finetune, finetune
    from taut.types import Budget, Network, Plan, Stage, Step, alternate, cascade, ramp

__all__ = [
    "ArtifactError",
    "Budget",
    "BudgetError",
    "CallError",
    "Comparison",
    "DataError",
    "Export",
    "Finetune",
    "Front",
    "Inspection",
    "Metric",
    "ModelError",
    "Network",
    "Plan",
    "Result",
    "Stage",
    "Statistics",
    "Step",
    "TautError",
    "alternate",
    "apply",
    "cascade",
    "compare",
    "compress",
    "explore",
    "export",
    "finetune",
    "inspect",
    "load",
    "observe",
    "plan",
    "ramp",
    "register_channel_rule",
    "save",
    "sensitivity",
    "trace",
    "whole",
]

_HOMES = {
    "ArtifactError": "taut.errors",
    "Budget": "taut.types",
    "BudgetError": "taut.errors",
    "CallError": "taut.errors",
    "Comparison": "taut.artifact.comparison",
    "DataError": "taut.errors",
    "Export": "taut.artifact.exporting",
    "Finetune": "taut.training.finetuning",
    "Front": "taut.search.front",
    "Inspection": "taut.report.inspection",
    "Metric": "taut.measure.accuracy",
    "ModelError": "taut.errors",
    "Network": "taut.types",
    "Plan": "taut.types",
    "Result": "taut.search.finishing",
    "Stage": "taut.types",
    "Statistics": "taut.structure.statistics",
    "Step": "taut.types",
    "TautError": "taut.errors",
    "alternate": "taut.types",
    "apply": "taut.planning.application",
    "cascade": "taut.types",
    "compare": "taut.artifact.comparison",
    "compress": "taut.search.compression",
    "explore": "taut.search.exploration",
    "export": "taut.artifact.exporting",
    "finetune": "taut.training.finetuning",
    "inspect": "taut.report.inspection",
    "load": "taut.artifact.checkpoint",
    "observe": "taut.structure.observation",
    "plan": "taut.planning.plan",
    "ramp": "taut.types",
    "register_channel_rule": "taut.structure.rules",
    "save": "taut.artifact.checkpoint",
    "sensitivity": "taut.planning.damage_measurement",
    "trace": "taut.structure.tracing",
    "whole": "taut.planning.plan",
}
"""Where the public names are defined: torch is imported with the first of them, so that `taut --help` need not wait."""

_ROOMS = (
    "artifact",
    "core",
    "criteria",
    "decompose",
    "errors",
    "measure",
    "methods",
    "nn",
    "planning",
    "recipe",
    "recovery",
    "report",
    "search",
    "structure",
    "studies",
    "training",
    "types",
)
"""Packages that are attributes of this one without an import of their own."""

if not TYPE_CHECKING:  # else every name would be one

    def __getattr__(name: str) -> object:
        """A public name, imported when it is first asked for."""
        if name in _ROOMS:
            return _importlib.import_module(f"{__name__}.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        _importlib.import_module(f"{__name__}.methods")  # plans know their methods by name
        value = getattr(_importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """All names, those not imported yet included."""
    return sorted({*globals(), *__all__, *_ROOMS})
