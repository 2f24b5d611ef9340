"""The control of a training: the original trained equally, which tells what training alone brings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import nn

from taut.structure.statistics import Statistics
from taut.training.finetuning import Finetune, carry_out, stages_of
from taut.training.losses import Objective
from taut.types import Plan


def control_reason(wish: Finetune, plan: Plan) -> str | None:
    """Why there is no control beside a trained model, in words for its comparison; None where there is one."""
    if not wish.control:
        return "Training has no control, as asked: the original, trained equally, may gain as much."
    stages = stages_of(wish, plan)
    if not any(stage.epochs and stage.train != "none" for stage in stages):
        return "Nothing was trained: every stage of the schedule has 0 epochs."
    if all(Objective(wish.loss, stage.distill).share == 1 for stage in stages):
        return "Trained by distillation alone: the original is the teacher, so that equal training leaves it as it is."
    if isinstance(wish.train, Iterator) or isinstance(wish.valid, Iterator):
        return "Training has no control: its data can be read only once. Give a list or a DataLoader."
    return None


def train_control(model: nn.Module, stats: Statistics, wish: Finetune, plan: Plan, seed: int) -> nn.Module:
    """The original after the same schedule, data, loss and seed; nothing is compressed, and no layer is frozen.

    Args:
        model: the original; it is not changed.
        stats: of it: how it is called, and how its outputs are read.
        wish: how the compressed model was trained.
        plan: what was done to it.
        seed: as of its training.
    """
    stages = tuple(
        replace(stage, steps=(), train="none" if stage.train == "none" else "all") for stage in stages_of(wish, plan)
    )
    folder = None if wish.folder is None else control_folder(wish.folder)
    equal = replace(wish, schedule=stages, folder=folder)
    return carry_out(model, None, stats, equal, teacher=model, seed=seed)[0]


def control_folder(folder: str | Path) -> Path:
    """Where the state of the control is kept: beside that of the training."""
    return Path(folder).with_name(f"{Path(folder).name}-control")
