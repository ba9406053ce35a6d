"""Table 3: WRN 28-14 and PyramidNet."""

from paper_repro.tables.rows import UNKNOWN, Published, Row, Source, Table

TABLE = Table(
    name="other_networks",
    title="Other networks (SWA)",
    unit="test accuracy, %",
    note=(
        "The values of the base models are not established, nor is anything of the PyramidNet but "
        "that there is one."
    ),
    rows=(
        Row(
            "CIFAR-10, WRN 28-14, base",
            UNKNOWN,
            Source("cifar10_wrn14_bn_swa", "base", "swa"),
        ),
        Row(
            "CIFAR-10, WRN 28-14, late-phase BatchNorm",
            Published(97.45, 0.10, 5),
            Source("cifar10_wrn14_bn_swa", "late_phase", "swa"),
        ),
        Row(
            "CIFAR-100, WRN 28-14, base",
            UNKNOWN,
            Source("cifar100_wrn14_bn_swa", "base", "swa"),
        ),
        Row(
            "CIFAR-100, WRN 28-14, late-phase BatchNorm",
            Published(85.00, 0.25, 5),
            Source("cifar100_wrn14_bn_swa", "late_phase", "swa"),
        ),
        Row(
            "CIFAR-10, PyramidNet, base",
            UNKNOWN,
            Source("cifar10_pyramidnet", "base_swa", "swa"),
        ),
        Row(
            "CIFAR-10, PyramidNet, late-phase BatchNorm",
            UNKNOWN,
            Source("cifar10_pyramidnet", "late_phase_swa", "swa"),
        ),
    ),
)
