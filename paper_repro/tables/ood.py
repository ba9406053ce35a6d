"""Out-of-distribution detection by the entropy of the prediction, WRN 28-10."""

from paper_repro.tables.rows import UNKNOWN, Row, Source, Table

_SETS = {
    "lsun_resized": "LSUN",
    "tiny_imagenet_resized": "TinyImageNet",
    "svhn": "SVHN",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
}
#: The same question on data that are easier to come by.
_RELATED = {
    "cifar10_q75_resnet8": "imagenet32",
    "cifar10_q75_resnet20": "imagenet32",
    "fashion_mnist_bn": "emnist_letters",
}
#: method -> recipe's ending, arm, weights.
_METHODS = {
    "base (SGD)": ("bn", "base", "iterate"),
    "late-phase BatchNorm (SGD)": ("bn", "late_phase", "averaged"),
    "base (SWA)": ("bn_swa", "base", "swa"),
    "late-phase BatchNorm (SWA)": ("bn_swa", "late_phase", "swa"),
}


def _related(arm: str, weights: str) -> tuple[Source, ...]:
    arm = f"{arm}_swa" if weights == "swa" else arm
    return tuple(
        Source(recipe, arm, weights, "auroc", (outside,)) for recipe, outside in _RELATED.items()
    )


def _rows(inside: str) -> list[Row]:
    outside = tuple(name for name in _SETS if name != inside)
    columns = {_SETS[name]: (name,) for name in outside} | {"mean of four": outside}
    return [
        Row(
            f"{_SETS[inside]}, {method}, against {column}",
            UNKNOWN,
            Source(f"{inside}_{ending}", arm, weights, "auroc", data),
            _related(arm, weights) if inside == "cifar10" and len(data) > 1 else (),
        )
        for method, (ending, arm, weights) in _METHODS.items()
        for column, data in columns.items()
    ]


TABLE = Table(
    name="ood",
    title="Out-of-distribution detection, WRN 28-10",
    unit="AUROC",
    digits=4,
    factor=1.0,
    note=(
        "All test images against all images of the other set, which is the positive class, under "
        "the normalisation of the training set. Temperature 1, as in the published code. The "
        "paper's numbers are not established."
    ),
    rows=(*_rows("cifar10"), *_rows("cifar100")),
)
