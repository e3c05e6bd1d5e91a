"""Where the work runs: local.yaml (git-ignored) and the environment. Nothing here changes a result.

A variable EFFDET_<KEY> of the environment, read as YAML, stands above the file. It is recorded in the model's
provenance, and never an input of a stage.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import PipelineError
from pipeline.settings import Section, read_yaml, validated

LOCAL_FILE = Path("local.yaml")
PREFIX = "EFFDET_"

Host = Annotated[str, Field(pattern=r"^[^:,\s]+:[1-9]\d*$")]  # "name:slots"
Count = Annotated[int, Field(ge=1)]
Word = Annotated[str, Field(pattern=r"^\S.*$")]  # one line


class Slurm(Section):
    """The job that launcher: slurm submits."""

    ranks_per_node: Count
    options: list[Annotated[str, Field(pattern=r"^--\S.*$")]] = Field(
        default_factory=list
    )  # of sbatch: "--time=8:00:00"


class Kubernetes(Section):
    """The MPIJob (kubeflow.org/v2beta1) that launcher: kubernetes creates."""

    image: Word  # with this environment, mpirun and sshd
    namespace: Word = "default"
    gpus_per_worker: Annotated[int, Field(ge=0)]  # a pod's GPUs and ranks; 0: one rank on CPUs
    volume_claim: Word  # holds this checkout and its data; every pod mounts it
    workdir: Annotated[str, Field(pattern=r"^/\S*$")]  # where it is mounted; ranks run there
    python: Word = "python"  # the image's


class Elastic(Section):
    """Ranks that may come and go while training (launcher: horovodrun)."""

    min_ranks: Count
    max_ranks: Count
    discovery: str  # path of a program that prints "name:slots", a line for each host there is now
    cooldown_seconds: Count = 60  # that a failed host is left alone; up to ten times as long when it fails again
    reset_limit: Count | None = None  # how often the ranks may change before the run ends; null: without limit


class Retraining(Section):
    """Where this machine keeps what the stage runner makes."""

    work_dir: Word = "retraining"  # work trees of tries, mirrors of git remotes, checkpoints
    cache_dir: Word | None = None  # DVC's cache, one for the machine; null: in work_dir
    remote: Word | None = None  # DVC's, a URL that every machine reaches; null: the repository's default remote
    keep_failed: Annotated[int, Field(ge=0)] = 3  # work trees of failed tries, the newest, to look into
    min_free_gib: Annotated[float, Field(ge=0)] = 20.0  # on work_dir's disk; with less, nothing new is begun


class Local(Section):
    """Hosts, launcher, mirrors, folders and workers of this machine."""

    launcher: Literal["horovodrun", "mpirun", "slurm", "kubernetes"] = "horovodrun"
    hosts: list[Host] = Field(default_factory=list)  # "name:slots" for horovodrun, mpirun; empty: all ranks here
    network_interface: Word | None = None  # "eth1"; null: the launcher finds one that all hosts have
    # After so long at most, a rank that does not come to what the others wait for ends them all. A collective of a
    # slow rank (a first step that compiles, COCO evaluation on rank 0) has to fit in.
    stall_seconds: Annotated[int, Field(ge=12)] = 600
    slurm: Slurm | None = None
    kubernetes: Kubernetes | None = None
    elastic: Elastic | None = None
    mirrors: list[str] = Field(default_factory=list)  # base addresses, tried in order before data.base_url
    checkpoint_dir: str = "checkpoints"  # a folder or a URL
    resume_from: str | None = None  # another run's checkpoint folder or URL, to go on from with other ranks
    profile: bool = False  # TensorFlow's profiler and Horovod's timeline
    loader_workers: Count = os.cpu_count() or 1  # threads a rank
    retraining: Retraining = Field(default_factory=Retraining)  # read by the stage runner alone


VARIABLES = {PREFIX + key.upper(): key for key in Local.model_fields}


def load(path: Path = LOCAL_FILE) -> Local:
    """Reads the file, where there is one, and the environment. PipelineError names what is wrong."""
    content = (read_yaml(path) if path.exists() else None) or {}  # a file of comments alone is none
    if not isinstance(content, dict):
        raise PipelineError(f"{path}: expected keys and values, got {content!r}")
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in VARIABLES)
    if unknown:
        raise PipelineError(f"environment: {unknown[0]}: unknown key; there are {', '.join(VARIABLES)}")
    in_file = validated(Local, content, path)
    values = {key: _value(name, os.environ[name]) for name, key in VARIABLES.items() if name in os.environ}
    in_environment = validated(Local, values, Path("environment"))
    found = in_file.model_copy(update={key: getattr(in_environment, key) for key in values})
    if problem := _contradiction(found):
        raise PipelineError(f"{path} or environment: {problem}")
    return found


def as_environment(settings: Local) -> dict[str, str]:
    """The variables that give a process in another folder what was set here."""
    content = settings.model_dump(mode="json", include=settings.model_fields_set - {"retraining"})
    return {PREFIX + key.upper(): json.dumps(value) for key, value in content.items()}


def _contradiction(found: Local) -> str | None:
    """What does not fit together."""
    places = {"slurm": found.slurm, "kubernetes": found.kubernetes}
    if found.launcher in places and places[found.launcher] is None:
        return f"launcher {found.launcher} needs the block {found.launcher}"
    if found.launcher in places and found.hosts:
        return f"launcher {found.launcher} finds the hosts itself; leave out hosts"
    if found.elastic and found.launcher != "horovodrun":
        return f"elastic needs launcher horovodrun, got {found.launcher}"
    if found.elastic and found.hosts:
        return "elastic.discovery names the hosts; leave out hosts"
    if found.elastic and found.elastic.min_ranks > found.elastic.max_ranks:
        return f"elastic.min_ranks {found.elastic.min_ranks} is above max_ranks {found.elastic.max_ranks}"
    return None


def _value(variable: str, text: str) -> object:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise PipelineError(f"environment: {variable}: not YAML: {error}") from None
