"""What each launcher is told: a command line (horovodrun of Horovod 0.28, mpirun of Open MPI 4), a job script (Slurm),
a manifest (Kubernetes, MPIJob kubeflow.org/v2beta1).

Each starts `python -m MODULE --worker` as many times as there are ranks.
"""

import io
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ruamel.yaml import YAML

from pipeline.errors import PipelineError
from pipeline.local import PREFIX, Kubernetes, Local

Block = TypeVar("Block")

WORKER = "--worker"  # tells a module that it was started as a rank
SSH_KEYS = "/home/effdet/.ssh"  # where the image's user, who is not root, and its sshd look for them: docker/Dockerfile
SLURM_LOG = Path("data/logs/slurm-%j.log")  # what the job says; %j: its number

# The variables of this process that ranks on other machines need too, where a launcher does not hand on all.
FORWARDED = ("LD_LIBRARY_PATH", "PATH", "PYTHONPATH")
FORWARDED_PREFIXES = (PREFIX, "CUDA_", "HOROVOD_", "NCCL_", "OMP_", "PYTHON", "TF_", "XLA_")


def needs_launcher(ranks: int, where: Local) -> bool:
    """Whether the ranks are other processes than this one."""
    return ranks > 1 or where.launcher in ("slurm", "kubernetes")


def job_name(module: str) -> str:
    """What a cluster calls the job."""
    return f"effdet-{module.rpartition('.')[2]}"


def preview(module: str, ranks: int, where: Local) -> str:
    """What would be run, for a person: a command line that a shell takes, a job script, a manifest."""
    if not needs_launcher(ranks, where):
        return shlex.join([sys.executable, "-m", module]) + "\n"
    if where.launcher == "slurm":
        return sbatch_script(module, ranks, where)
    if where.launcher == "kubernetes":
        return mpi_job(module, ranks, where)
    return shlex.join(command(module, ranks, where)) + "\n"


def command(module: str, ranks: int, where: Local) -> list[str]:
    """The command line that runs the ranks and waits for them; without hosts all are here."""
    line = mpirun(ranks, where) if where.launcher == "mpirun" else horovodrun(ranks, where)
    return [*line, sys.executable, "-m", module, WORKER]


def horovodrun(ranks: int, where: Local) -> list[str]:
    """Over ssh; PipelineError where elastic asks for what is not there."""
    # Gloo by name: horovodrun would take MPI wherever it finds it. No cache: it remembers for an hour which
    # interfaces the hosts have.
    line = [str(Path(sys.executable).with_name("horovodrun")), "--gloo", "--disable-cache", "-np", str(ranks)]
    line += ["-H", ",".join(where.hosts)] if where.hosts else []
    interface = where.network_interface
    if where.elastic is not None:
        discovery = Path(where.elastic.discovery)
        if not os.access(discovery, os.X_OK):
            raise PipelineError(f"elastic.discovery: {discovery}: not a program that may be run")
        if not where.elastic.min_ranks <= ranks <= where.elastic.max_ranks:
            raise PipelineError(
                f"train.ranks is {ranks}, but elastic allows {where.elastic.min_ranks} to {where.elastic.max_ranks}"
            )
        if interface is None:  # horovodrun would wait for a second host to compare interfaces with
            raise PipelineError("elastic needs network_interface: the one by which the hosts see each other")
        cooldown = where.elastic.cooldown_seconds
        line += ["--min-np", str(where.elastic.min_ranks), "--max-np", str(where.elastic.max_ranks)]
        line += ["--host-discovery-script", str(discovery.resolve())]
        line += ["--blacklist-cooldown-range", str(cooldown), str(10 * cooldown)]
        line += ["--reset-limit", str(where.elastic.reset_limit)] if where.elastic.reset_limit is not None else []
    line += ["--network-interfaces", interface] if interface else []
    times = stall_variables(where.stall_seconds)
    line += ["--stall-check-warning-time-seconds", times["HOROVOD_STALL_CHECK_TIME_SECONDS"]]
    line += ["--stall-check-shutdown-time-seconds", times["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"]]
    line += ["--gloo-timeout-seconds", times["HOROVOD_GLOO_TIMEOUT_SECONDS"]]
    return line


def stall_variables(seconds: int) -> dict[str, str]:
    """Horovod's times, so that a stall ends the job within `seconds`.

    Horovod looks once in every check time c, forgets what it had cached of a waiting tensor on the first look after c,
    counts from there, and ends the job on the first look after the shutdown time: 2 c + shutdown + c at most. Gloo's
    own time-out finds a process that is stopped as a whole.
    """
    check = seconds // 6
    return {
        "HOROVOD_STALL_CHECK_TIME_SECONDS": str(check),
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": str(seconds - 3 * check),
        "HOROVOD_GLOO_TIMEOUT_SECONDS": str(seconds),
    }


