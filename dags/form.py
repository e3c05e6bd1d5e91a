"""The trigger form of a retraining. Types, ranges and help are params.yaml's, as pipeline.form lays them down."""

import json
from pathlib import Path
from typing import Any

from airflow.sdk import Param

ROOT = Path(__file__).parents[1]
PARAMETERS: dict[str, dict[str, Any]] = json.loads((ROOT / "dags" / "parameters.json").read_text())
# What people change most; all others are taken under `overrides`.
SHOWN = {
    "Data": ("data.max_images",),
    "Model": ("model.name",),
    "Training": (
        "train.epochs",
        "train.schedule_epochs",
        "train.learning_rate",
        "train.batch_size",
        "train.ranks",
        "train.precision",
        "train.seed",
    ),
    "Gate": ("promote.refresh", "promote.min_ap"),
}
WORD = r"^[^-\s\x00][^\s\x00]*$"  # no option of a command's
NOT_GIVEN = "Empty: as in params.yaml."


def params() -> dict[str, Param]:
    """Field -> what it takes. A field that is left empty changes nothing."""
    recipes = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    return {
        "reason": Param(
            "as scheduled", "Why, for those who read the commit.", type="string", minLength=1, maxLength=500,
            pattern=r"^[^\x00]*\S[^\x00]*$", title="Reason",
        ),
        "revision": Param(
            None, "Branch of the git remote, or commit or tag on one. Empty: its default branch.",
            type=["null", "string"], pattern=WORD, title="Git revision",
        ),
        "recipe": Param(
            None, "File of recipes/ in place of params.yaml. Empty: params.yaml.",
            type=["null", "string"], enum=[None, *recipes], title="Recipe",
        ),
        **{key: _field(key, section) for section, keys in SHOWN.items() for key in keys},
        "overrides": Param(
            {}, "Further keys of params.yaml: {\"train.augment.mosaic\": 0.5}. They stand above the fields.",
            type="object", additionalProperties=False, title="Overrides",
            properties={key: parameter["schema"] for key, parameter in PARAMETERS.items()},
        ),
    }  # fmt: skip


def _field(key: str, section: str) -> Param:
    parameter = PARAMETERS[key]
    help_ = f"{parameter['help'][:1].upper()}{parameter['help'][1:]}. " if parameter["help"] else ""
    schema = {**parameter["schema"]}
    for choice in schema.pop("anyOf", []):  # null, which is no value here, and another
        schema |= choice if choice["type"] != "null" else {}
    if "enum" in schema:
        schema["enum"] = [None, *schema["enum"]]
    return Param(None, help_ + NOT_GIVEN, **{**schema, "type": ["null", schema["type"]]}, title=key, section=section)


def overrides(given: dict[str, Any]) -> dict[str, Any]:
    """Key of params.yaml -> value, of all that was filled in."""
    shown = {key: given[key] for keys in SHOWN.values() for key in keys if given.get(key) is not None}
    return {**shown, **(given.get("overrides") or {})}
