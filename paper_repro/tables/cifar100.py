"""Table 2: WRN 28-10 on CIFAR-100."""

from paper_repro.tables.rows import UNKNOWN, Published, Row, Source, Table

TABLE = Table(
    name="cifar100",
    title="CIFAR-100, WRN 28-10",
    unit="test accuracy, %",
    note=(
        "As for CIFAR-10. The published configuration behind 'Late-phase BatchNorm (SGD)' has a "
        "ten times larger weight decay on the late-phase weights; the ablations have both. Where "
        "the rank-1 factors sit, and T0, rates and noise of the hypernetwork and rank-1 rows, are "
        "not established."
    ),
    rows=(
        Row("Base (SGD)", Published(81.35, 0.16, 5), Source("cifar100_bn", "base", "iterate")),
        Row("Dropout (SGD)", UNKNOWN, Source("cifar100_baselines", "dropout", "iterate")),
        Row("MC-dropout (SGD)", UNKNOWN, Source("cifar100_baselines", "dropout", "mc_dropout")),
        Row(
            "BatchEnsemble (SGD)",
            UNKNOWN,
            Source("cifar100_baselines", "batchensemble", "ensemble"),
        ),
        Row(
            "Late-phase hypernetwork (SGD)",
            Published(81.55, None, 5),
            Source("cifar100_hypernet", "late_phase", "averaged"),
        ),
        Row("Late-phase rank-1 (SGD)", UNKNOWN, Source("cifar100_rank1", "late_phase", "averaged")),
        Row(
            "Late-phase BatchNorm (SGD)",
            Published(82.87, 0.22, 5),
            Source("cifar100_bn", "late_phase", "averaged"),
        ),
        Row(
            "Deep ensemble (SGD)",
            Published(84.09),
            Source("cifar100_bn", "base", "deep_ensemble_iterate"),
        ),
        Row("Base (SWA)", Published(82.46, 0.09, 5), Source("cifar100_bn_swa", "base", "swa")),
        Row(
            "Late-phase hypernetwork (SWA)",
            Published(82.01, None, 5),
            Source("cifar100_hypernet", "late_phase_swa", "swa"),
        ),
        Row("Late-phase rank-1 (SWA)", UNKNOWN, Source("cifar100_rank1", "late_phase_swa", "swa")),
        Row(
            "Late-phase BatchNorm (SWA)",
            Published(83.06, 0.08, 5),
            Source("cifar100_bn_swa", "late_phase", "swa"),
        ),
    ),
)
