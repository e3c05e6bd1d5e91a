"""What runs inside a Slurm job: the meeting point of the ranks, and their start (Slurm 20 and later, Horovod 0.28).

`python -m pipeline.slurm_job MODULE` is the job script's one process. It serves Horovod's rendezvous, so that Gloo
needs neither ssh nor MPI, and starts the ranks with srun as `python -m pipeline.slurm_job --rank PORT MODULE`, each of
which becomes `python -m MODULE --worker`.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping

import psutil

from pipeline import local
from pipeline.errors import PipelineError, run
from pipeline.launchers import WORKER

RANK = "--rank"


def serve(module: str) -> int:
    """Runs the ranks to their end; their exit code."""
    from horovod.runner.http.http_server import RendezvousServer  # Horovod's own modules, and no TensorFlow

    server = RendezvousServer()
    port = server.start()
    server.init([])
    # Blocks of ranks a node: Horovod's order. A rank that fails ends the others.
    # Slurm tells the ranks itself to stop; this process waits for their end. A handler, as srun would inherit SIG_IGN.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    line = ["srun", "--distribution=block", "--kill-on-bad-exit=1", "--label", "--unbuffered"]
    try:
        with subprocess.Popen([*line, sys.executable, "-m", "pipeline.slurm_job", RANK, str(port), module]) as process:
            return process.wait()
    finally:
        server.stop()


def variables(task: Mapping[str, str], port: str) -> dict[str, str]:
    """What Horovod asks of the environment, from what srun tells a task. PipelineError where no srun started it."""
    try:
        node, number = int(task["SLURM_NODEID"]), int(task["SLURM_LOCALID"])
        sizes = tasks_per_node(task["SLURM_STEP_TASKS_PER_NODE"])
        address = task["SLURM_LAUNCH_NODE_IPADDR"]
        rank, size = task["SLURM_PROCID"], task["SLURM_STEP_NUM_TASKS"]
    except KeyError as missing:
        raise PipelineError(f"slurm: no variable {missing}; a rank is to be started by srun") from None
    alike = [index for index, tasks in enumerate(sizes) if tasks > number]  # the nodes that have this local rank
    return {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": address,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": port,
        "HOROVOD_HOSTNAME": task.get("SLURMD_NODENAME", str(node)),
        "HOROVOD_RANK": rank,
        "HOROVOD_SIZE": size,
        "HOROVOD_LOCAL_RANK": str(number),
        "HOROVOD_LOCAL_SIZE": str(sizes[node]),
        "HOROVOD_CROSS_RANK": str(alike.index(node)),
        "HOROVOD_CROSS_SIZE": str(len(alike)),
    }


def tasks_per_node(text: str) -> list[int]:
    """Slurm's "2(x3),1" as [2, 2, 2, 1]."""
    parts = (re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(","))
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]


def interface_towards(address: str) -> str:
    """The name of the interface from which this machine reaches an address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing: it only asks for the route
        own = probe.getsockname()[0]
    names = [name for name, found in psutil.net_if_addrs().items() if any(entry.address == own for entry in found)]
    if not names:
        raise PipelineError(f"slurm: no interface has {own}, by which {address} is reached; set network_interface")
    return names[0]


def become_rank(port: str, module: str) -> None:
    """This process goes on as a rank."""
    told = variables(os.environ, port)
    interface = local.load().network_interface or interface_towards(told["HOROVOD_GLOO_RENDEZVOUS_ADDR"])
    told |= {"HOROVOD_GLOO_IFACE": interface, "NCCL_SOCKET_IFNAME": interface}
    os.execve(sys.executable, [sys.executable, "-m", module, WORKER], {**os.environ, **told})  # noqa: S606 no shell wanted


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == [RANK]:
        become_rank(*arguments[1:])
    else:
        sys.exit(serve(*arguments))


if __name__ == "__main__":
    run(main)
