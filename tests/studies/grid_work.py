"""Work for the grid that other processes can import."""

import os
import signal
import time

import torch

from taut.errors import BudgetError


def square(cell):
    return {"square": cell["a"] ** 2, "threads": torch.get_num_threads()}


def killed_once(folder, cell):
    """The second run is killed the first time."""
    if cell["a"] == 2 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"square": cell["a"] ** 2}


def broken(path, ending, cell):
    """The second run fails as soon as the first one is written; the others would take long."""
    if cell["a"] == 1:
        return {}
    while cell["a"] > 2 or not path.exists() or not path.read_bytes().endswith(b"\n"):
        time.sleep(0.01)
    if ending == "exit":
        os._exit(3)
    if ending == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    raise BudgetError("too small", best=lambda: "cannot travel")
