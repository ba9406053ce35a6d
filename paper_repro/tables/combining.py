"""Systems that combine models: published values beside what the commands saved here.

A value is "not established" where a paper's tables could not be read; none is a guess.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from paper_repro.tables.rows import UNKNOWN, Published, Row, Saved, Table

_ENSEMBLE = {"rule": "ensemble", "space": "probabilities"}


def _curve(kind: str, take: str) -> Saved:
    return Saved("curve", "error", {"path": "curve", "data": "test", "kind": kind}, take=take)


_CURVES = Table(
    name="curves",
    title="Curves between two networks",
    paper="Garipov et al. 2018 (CIFAR-100, WRN 28-10)",
    unit="test error, %",
    digits=1,
    note=(
        "Published values are those of the public code's page. Other networks there: VGG16, ends "
        "27.5, Bezier curve up to 30.1, chain up to 30.8; PreResNet164, ends 21.7, Bezier curve up "
        "to 23.4, chain up to 23.6."
    ),
    rows=(
        Row(
            "Worse end",
            Published(18.9),
            Saved(
                "curve",
                "error",
                {"path": "curve", "data": "test", "t": (0.0, 1.0)},
                take="max",
            ),
        ),
        Row("Largest on a Bezier curve", Published(19.2), _curve("bezier", "max")),
        Row("Smallest on a Bezier curve", Published(18.3), _curve("bezier", "min")),
        Row("Largest on a chain", Published(19.0), _curve("chain", "max")),
        Row("Smallest on a chain", Published(18.4), _curve("chain", "min")),
        Row(
            "Middle of the straight line",
            UNKNOWN,
            Saved("curve", "error", {"path": "line", "data": "test", "t": 0.5}),
        ),
    ),
)


def _merged(rule: str, part: str, **more: Any) -> Saved:
    return Saved("compare", "accuracy", {"rule": rule, "space": "weights", "part": part, **more})


def _single(part: str, take: str, **more: Any) -> Saved:
    return Saved("compare", "accuracy", {"rule": "member", "part": part, **more}, "member", take)


_SOUPS = Table(
    name="soups",
    title="Model soups",
    paper="Wortsman et al. 2022 (72 CLIP ViT-B/32)",
    unit="accuracy, %",
    note=(
        "Published: ImageNet, and under shift the mean of ImageNet-V2, R, Sketch, ObjectNet and A; "
        "recomputed from the result files of the public code, the learned soup from its page. Ours "
        "under shift: the mean over the corruptions that a comparison asked for."
    ),
    rows=(
        Row("Mean single model", Published(77.93), _single("test", "mean")),
        Row("Best on held-out data", Published(80.39), _merged("best", "test")),
        Row("Uniform soup", Published(79.97), _merged("uniform", "test")),
        Row("Greedy soup", Published(81.03), _merged("greedy", "test")),
        Row("Learned soup", Published(81.38), _merged("learned", "test")),
        Row("Mean single model, shift", Published(46.69), _single("shift", "mean")),
        Row("Best on held-out data, shift", Published(47.97), _merged("best", "shift")),
        Row("Best single model under shift", Published(50.67), _single("shift", "max")),
        Row("Uniform soup, shift", Published(51.58), _merged("uniform", "shift")),
        Row("Greedy soup, shift", Published(50.86), _merged("greedy", "shift")),
    ),
)

_AME = Table(
    name="ame",
    title="Amortized model ensembling",
    paper="Lee & Ngo 2025",
    unit="accuracy, %",
    note=(
        "The paper's values and settings are not available. Descent at rate 1 / i is the uniform "
        "soup, whatever the experts are."
    ),
    rows=tuple(
        Row(
            name + ("" if part == "test" else ", shift"),
            Published(words="above experts and soup") if rule.startswith("ame_") and part == "shift"
            else UNKNOWN,
            _single(part, "mean", amortized=True) if rule == "member"
            else _merged(rule, part, amortized=True),
        )
        for part in ("test", "shift")
        for rule, name in (
            ("member", "Mean expert"),
            ("uniform", "Uniform soup"),
            ("greedy", "Greedy soup"),
            ("ame", "AME, descent at 1 / i"),
            ("ame_adagrad", "AME, Adagrad"),
            ("ame_adam", "AME, Adam"),
        )
    ),
)  # fmt: skip


def _low_precision() -> Iterator[Row]:
    for tuned in ("", "_tuned"):
        end = ", at tuned temperatures" if tuned else ""
        yield Row(f"Float model{end}", UNKNOWN, _rounded("float", f"nll{tuned}"))
        for bits in (8, 6, 5, 4):
            words = "" if tuned else "below the float model for large models (INT-5)"
            yield Row(
                f"Rounded to nearest, {bits} bits{end}",
                UNKNOWN,
                _rounded("rtn", f"nll{tuned}", grid_bits=bits),
            )
            yield Row(
                f"Ensemble, {bits} bits{end}",
                Published(words=words if bits == 5 else ""),
                _rounded("ensemble", f"nll{tuned}", grid_bits=bits, rounding="stochastic"),
            )


def _rounded(rule: str, column: str, **more: Any) -> Saved:
    return Saved("low-precision", column, {"rule": rule, **more})


_LOW_PRECISION = Table(
    name="low_precision",
    title="Low-precision ensembles",
    paper="Nam & Lee 2024",
    unit="test loss, nats",
    digits=4,
    factor=1.0,
    note="The paper's values are not available. Ours are those of the most draws.",
    rows=tuple(_low_precision()),
)

_CLIENTS = Table(
    name="clients",
    title="Federated clients and weight scope alignment",
    paper="Xu et al. 2024",
    unit="test accuracy, %",
    digits=1,
    note="The paper's values are not available. Ours are means over the last five rounds.",
    rows=tuple(
        Row(
            f"{name}, Dirichlet {dirichlet:g}",
            Published(words=words),
            Saved("clients", "accuracy", {"method": method, "dirichlet": dirichlet}),
        )
        for dirichlet in (0.1, 0.5)
        for method, name, words in (
            ("FedAvg", "FedAvg", ""),
            ("FedProx", "FedProx", ""),
            ("SCAFFOLD", "SCAFFOLD", ""),
            ("FedExP", "FedExP", ""),
            ("scope", "Weight scope alignment", "above FedAvg"),
            ("rescaled", "Rescaled after training (control)", ""),
        )
    ),
)


def _module(space: str, **where: Any) -> Saved:
    return Saved("modules", "perplexity", {"task": "language", "space": space, **where})


_ALL = {"score": "uniform"}
_THREE = {"score": "tfidf", "kept": 3, "weighting": "linear"}
_MODULES = Table(
    name="modules",
    title="Modules of other domains, language models",
    paper="Holtermann et al. 2024 (GPT-2, 21 adapters)",
    unit="perplexity",
    factor=1.0,
    note=(
        "Published: mean over 10 domains and 4 seeds, recomputed from the published results, of a "
        "token; ours are of a byte, which makes them smaller. The public code's ensembles average "
        "logits. Other models there, average / ensemble of the best: GPT-2 large 15.33 / 15.03 "
        "(uniform 16.02 / 15.38), DeBERTa 4.20 / 4.12 (7.39 / 4.72)."
    ),
    rows=(
        Row("No module", Published(26.4), _module("weights", score="no_module")),
        Row("Average, TF-IDF, 3 modules", Published(22.38), _module("weights", **_THREE)),
        Row("Average, uniform, all", Published(23.34), _module("weights", **_ALL)),
        Row("Ensemble of logits, TF-IDF, 3", Published(22.19), _module("logits", **_THREE)),
        Row("Ensemble of logits, uniform, all", Published(23.01), _module("logits", **_ALL)),
        Row("Ensemble of probabilities, TF-IDF, 3", UNKNOWN, _module("probabilities", **_THREE)),
        Row("Ensemble of probabilities, uniform", UNKNOWN, _module("probabilities", **_ALL)),
        Row("Best module by labels of the target", UNKNOWN, _module("weights", score="best")),
    ),
)

_PAIRS = Table(
    name="module_pairs",
    title="Modules: how often the ensemble is at least as good as the average",
    paper="Holtermann et al. 2024 (GPT-2)",
    unit="% of pairs of targets, splits and scores",
    digits=1,
    note="GPT-2 large 88 %, DeBERTa 99.9 %; 2,460 pairs of more than one module for each model.",
    rows=tuple(
        Row(
            f"{what}, ensemble of {space}",
            Published(79.0) if (task, space) == ("language", "logits") else UNKNOWN,
            Saved("pairs of modules", "lower", {"task": task, "space": space}),
        )
        for task, what in (
            ("language", "Language models"),
            ("opinions", "Text classifiers"),
            ("corruptions", "Corrupted images"),
        )
        for space in ("logits", "probabilities")
    ),
)

_GATES = Table(
    name="gates",
    title="Shallow, semi and deep ensembles of text classifiers",
    paper="Tyagi et al. 2023",
    unit="accuracy, %",
    note="The paper's values are not available.",
    rows=tuple(
        Row(name, Published(words=words), Saved("gates", "accuracy", {"rule": rule}))
        for rule, name, words in (
            ("best", "Best member on held-out texts", ""),
            ("ensemble", "Equal weights", ""),
            ("shallow", "Shallow: weights by accuracy", ""),
            ("learned", "Learned constant weights", ""),
            ("semi", "Semi: a gate", ""),
            ("deep", "Deep: a gate with side features", "far above one large model"),
            ("deep_reinforce", "Deep, by REINFORCE", ""),
        )
    ),
)


def _pair(column: str, align: str, repair: str) -> Saved:
    where = {"rule": "uniform", "space": "weights", "members": 2, "part": "test"}
    return Saved("compare", column, {**where, "align": align, "repair": repair})


_REBASIN = Table(
    name="git_rebasin",
    title="Matched hidden units",
    paper="Ainsworth et al. 2022",
    unit="test loss of the mean of two networks above theirs, nats",
    digits=3,
    factor=1.0,
    note="Comparisons of two networks. The mean is the middle of the straight line.",
    rows=tuple(
        Row(name, Published(words=words), _pair("barrier", align, repair))
        for name, words, align, repair in (
            ("As they are", "", "none", "none"),
            ("Matched by weights", "zero for wide networks", "weights", "none"),
            ("Matched by activations", "zero for wide networks", "activations", "none"),
            ("As they are, new statistics", "", "none", "statistics"),
            ("Matched by weights, new statistics", "", "weights", "statistics"),
            ("Matched by activations, new statistics", "", "activations", "statistics"),
        )
    ),
)

_REPAIR = Table(
    name="repair",
    title="REPAIR",
    paper="Jordan et al. 2022 (VGG11, CIFAR-10)",
    unit="accuracy that the mean of two matched networks loses, points",
    digits=1,
    note="Published values are about as large as stated. Comparisons of two networks.",
    rows=tuple(
        Row(name, paper, _pair("lost", align, repair))
        for align, noun in (("weights", "weights"), ("activations", "activations"))
        for name, paper, repair in (
            (f"Matched by {noun}", Published(20.0 if align == "weights" else None), "none"),
            (f"Matched by {noun}, new statistics", UNKNOWN, "statistics"),
            (
                f"Matched by {noun}, rescaled",
                Published(5.0 if align == "weights" else None),
                "rescale",
            ),
        )
    ),
)

#: In the order of the page.
TABLES = (
    _CURVES,
    _SOUPS,
    _AME,
    _LOW_PRECISION,
    _CLIENTS,
    _MODULES,
    _PAIRS,
    _GATES,
    _REBASIN,
    _REPAIR,
)
