"""A configuration file that scripts may count on, and the run that a file states."""

from __future__ import annotations

from pathlib import Path

from nqm.runs import config
from nqm.runs import toml as declare

CONTRACT = """
[problem]
curvature = [1.0, 0.5, 0.25]
noise_variance = [1.0, 0.5, 0.25]   # of one example's gradient
initial_mean = 0.0
initial_variance = 1.0
[[phase]]
algorithm = "sgd"
lr = 0.1
batch_size = 8
steps = 200
[[phase]]
algorithm = "late_phase"            # one step = one cycle = members x batch_size examples
members = 10
gamma = 0.1
lr = 0.05
member_lr = 0.05
batch_size = 8
steps = 100
[record]
at = [0, 100, 200, 300]             # steps counted over the whole program
"""


def built(path: Path, *overrides: str) -> config.Run:
    """The run of a file, some of its entries changed."""
    return config.build(declare.load(path, overrides), path.parent)
