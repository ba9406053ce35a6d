"""An LSTM of 500 units on enwik8, with and without rank-1 factors."""

from paper_repro.tables.rows import Published, Row, Source, Table

#: method -> arm, bits per character without and with SWA.
_PAPER = {
    "Base": ("base", 1.695, 1.626),
    "Base with rank-1 factors, not replicated": ("base_rank1", 1.663, 1.616),
    "Late-phase rank-1": ("late_phase_rank1", 1.633, 1.615),
}


def _row(method: str, bits: float, arm: str, weights: str) -> Row:
    return Row(
        method,
        Published(bits),
        Source("enwik8_lstm_rank1", arm, weights, "bpc"),
        (Source("wikitext2_lstm_rank1", arm, weights, "bpc"),),
    )


def _plain(arm: str) -> str:
    return "averaged" if arm.startswith("late_phase") else "iterate"


TABLE = Table(
    name="enwik8",
    title="enwik8, LSTM of 500 units, no regularisation",
    unit="bits per character on the test part (lower is better)",
    digits=3,
    factor=1.0,
    note=(
        "Optimiser, rates, windows, T0, K, noise and the start of SWA are not established; ours "
        "are choices. Each test window is read from an empty state."
    ),
    rows=(
        *(_row(method, plain, arm, _plain(arm)) for method, (arm, plain, _) in _PAPER.items()),
        *(_row(f"{method} (SWA)", swa, arm, "swa") for method, (arm, _, swa) in _PAPER.items()),
    ),
)
