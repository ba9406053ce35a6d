"""The model card of an exported model, README.md in the form of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

#: Kind of inputs -> name of the task on the hub.
TASKS = {"images": "image-classification", "text": "text-generation"}


def card(config: Mapping[str, Any], license: str, files: Mapping[str, str]) -> str:
    """Write the model card.

    Parameters
    ----------
    config : mapping
        Content of ``config.json``.
    license : str
        Identifier of the licence.
    files : mapping of str to str
        Name of each file of the folder -> what it holds.

    Returns
    -------
    str
        YAML between two lines of ``---``, and Markdown.
    """
    return f"---\n{_front_matter(config, license)}---\n\n{_text(config, files)}"


def _front_matter(config: Mapping[str, Any], license: str) -> str:
    kind = (config["preprocessing"] or {}).get("kind")
    task, data = TASKS.get(kind or ""), config["data"]
    lines = [
        f"license: {json.dumps(license)}",
        "library_name: late-phase-nqm",
        *([f"pipeline_tag: {task}"] if task else []),
        "tags:",
        "- pytorch",
        "- weight-averaging",
    ]
    if config["metrics"] and data is not None and task:
        # JSON is YAML; strings need its quotes.
        lines += ["metrics:", *(f"- {json.dumps(name)}" for name in config["metrics"])]
        lines += [
            "model-index:",
            f"- name: {json.dumps(config['name'])}",
            "  results:",
            f"  - task: {json.dumps({'type': task})}",
            f"    dataset: {json.dumps({'name': data['label'], 'type': data['name']})}",
            "    metrics:",
            *(
                f"    - {json.dumps({'type': name, 'value': value})}"
                for name, value in config["metrics"].items()
            ),
        ]
    return "".join(f"{line}\n" for line in lines)


def _text(config: Mapping[str, Any], files: Mapping[str, str]) -> str:
    data, architecture = config["data"], config["architecture"]
    kind = (config["preprocessing"] or {}).get("kind")
    model = config["architectures"][0] if architecture is None else architecture["name"]
    trained = "" if data is None else f" trained on {data['label']}"
    rows = [f"| {name} | {value:.6g} |\n" for name, value in config["metrics"].items()]
    measured = f"\n| on its test set | |\n|---|---|\n{''.join(rows)}" if rows else ""
    given = "" if architecture is not None else ", model=YourModel()"
    use = {
        "images": "logits = served.model(served.prepare(pixels))  # (N, C, H, W), uint8",
        "text": "logits = served.model(served.prepare(text))  # str or bytes",
    }.get(kind or "", "logits = served.model(inputs)")
    listed = "".join(f"| `{name}` | {what} |\n" for name, what in files.items())
    return (
        f"# {config['name']}\n\n`{model}`{trained}: {config['parameters']:,} parameters"
        f"{_how(config['weights'])}.\n{measured}\n"
        "```python\nfrom neural import load_exported\n\n"
        f"served = load_exported(FOLDER{given})\n{use}\n```\n\n"
        f"| file | |\n|---|---|\n{listed}"
    )


def _how(weights: str) -> str:
    return f", the single model `{weights}`" if weights else ""
