"""Fast geometric ensembling of Garipov et al. (2018, arXiv 1802.10026), CIFAR-100."""

from paper_repro.tables.rows import UNKNOWN, Published, Row, Source, Table

TABLE = Table(
    name="fge",
    title="Fast geometric ensembling, WRN 28-10, CIFAR-100",
    paper="Garipov et al. 2018",
    unit="test accuracy, %",
    digits=1,
    note=(
        "A budget is one run of 200 epochs. Published values are those of the public code's page. "
        "SWA and late-phase weights are rows of ours."
    ),
    rows=(
        Row(
            "One run, one budget",
            Published(80.8),
            Source("cifar100_fge", "base", "iterate"),
            (Source("fashion_mnist_fge", "base", "iterate"),),
        ),
        Row(
            "FGE, one budget",
            Published(82.3),
            Source("cifar100_fge", "fge", "snapshot_ensemble"),
            (Source("fashion_mnist_fge", "fge", "snapshot_ensemble"),),
        ),
        Row(
            "Soup of FGE's snapshots, one budget",
            UNKNOWN,
            Source("cifar100_fge", "fge", "snapshot_soup"),
            (Source("fashion_mnist_fge", "fge", "snapshot_soup"),),
        ),
        Row(
            "SWA, one budget",
            UNKNOWN,
            Source("cifar100_fge", "swa", "swa"),
            (Source("fashion_mnist_fge", "swa", "swa"),),
        ),
        Row(
            "Late-phase BatchNorm and head, one budget",
            UNKNOWN,
            Source("cifar100_fge", "late_phase", "averaged"),
            (Source("fashion_mnist_fge", "late_phase", "averaged"),),
        ),
        Row(
            "Independent runs, three budgets",
            Published(83.0),
            Source("cifar100_fge", "base", "deep_ensemble_iterate"),
            (Source("fashion_mnist_fge", "base", "deep_ensemble_iterate"),),
        ),
    ),
)
