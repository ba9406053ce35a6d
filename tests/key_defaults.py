"""The values that keys of runs leave out, as they are written down in ``tests/data``.

``python -m tests.key_defaults`` writes them anew: only after an entry was added, removed or
renamed. A default that was changed is stated by `nqm.keys.omits` instead, or old runs are taken
for new ones.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nqm.algorithms import ROSTER
from nqm.keys import REQUIRED, differing, omitted
from nqm.problems import spectra
from nqm.problems.least_squares import LeastSquares
from nqm.problems.quadratic import Problem
from nqm.program import Phase
from nqm.runs.config import MODELS, SPECTRA, Run
from nqm.schedule import SCHEDULES

FOLDER = Path(__file__).parent / "data"

Target = Callable[..., Any]


def theory() -> list[Target]:
    """All that a configuration of `nqm` calls."""
    named = [*ROSTER.values(), *SCHEDULES.values(), *SPECTRA.values(), *MODELS.values()]
    return [Run, Phase, Problem, LeastSquares, spectra.power_noise, *named]


def networks() -> list[Target]:
    """All that a recipe or a bridge of `neural` calls."""
    from neural.bridge.config import BridgeConfig, Plan, Training
    from neural.clients.config import ClientsConfig, ScopeConfig
    from neural.models import MODELS as FAMILIES
    from neural.training.config import SECTIONS, ModelConfig, RunConfig

    models = [family.load() for family in FAMILIES.values()]
    own = [BridgeConfig, Plan, Training, ClientsConfig, ScopeConfig]
    return [RunConfig, ModelConfig, *SECTIONS.values(), *own, *models]


def shown(value: Any) -> str:
    """A default; of an object what differs from its own defaults, which are listed themselves."""
    return f"{type(value).__name__} {differing(value)}" if is_dataclass(value) else repr(value)


def left_out(targets: Iterable[Target]) -> dict[str, str]:
    """Every entry with a default, and the value that keys leave out."""
    return {
        f"{target.__module__}.{target.__qualname__}.{name}": shown(value)
        for target in targets
        for name in inspect.signature(target).parameters
        if (value := omitted(target, name)) is not REQUIRED
    }


def check(file: str, targets: Iterable[Target]) -> None:
    """Fail, saying what to do, where a value is not the one written down."""
    known = json.loads((FOLDER / file).read_text())
    now = left_out(targets)
    changed = {name for name in known.keys() & now.keys() if known[name] != now[name]}
    assert not changed, (
        f"the default of {sorted(changed)} has changed: decorate its class with "
        "nqm.keys.omits(NAME=its old default), or old runs are taken for new ones"
    )
    assert known == now, (
        f"{sorted(known.keys() ^ now.keys())} is new or gone: run python -m tests.key_defaults"
    )


FILES = {"key_defaults_nqm.json": theory, "key_defaults_neural.json": networks}

if __name__ == "__main__":
    for file, targets in FILES.items():
        if targets is theory or find_spec("torch"):
            text = json.dumps(left_out(targets()), indent=1, sort_keys=True)
            (FOLDER / file).write_text(f"{text}\n")
