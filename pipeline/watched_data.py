"""Which files the default branch's data.base_url offers: `python -m pipeline.watched_data --remote URL`

The last line on stdout is JSON (the fields of Watched). With --compute each file is read, and its checksum told: what
data.checksums has to be for a retraining on the data as it is now.
"""

import argparse
import sys

from ruamel.yaml import YAML

from pipeline import checksums, local, params
from pipeline.download import source_files
from pipeline.errors import PipelineError, run
from pipeline.local import Local
from pipeline.params import Params, SyntheticData
from pipeline.prepare import params_at, pinned
from pipeline.settings import Section, validated
from pipeline.transfer import local_folder
from pipeline.work_trees import default_branch, mirror


class Watched(Section):
    """The data set that a retraining would fetch."""

    revision: str  # the commit whose params.yaml says so
    base_url: str
    files: dict[str, list[str]]  # name in data.checksums -> where it may be, http(s) addresses or paths, in order
    checksums: dict[str, str | None]  # as params.yaml pins them
    found: dict[str, str] | None  # as they are now; None where that was not asked


def watched(remote: str, where: Local, *, compute: bool) -> Watched:
    """PipelineError where the data is drawn, not fetched, or stands at a path that means nothing elsewhere."""
    source = mirror(remote, where)
    branch = default_branch(source, remote)
    commit = pinned(source, remote, branch)[0]
    text = YAML(typ="safe", pure=True).load(params_at(source, commit, None))
    data = validated(Params, text, params.PARAMS_FILE).data
    if isinstance(data, SyntheticData):
        raise PipelineError(f"data.source of {branch}: synthetic data is drawn, not fetched: nothing to watch")
    folder = local_folder(data.base_url)
    if folder is not None and not folder.is_absolute():
        raise PipelineError(f"data.base_url of {branch}: {data.base_url} is relative, and means another place here")
    base = str(folder or data.base_url).rstrip("/")
    return Watched(
        revision=commit,
        base_url=data.base_url,
        files={file.name: [f"{base}/{place}" for place in file.places] for file in source_files(data)},
        checksums=dict(data.checksums),
        found=checksums.compute(data) if compute else None,
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.watched_data", description=__doc__.splitlines()[0])
    parser.add_argument("--remote", required=True, help="git's: a URL or a path")
    parser.add_argument("--compute", action="store_true", help="read the files, and tell their checksums")
    given = parser.parse_args()
    found = watched(given.remote, local.load(), compute=given.compute)
    print(f"{found.base_url}, as {found.revision[:10]} of {given.remote} has it", file=sys.stderr)
    print(found.model_dump_json(), flush=True)


if __name__ == "__main__":
    run(main)
