"""Writes docs/parameters.md, the reference of params.yaml and local.yaml: `python -m docs.parameters`.

Types and limits are those of pipeline/params.py and pipeline/local.py. The words are the comments beside the fields
there; where a field has none, those beside the key in what a person copies from: recipes/*.yaml, docs/local.yaml.
"""

import ast
import inspect
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline import local, params

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_suffix(".md")
EXAMPLE = Path(__file__).with_name("local.yaml")
TYPES = {"integer": "integer", "number": "number", "boolean": "true, false", "string": "text", "null": "null"}
INTRODUCTION = """\
# Parameters

Made by `python -m docs.parameters` from `pipeline/params.py`, `pipeline/local.py` and the recipes; a test compares.
To try a value: `dvc exp run -S train.learning_rate=0.1`.

# params.yaml

What changes a result. Every key must be given; an unknown one is an error. `recipes/` has complete files.
"""
LOCAL_INTRODUCTION = """
# local.yaml

Where the work runs; git-ignored, and every key may be left out. `EFFDET_<KEY>` in the environment stands above the
file; its value is YAML, `EFFDET_HOSTS='["node1:8", "node2:8"]'`. [local.yaml](local.yaml), beside this page, has every
key.
"""


def page() -> str:
    """The whole of docs/parameters.md."""
    return INTRODUCTION + "".join(_params()) + LOCAL_INTRODUCTION + "".join(_local())


def _params() -> Iterator[str]:
    schema = params.Params.model_json_schema()
    blocks, words = schema["$defs"], _field_comments(params)
    recipes = sorted((ROOT / "recipes").glob("*.yaml"), key=lambda path: (path.stem != "synthetic", path))
    in_recipes = _key_comments(recipes)
    for name, field in schema["properties"].items():
        for kind in _blocks(field):
            source = blocks[kind]["properties"].get("source", {}).get("const") if name == "data" else None
            yield f"\n## {name}{f', source: {source}' if source else ''}\n\n{blocks[kind]['description']}\n"
            yield "\n| key | value | |\n| --- | --- | --- |\n"
            for key, value, _, comment, block in _rows(kind, blocks, words):
                if key != "source":
                    told = comment or in_recipes.get(f"{name}.{key}") or block
                    yield f"| `{name}.{key}` | {value} | {_cell(told)} |\n"


def _local() -> Iterator[str]:
    schema = local.Local.model_json_schema()
    blocks = {**schema["$defs"], "Local": schema}
    yield "\n| key | value | left out | |\n| --- | --- | --- | --- |\n"
    in_example = _key_comments([EXAMPLE])
    for key, value, default, comment, block in _rows("Local", blocks, _field_comments(local)):
        yield f"| `{key}` | {value} | {default} | {_cell(comment or in_example.get(key) or block)} |\n"


def _rows(kind: str, blocks: dict[str, Any], words: dict[tuple[str, str], str]) -> Iterator[tuple[str, ...]]:
    """Key, value, default, comment and what a block is: of each key of a block, those of blocks in it after it."""
    required = blocks[kind].get("required", [])
    for key, field in blocks[kind]["properties"].items():
        if key == "loader_workers":  # pydantic gives the figure of the machine that this runs on
            default = "the machine's CPUs"
        elif field.get("type") == "array" and key not in required:
            default = "`[]`"
        else:
            default = f"`{json.dumps(field['default'])}`" if "default" in field else ""
        inner = _blocks(field)
        value = _value(field) if not inner else "block" + (" or null" if "null" in _value(field) else "")
        yield key, value, default, words.get((kind, key), ""), "".join(blocks[name]["description"] for name in inner)
        for name in inner:
            for inner_key, *rest in _rows(name, blocks, words):
                yield f"{key}.{inner_key}", *rest


def _blocks(field: dict[str, Any]) -> list[str]:
    """The names of the blocks that a field may hold."""
    options = field.get("oneOf") or field.get("anyOf") or field.get("allOf") or [field]
    return [option["$ref"].rpartition("/")[2] for option in options if "$ref" in option]


def _value(field: dict[str, Any]) -> str:
    """A JSON schema's type and limits in words."""
    if "anyOf" in field:
        return " or ".join(_value(option) for option in field["anyOf"])
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{word}`" for word in field["enum"])
    if "prefixItems" in field:
        return "list of " + ", ".join(_value(item) for item in field["prefixItems"])
    if field.get("type") == "array":
        return f"list of {_value(field['items'])}"
    if field.get("type") == "object":
        return f"text: {_value(field['additionalProperties'])}" if field.get("additionalProperties") else "block"
    low, high = field.get("minimum"), field.get("maximum")
    above, below = field.get("exclusiveMinimum"), field.get("exclusiveMaximum")
    limits = [
        *([f"≥ {low:g}"] if low is not None else []),
        *([f"> {above:g}"] if above is not None else []),
        *([f"≤ {high:g}"] if high is not None else []),
        *([f"< {below:.10g}"] if below is not None else []),
    ]
    return " ".join([TYPES.get(field.get("type", ""), "block"), *limits])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _field_comments(module: ModuleType) -> dict[tuple[str, str], str]:
    """(class, field as the file names it) -> the comment beside it, or the lines of comments above it."""
    source = inspect.getsource(module)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    lines = source.splitlines()
    found = {}
    for block in ast.parse(source).body:
        if not isinstance(block, ast.ClassDef):
            continue
        fields: dict[str, Any] = getattr(module, block.name).model_fields
        for node in block.body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            above: list[str] = []
            line = node.lineno - 1
            while lines[line - 1].strip().startswith("#"):
                above.insert(0, comments[line])
                line -= 1
            beside = [comments[at] for at in range(node.lineno, (node.end_lineno or 0) + 1) if at in comments]
            key = fields[node.target.id].alias or node.target.id
            found[block.name, key] = " ".join([*above, *beside])
    return found


def _key_comments(paths: Iterable[Path]) -> dict[str, str]:
    """Key, dotted -> the comment beside it, or the line of comment above it, in the first file that has one."""
    found: dict[str, str] = {}
    for path in paths:
        above, outer = "", [""]
        for line in path.read_text().splitlines():
            # A key that is commented out counts: it shows what may stand there.
            if key := re.match(r"#?( *)([a-z_0-9]+):(?:.*?\s#\s(.*))?", line):
                outer = [*outer[: len(key[1]) // 2 + 1], key[2]]
                if words := key[3] or above:
                    found.setdefault(".".join(outer[1:]), words)
                above = ""
            elif comment := re.fullmatch(r" +# (.*)", line):
                above = comment[1]
    return found


def main() -> None:
    text = page()
    if missing := re.findall(r"^\| `([^`]+)` .*\|\s*\|$", text, re.MULTILINE):
        sys.exit(f"error: keys without a word, give them a comment: {', '.join(missing)}")
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
