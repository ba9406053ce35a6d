"""Snapshot ensembles and StarSSE of Sadrtdinov et al. (NeurIPS 2023, arXiv 2303.03374)."""

from paper_repro.tables.rows import Published, Row, Source, Table

_RECIPE = "cifar10_q75_resnet20_cycles"
_RATES = (("quarter", "a quarter of the rate"), ("1", "the rate"), ("4", "4 times the rate"),
          ("16", "16 times the rate"))  # fmt: skip
_KINDS = (("sse", "SSE"), ("star", "StarSSE"))
_WAYS = (("snapshot_ensemble", "ensemble"), ("snapshot_soup", "soup"))
_WORDS = {
    "sse": "better at larger cycles, until they leave the basin",
    "star": "better than SSE, ensemble and soup",
}

TABLE = Table(
    name="snapshots",
    title="Snapshots from a pre-trained network: SSE and StarSSE",
    paper="Sadrtdinov et al. 2023",
    unit="test accuracy, %",
    note=(
        "The paper starts from pre-trained ResNet-50 and Swin-T, which are not at hand, and its "
        "values are not available. The recipe starts from a published ResNet-20."
    ),
    rows=(
        Row(
            "One run of all epochs",
            Published(words="below ensembles"),
            Source(_RECIPE, "base", "iterate"),
        ),
        *(
            Row(
                f"{name}, {rate}, {noun}",
                Published(words=_WORDS[kind]),
                Source(_RECIPE, f"{kind}_{scale}", weights),
            )
            for weights, noun in _WAYS
            for kind, name in _KINDS
            for scale, rate in _RATES
        ),
    ),
)
