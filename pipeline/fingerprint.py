"""What a training run's result depends on, as JSON: data, parameters, weights to begin with, code; and its hash."""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.files import checksum
from pipeline.params import Params

MAX_TOLD = 8  # differences; of other code there may be many


def inputs_of(settings: Params, shards: Path, begins_with: str | None) -> dict[str, Any]:
    """Data by the manifest's hash, parameters, and the code that this process loaded.

    `begins_with`: the weights of train.init_from by their content (pipeline.initial_weights.identity), not their path.
    """
    root = Path(__file__).parents[1]
    loaded = {Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    code = {path for path in loaded if path.parent in (root / "effdet", root / "pipeline")}
    return {
        "manifest": checksum(shards / "manifest.json", "sha256"),
        "model": settings.model.model_dump(mode="json"),
        "train": settings.train.model_dump(mode="json", exclude={"init_from", "init_checksum"}),
        "begins_with": begins_with,
        "code": {str(path.relative_to(root)): checksum(path, "sha256") for path in code},
    }


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of the inputs, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What differs, by name, as "train.seed: 1, there 2"; of code and data the name alone. Empty where nothing does."""
    own, other = dict(_flat(ours)), dict(_flat(theirs))
    told = []
    for name in sorted(own.keys() | other.keys()):
        mine, its = own.get(name, "nothing"), other.get(name, "nothing")
        if mine != its:
            hashed = name == "manifest" or name.startswith("code.")
            place = name.removeprefix("code.") if name != "manifest" else "data/shards/manifest.json"
            told.append(place if hashed else f"{place}: {mine}, there {its}")
    return told if len(told) <= MAX_TOLD else [*told[:MAX_TOLD], f"and {len(told) - MAX_TOLD} more"]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for key, value in tree.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return rows
