"""A server and two clients of Flower on loopback against the rounds in one process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neural.clients import federated_rounds, make_clients, start_model
from neural.clients.config import ClientsConfig
from neural.training.recipe import load_recipe
from neural.training.task import Runtime, open_task

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "docs" / "examples" / "flower_clients.py"
SETTINGS = ("train.precision=float64", "data.train_examples=90", "data.test_examples=60")
#: Relative to the largest weight: in double precision sums differ only in their last bits.
LAST_BITS = 1e-12


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="Flower (flwr) is absent")
@pytest.mark.parametrize("prox", [0.0, 0.5])
def test_flower_on_loopback_is_fedavg_in_one_process(tmp_path: Path, prox: float) -> None:
    out = tmp_path / "flower.pt"
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, EXAMPLE, "digits_bn", "--scale", "smoke", *words, "--rounds", "3",
         "--clients", "2", "--prox", str(prox), "--out", out],
        capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(out, weights_only=True)
    run = load_recipe("digits_bn", "smoke", SETTINGS).arms["base"]
    task = open_task(run, Runtime())
    config = ClientsConfig(count=2, rounds=3, prox=prox)
    clients = make_clients(run, task, config)
    assert clients[0].share != clients[1].share  # or weights by examples could not be told
    model = start_model(run, task)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    federated_rounds(model, clients, config, run.train, seed=run.seed)
    worst = 0.0
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            assert not torch.equal(value, start[name]), name
            gap = float((found[name] - value).abs().max() / value.abs().max())
            worst = max(worst, gap)
    print(f"largest relative difference {worst:.1e}")
    assert worst < LAST_BITS