def mpirun(ranks: int, where: Local) -> list[str]:
    """Over ssh or what else Open MPI knows; the ranks talk by MPI, for which Horovod must have been built."""
    hosts = ",".join(where.hosts) or f"localhost:{ranks}"
    # No binding: a rank has threads that load and decode, and would have one core for all of them.
    line = ["mpirun", "-np", str(ranks), "--host", hosts, "--bind-to", "none", "--map-by", "slot", "--tag-output"]
    line += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    if interface := where.network_interface:
        line += ["--mca", "btl_tcp_if_include", interface, "--mca", "oob_tcp_if_include", interface]
        line += ["-x", f"NCCL_SOCKET_IFNAME={interface}"]
    return line + _exports(stall_variables(where.stall_seconds), os.environ)


def _exports(given: Mapping[str, str], environment: Mapping[str, str]) -> list[str]:
    """mpirun's -x of what is given and of this process's variables that the ranks need."""
    told = {"PYTHONUNBUFFERED": "1", **given}
    names = sorted(name for name in environment if name in FORWARDED or name.startswith(FORWARDED_PREFIXES))
    words = [f"{name}={value}" for name, value in told.items()] + [name for name in names if name not in told]
    return [part for word in words for part in ("-x", word)]


def sbatch_script(module: str, ranks: int, where: Local) -> str:
    """The job: one process on its first node that brings the ranks together (pipeline.slurm_job)."""
    slurm = _given(where.slurm)
    options = {
        "job-name": job_name(module),
        "ntasks": str(ranks),
        "nodes": str(-(-ranks // slurm.ranks_per_node)),
        "ntasks-per-node": str(min(ranks, slurm.ranks_per_node)),
    }
    variables = {"PYTHONUNBUFFERED": "1", **stall_variables(where.stall_seconds)}
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{name}={value}" for name, value in options.items()),
        *(f"#SBATCH {option}" for option in slurm.options),
        f"#SBATCH --output={SLURM_LOG}",
        *(f"export {name}={value}" for name, value in variables.items()),
        shlex.join(["cd", str(Path.cwd())]),
        "exec " + shlex.join([sys.executable, "-m", "pipeline.slurm_job", module]),
    ]
    return "\n".join(lines) + "\n"


def mpi_job(module: str, ranks: int, where: Local) -> str:
    """The MPIJob: a launcher pod with mpirun, worker pods with sshd; the operator tells mpirun where they are."""
    cluster = _given(where.kubernetes)
    slots = max(1, cluster.gpus_per_worker)
    if ranks % slots:
        raise PipelineError(
            f"ranks is {ranks}, which is no multiple of kubernetes.gpus_per_worker {cluster.gpus_per_worker}"
        )
    settings = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    line = ["mpirun", "-np", str(ranks), "--bind-to", "none", "--map-by", "slot", "--tag-output"]
    line += ["--allow-run-as-root", "-wdir", cluster.workdir]
    if interface := where.network_interface:
        line += ["--mca", "btl_tcp_if_include", interface, "-x", f"NCCL_SOCKET_IFNAME={interface}"]
    line += _exports({**stall_variables(where.stall_seconds), **settings}, {})
    line += [cluster.python, "-m", module, WORKER]
    gpus = {"resources": {"limits": {"nvidia.com/gpu": cluster.gpus_per_worker}}} if cluster.gpus_per_worker else {}
    job = {
        "apiVersion": "kubeflow.org/v2beta1",
        "kind": "MPIJob",
        "metadata": {"generateName": f"{job_name(module)}-", "namespace": cluster.namespace},
        "spec": {
            "slotsPerWorker": slots,
            "sshAuthMountPath": SSH_KEYS,
            "runPolicy": {"backoffLimit": 0, "cleanPodPolicy": "Running"},
            "mpiReplicaSpecs": {
                "Launcher": {"replicas": 1, "restartPolicy": "Never", "template": _pod(cluster, {"command": line})},
                "Worker": {"replicas": ranks // slots, "restartPolicy": "Never", "template": _pod(cluster, gpus)},
            },
        },
    }
    yaml, text = YAML(), io.StringIO()
    yaml.default_flow_style = False
    yaml.width = 4096  # a word of the command stays on its line
    yaml.dump(job, text)
    return text.getvalue()


def _pod(cluster: Kubernetes, container: Mapping[str, Any]) -> dict[str, Any]:
    volumes = [
        {"name": "checkout", "persistentVolumeClaim": {"claimName": cluster.volume_claim}},
        {"name": "memory", "emptyDir": {"medium": "Memory"}},  # NCCL's between ranks: a pod has 64 MB there by itself
    ]
    mounts = [{"name": "checkout", "mountPath": cluster.workdir}, {"name": "memory", "mountPath": "/dev/shm"}]  # noqa: S108
    whole = {"name": "main", "image": cluster.image, "workingDir": cluster.workdir, "volumeMounts": mounts}
    return {"spec": {"containers": [{**whole, **container}], "volumes": volumes}}


def _given(block: Block | None) -> Block:
    if block is None:
        raise PipelineError("local.yaml: the launcher's block is missing")  # local.load refuses it already
    return block
