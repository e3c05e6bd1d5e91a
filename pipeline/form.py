"""The parameters as Airflow's trigger form takes them: each key's JSON schema and help, from params.py and params.yaml.

`python -m pipeline.form` writes dags/parameters.json; a test compares.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from effdet.config import MODELS
from pipeline.errors import run
from pipeline.files import written_whole
from pipeline.params import PARAMS_FILE, Params

FORM_FILE = Path("dags/parameters.json")


def parameters() -> dict[str, dict[str, Any]]:
    """Dotted key -> {schema, help}. A key that differs between data sources takes what any of them does."""
    whole = Params.model_json_schema()
    text = YAML().load(PARAMS_FILE.read_text())
    found: dict[str, dict[str, Any]] = {}
    for key, schema in _leaves(whole, whole["$defs"]):
        told = found.setdefault(key, {"schema": schema, "help": _help(text, key)})
        if schema not in (told["schema"], *told["schema"].get("anyOf", [])):
            told["schema"] = {"anyOf": [*told["schema"].get("anyOf", [told["schema"]]), schema]}
    found["model.name"]["schema"]["enum"] = list(MODELS)
    return found


def _leaves(schema: Mapping[str, Any], definitions: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, Any]]:
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if "properties" in schema:
        for name, inner in schema["properties"].items():
            yield from _leaves(inner, definitions, f"{key}.{name}" if key else name)
    elif "discriminator" in schema:
        for inner in schema["oneOf"]:
            yield from _leaves(inner, definitions, key)
    else:
        yield key, _whole(schema, definitions)


def _whole(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """With definitions in place of references, and without pydantic's titles."""
    if isinstance(schema, list):
        return [_whole(inner, definitions) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    return {name: _whole(inner, definitions) for name, inner in schema.items() if name not in ("title", "description")}


def _help(text: Any, key: str) -> str:
    """The comment that stands behind the key in params.yaml."""
    *parents, last = key.split(".")
    for parent in parents:
        text = text.get(parent) if isinstance(text, CommentedMap) else None
    comments = text.ca.items.get(last) if isinstance(text, CommentedMap) else None
    return comments[2].value.strip().split("\n")[0].lstrip("# ") if comments and comments[2] else ""


def write() -> None:
    """Rewrites the file."""
    lines = [f"{json.dumps(key)}: {json.dumps(parameter)}" for key, parameter in parameters().items()]
    with written_whole(FORM_FILE) as part:
        part.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    run(write)
