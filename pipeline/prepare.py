"""Pins what a retraining is: git revision, parameters and id. `python -m pipeline.prepare --remote URL --reason WORDS`

The last line on stdout is the run (pipeline.stage_runner.Run, JSON), from which every stage of it is run.
"""

import argparse
import datetime
import io
import re
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from pipeline import local
from pipeline.errors import PipelineError, run
from pipeline.local import Local
from pipeline.settings import validated
from pipeline.stage_runner import BRANCH, PARAMS, Run
from pipeline.work_trees import (
    branch_tip,
    check_out,
    check_space,
    command,
    default_branch,
    fresh_try,
    git,
    mirror,
    remove_try,
)

RECIPE = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]*$")


def prepare(
    remote: str,
    revision: str | None,
    where: Local,
    *,
    reason: str,
    recipe: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    run_id: str | None = None,
) -> Run:
    """The run. PipelineError for a revision on no branch of the remote, wrong parameters, a used id, a full disk.

    `revision`: a branch of the remote, or a commit or tag on one; None: its default branch.
    `overrides`: dotted key of params.yaml -> value of the type that the key has. `recipe`: in place of params.yaml.
    """
    check_space(where)
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    fields: dict[str, Any] = {
        "run": run_id or f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
        "remote": remote,
        "revision": "0" * 40,
        "base": "",
        "params": "",
        "created": now.isoformat(),
        "reason": " ".join(reason.split()),
    }
    validated(Run, fields, Path("run"))  # before the words reach git
    source = mirror(remote, where)
    if branch_tip(source, f"{BRANCH}{fields['run']}"):
        raise PipelineError(f"run: {fields['run']} is published already, as {BRANCH}{fields['run']}; take another id")
    commit, base = pinned(source, remote, revision or default_branch(source, remote))
    text = overridden(params_at(source, commit, recipe), overrides or {})
    with fresh_try(fields["run"], "prepare", where) as found:  # the revision's own code knows its parameters
        check_out(source, commit, found.tree)
        (found.tree / PARAMS).write_text(text)
        try:
            command(found, [sys.executable, "-m", "pipeline.params_check"])
        except PipelineError as error:  # nothing to look into: a stage's failed try is kept in its place
            remove_try(found.folder)
            raise PipelineError(str(error).replace(f"; it stays in {found.folder}", "")) from None
    return validated(Run, {**fields, "revision": commit, "base": base, "params": text}, Path("run"))


def pinned(source: Path, remote: str, revision: str) -> tuple[str, str]:
    """The commit, and the branch it is on: the one that was named, else the default branch, else the first."""
    try:
        words = ["rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"]
        commit = branch_tip(source, revision) or git(source, *words).strip()
    except PipelineError:
        raise PipelineError(f"revision: {revision!r} is no revision of {remote}; push it first") from None
    words = ["for-each-ref", "--format=%(refname:lstrip=2)", "--contains", commit, "refs/heads"]
    branches = git(source, *words).split()
    if not branches:
        raise PipelineError(f"revision: {revision} is on no branch of {remote}; push a branch that has it")
    wanted = [revision, default_branch(source, remote), branches[0]]
    return commit, next(branch for branch in wanted if branch in branches)


def params_at(source: Path, commit: str, recipe: str | None) -> str:
    """The text of params.yaml, or of a recipe, in a revision."""
    if recipe is not None and not RECIPE.match(recipe):
        raise PipelineError(f"recipe: expected a name, got {recipe!r}")
    path = PARAMS if recipe is None else f"recipes/{recipe}.yaml"
    if not git(source, "ls-tree", "--name-only", commit, "--", path):
        raise PipelineError(f"{path}: not in revision {commit[:8]}")
    return git(source, "show", f"{commit}:{path}")


class _WrittenOut(RoundTripRepresenter):
    """null as the word, as params.yaml has it, and not as nothing."""

    def represent_none(self, data: None) -> ScalarNode:
        """The word."""
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_WrittenOut.add_representer(type(None), _WrittenOut.represent_none)


def overridden(text: str, overrides: Mapping[str, Any]) -> str:
    """The text with some values replaced, its comments kept. PipelineError for a key that it has not."""
    yaml = YAML()
    yaml.Representer = _WrittenOut
    yaml.width = 200
    content = yaml.load(text)
    for key, value in overrides.items():
        *parents, last = key.split(".")
        block = content
        for parent in parents:
            block = block.get(parent) if isinstance(block, Mapping) else None
        if not isinstance(block, Mapping) or last not in block:
            raise PipelineError(f"{PARAMS}: {key}: no such key; name one that stands there")
        if isinstance(value, list) and isinstance(block[last], list):
            block[last][:] = value  # in place: it stays on its line, with its comment
        else:
            block[last] = value  # type: ignore[index]
    if not overrides:
        return text
    buffer = io.StringIO()
    yaml.dump(content, buffer)
    return buffer.getvalue()


def _override(words: str) -> tuple[str, Any]:
    key, equals, text = words.partition("=")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        value, equals = None, ""
    if not equals:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE with a value as in {PARAMS}, got {words!r}")
    return key, value


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.prepare", description="pins what a retraining is")
    parser.add_argument("--remote", required=True, help="git's: a URL or a path")
    parser.add_argument("--revision", help="a branch of it, or a commit or tag on one; by default, its default branch")
    parser.add_argument("--reason", required=True, help="why, for those who read the commit")
    parser.add_argument("--recipe", help="a file of recipes/, without .yaml, in place of params.yaml")
    parser.add_argument("--set", type=_override, action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--run-id", help="letters, digits, '_', '.', '-'; by default of the time")
    given = parser.parse_args()
    found = prepare(
        given.remote,
        given.revision,
        local.load(),
        reason=given.reason,
        recipe=given.recipe,
        overrides=dict(given.overrides),
        run_id=given.run_id,
    )
    print(found.model_dump_json(), flush=True)


if __name__ == "__main__":
    run(main)
