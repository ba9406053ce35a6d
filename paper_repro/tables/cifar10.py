"""Table 1: WRN 28-10 on CIFAR-10."""

from paper_repro.tables.related import small_images
from paper_repro.tables.rows import UNKNOWN, Published, Row, Source, Table

TABLE = Table(
    name="cifar10",
    title="CIFAR-10, WRN 28-10",
    unit="test accuracy, %",
    note=(
        "Late-phase rows are of the single model of averaged weights. The published code averages "
        "the outputs of each layer's copies instead, which for BatchNorm differs a little "
        "(our averaged_outputs). How the paper set up dropout and BatchEnsemble, and how many "
        "networks its deep ensemble has, is not established; ours has as many as there are seeds."
    ),
    rows=(
        Row(
            "Base (SGD)",
            Published(96.16, 0.12, 5),
            Source("cifar10_bn", "base", "iterate"),
            small_images("base", "iterate"),
        ),
        Row(
            "Dropout (SGD)",
            Published(96.02, 0.06, 5),
            Source("cifar10_baselines", "dropout", "iterate"),
        ),
        Row(
            "BatchEnsemble (SGD)",
            Published(96.19, 0.18, 5),
            Source("cifar10_baselines", "batchensemble", "ensemble"),
        ),
        Row(
            "Late-phase BatchNorm (SGD)",
            Published(96.46, 0.15, 5),
            Source("cifar10_bn", "late_phase", "averaged"),
            small_images("late_phase", "averaged"),
        ),
        Row(
            "Base (SWA)",
            Published(96.48, 0.04, 5),
            Source("cifar10_bn_swa", "base", "swa"),
            small_images("base_swa", "swa"),
        ),
        Row(
            "Late-phase BatchNorm (SWA)",
            Published(96.81, 0.07, 5),
            Source("cifar10_bn_swa", "late_phase", "swa"),
            small_images("late_phase_swa", "swa"),
        ),
        Row(
            "Deep ensemble (SGD)",
            Published(96.91, None, 1),
            Source("cifar10_bn", "base", "deep_ensemble_iterate"),
            small_images("base", "deep_ensemble_iterate"),
        ),
        Row(
            "MC-dropout (SGD)",
            UNKNOWN,
            Source("cifar10_baselines", "dropout", "mc_dropout"),
        ),
    ),
)
