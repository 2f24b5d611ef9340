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

from taut.artifact.checkpoint import load, save
from taut.artifact.comparison import Comparison, compare
from taut.artifact.exporting import Export, export
from taut.errors import ArtifactError, BudgetError, CallError, DataError, ModelError, TautError
from taut.measure.accuracy import Metric
from taut.planning.application import apply
from taut.planning.damage_measurement import sensitivity
from taut.planning.plan import plan, whole
from taut.search.compression import Result, compress
from taut.search.exploration import explore
from taut.search.front import Front
from taut.structure.observation import observe
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
    "load",
    "observe",
    "plan",
    "ramp",
    "save",
    "sensitivity",
    "trace",
    "whole",
]
