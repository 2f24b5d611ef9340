"""Engines that others have made, where they are installed: used as the how-to says, with a worker killed on the way."""

from __future__ import annotations

import concurrent.futures
import os
import re
import signal
from pathlib import Path

import pytest

from taut.core.workers import finished

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "executors.md"
ITEMS = [{"a": a} for a in range(4)]
SQUARES = {0: 0, 1: 1, 2: 4, 3: 9}


@pytest.fixture
def killed_once(tmp_path):
    """Inside of a function, as in a notebook: it is sent as it is."""

    def work(item):
        if item["a"] == 2 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item["a"] ** 2

    return work


def test_dask(tmp_path, killed_once):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        assert dict(finished(killed_once, ITEMS, client.get_executor())) == SQUARES
    assert (tmp_path / "killed").exists()


def test_ray(tmp_path, killed_once, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else it leaves a token in the home folder
    names = {"ray": ray, "concurrent": concurrent}
    exec(re.findall(r"```py\n(class RayExecutor.*?)```", PAGE.read_text(), re.DOTALL)[0], names)  # noqa: S102 - our own documentation
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert dict(finished(killed_once, ITEMS, names["RayExecutor"]())) == SQUARES
    finally:
        ray.shutdown()
    assert (tmp_path / "killed").exists()
