"""What the stand-in Hub asks of a model card's front matter."""

from __future__ import annotations

import re
from typing import Any

import yaml

IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.\-]*")
TEXT = ("license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model_relation")
TEXTS = ("tags", "datasets", "base_model", "language", "metrics")
KNOWN = {*TEXT, *TEXTS, "model-index"}


def card_faults(content: str) -> list[str]:
    """Return what is wrong with the front matter of `content`; nothing where it is as the Hub wants it."""
    front = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", content, re.DOTALL)
    if not front:
        return ["no front matter between two lines of ---"]
    try:
        fields = yaml.safe_load(front[1])
    except yaml.YAMLError as error:
        return [f"the front matter is no YAML: {error}"]
    if not isinstance(fields, dict):
        return ["the front matter is no mapping"]
    faults = [f"unknown field {key}" for key in fields.keys() - KNOWN]
    faults += [f"{key} is text" for key in TEXT if key in fields and not isinstance(fields[key], str)]
    for key in TEXTS:
        values = fields.get(key, [])
        values = [values] if isinstance(values, str) else values
        if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
            faults.append(f"{key} is a list of texts")
    if not IDENTIFIER.fullmatch(str(fields.get("license", ""))):
        faults.append("license is an identifier in lower case")
    if (fields.get("license") == "other") != ("license_name" in fields):
        faults.append("license_name goes with license: other")
    for key in ("datasets", "base_model"):
        names = fields.get(key, [])
        for name in [names] if isinstance(names, str) else names:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) or str(name).startswith("."):
                faults.append(f"{key}: {name} is no name on the Hub")
    return faults + _index_faults(fields.get("model-index", []))


def _index_faults(index: Any) -> list[str]:
    if not isinstance(index, list):
        return ["model-index is a list"]
    faults = []
    for model in index:
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            return ["model-index: each model has a name"]
        for result in model.get("results", [None]):
            if not isinstance(result, dict):
                return ["model-index: each model has results"]
            for part, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
                if not all(isinstance(result.get(part, {}).get(key), str) for key in keys):
                    faults.append(f"model-index: {part} has {' and '.join(keys)}")
            if not result.get("metrics"):
                faults.append("model-index: a result has metrics")
            for metric in result.get("metrics", []):
                if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), int | float | str):
                    faults.append("model-index: a metric has a type and a value")
    return faults
