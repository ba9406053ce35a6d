"""Ablations: selected weights, T0, K and weight decay of late-phase weights."""

from paper_repro.tables.rows import UNKNOWN, Published, Row, Source, Table

_T0 = Published(words="fails to reach the base model")
_ALL = Published(words="lies between the base model and late-phase BatchNorm")


def _baselines(name: str, label: str) -> list[Row]:
    recipe = f"{name}_baselines"
    return [
        Row(f"{label}, base", UNKNOWN, Source(recipe, "base", "iterate")),
        Row(
            f"{label}, T0 = 0, late-phase weight decay 5e-4",
            _T0,
            Source(recipe, "late_phase_t0", "averaged"),
        ),
        Row(f"{label}, all weights replicated", _ALL, Source(recipe, "late_phase_all", "averaged")),
    ]


TABLE = Table(
    name="ablations",
    title="Ablations, WRN 28-10 (SGD)",
    unit="test accuracy, %",
    note="K = 10, T0 = 120 and, on CIFAR-100, late-phase weight decay 5e-3 where nothing else is "
    "stated. Of some comparisons the paper's outcome is known, but none of its values.",
    rows=(
        *_baselines("cifar10", "CIFAR-10"),
        *_baselines("cifar100", "CIFAR-100"),
        Row(
            "CIFAR-100, late-phase weight decay 5e-4",
            UNKNOWN,
            Source("cifar100_bn", "late_phase_decay_5e4", "averaged"),
        ),
        Row(
            "CIFAR-100, late-phase weight decay 5e-3, idle members step on member 0's turn",
            UNKNOWN,
            Source("cifar100_bn", "late_phase_idle_steps", "averaged"),
        ),
        *(
            Row(
                f"CIFAR-100, T0 = {t0}",
                UNKNOWN if t0 else _T0,
                Source("cifar100_t0", f"t0_{t0}", "averaged"),
            )
            for t0 in (0, 40, 80, 100, 120, 140, 160)
        ),
        *(
            Row(f"CIFAR-100, K = {k}", UNKNOWN, Source("cifar100_k", f"k_{k}", "averaged"))
            for k in (2, 5, 10, 20)
        ),
    ),
)
