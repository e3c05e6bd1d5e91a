"""What an approver reads first of a candidate: `python -m pipeline.candidate retrain/RUN --remote URL`

The last line on stdout is JSON (the fields of Candidate): what stands in git, whatever was told before.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline import local
from pipeline.errors import PipelineError, run
from pipeline.local import Local
from pipeline.publish import CHAMPION, METRICS, candidate_at, figures_of
from pipeline.settings import Section
from pipeline.work_trees import git, mirror


class Candidate(Section):
    """A commit that may go to production."""

    commit: str
    branch: str
    decision: str  # the gate's
    split: str  # that it was judged on
    AP: float | None
    table: str  # Markdown: the split's figures against the champion's


def candidate(remote: str, revision: str, where: Local) -> Candidate:
    """PipelineError where the revision is on no branch and was never published, or holds no judged model."""
    source = mirror(remote, where)
    commit, branch = candidate_at(source, remote, revision)
    with tempfile.TemporaryDirectory() as scratch:
        for path in (METRICS, CHAMPION):
            Path(scratch, path).write_text(git(source, "show", f"{commit}:{path}"))
        try:
            figures: dict[str, Any] = figures_of(Path(scratch))
        except (KeyError, TypeError, json.JSONDecodeError):
            raise PipelineError(f"{METRICS} of {commit[:10]}: is not what the promote stage writes") from None
    return Candidate(commit=commit, branch=branch, **figures)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.candidate", description=__doc__.splitlines()[0])
    parser.add_argument("revision", help="retrain/RUN, or a commit on a branch of the remote")
    parser.add_argument("--remote", required=True, help="git's: a URL or a path")
    given = parser.parse_args()
    found = candidate(given.remote, given.revision, local.load())
    print(f"{found.branch}: {found.decision} on {found.split}", file=sys.stderr)
    print(found.model_dump_json(), flush=True)


if __name__ == "__main__":
    run(main)
