"""The words that each launcher is told, and what `--dry-run` prints."""

import itertools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline import launchers
from pipeline.errors import PipelineError
from pipeline.local import Elastic, Kubernetes, Local, Slurm
from pipeline.slurm_job import tasks_per_node, variables

ROOT = Path(__file__).parents[2]
WORKER = [sys.executable, "-m", "pipeline.train", "--worker"]
CLUSTER = Kubernetes(image="registry/effdet:1", gpus_per_worker=8, volume_claim="work", workdir="/work")


def after(line: list[str], word: str) -> str:
    return line[line.index(word) + 1]


def test_horovodrun() -> None:
    program = str(Path(sys.executable).with_name("horovodrun"))
    times = ["--stall-check-warning-time-seconds", "10", "--stall-check-shutdown-time-seconds", "30"]
    begin, end = [program, "--gloo", "--disable-cache", "-np", "4"], [*times, "--gloo-timeout-seconds", "60", *WORKER]
    assert launchers.command("pipeline.train", 4, Local(stall_seconds=60)) == [*begin, *end]
    where = Local(hosts=["a:2", "b:2"], network_interface="eth1", stall_seconds=60)
    hosts = ["-H", "a:2,b:2", "--network-interfaces", "eth1"]
    assert launchers.command("pipeline.train", 4, where) == [*begin, *hosts, *end]


@pytest.mark.parametrize("seconds", [12, 13, 600])
def test_a_stall_is_found_in_time(seconds: int) -> None:
    found = launchers.stall_variables(seconds)
    check, shutdown = int(found["HOROVOD_STALL_CHECK_TIME_SECONDS"]), int(found["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"])
    assert 0 < check <= shutdown  # else Horovod would not shut down
    assert 3 * check + shutdown == seconds


def test_elastic(tmp_path: Path) -> None:
    discovery = tmp_path / "hosts.sh"
    elastic = Elastic(min_ranks=2, max_ranks=8, discovery=str(discovery), cooldown_seconds=30, reset_limit=9)
    where = Local(elastic=elastic, network_interface="eth0")
    with pytest.raises(PipelineError, match=r"elastic\.discovery: .*hosts\.sh: not a program that may be run"):
        launchers.command("pipeline.train", 4, where)
    discovery.write_text("#!/bin/sh\necho a:4\n")
    discovery.chmod(0o755)
    line = launchers.command("pipeline.train", 4, where)
    assert (after(line, "-np"), after(line, "--min-np"), after(line, "--max-np")) == ("4", "2", "8")
    assert after(line, "--host-discovery-script") == str(discovery)
    cooldown = line.index("--blacklist-cooldown-range")
    assert line[cooldown + 1 : cooldown + 3] == ["30", "300"]
    assert after(line, "--reset-limit") == "9"
    with pytest.raises(PipelineError, match=r"train\.ranks is 9, but elastic allows 2 to 8"):
        launchers.command("pipeline.train", 9, where)
    with pytest.raises(PipelineError, match="elastic needs network_interface"):
        launchers.command("pipeline.train", 4, Local(elastic=elastic))


def test_mpirun_hands_on_what_ranks_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFDET_PROFILE", "true")
    monkeypatch.setenv("NOBODYS", "1")
    where = Local(launcher="mpirun", hosts=["a:2", "b:2"], stall_seconds=60, network_interface="eth1")
    line = launchers.command("pipeline.train", 4, where)
    assert line[:5] == ["mpirun", "-np", "4", "--host", "a:2,b:2"]
    assert line[-4:] == WORKER
    told = [word for mark, word in itertools.pairwise(line) if mark == "-x"]
    assert {"EFFDET_PROFILE", "PATH", "HOROVOD_STALL_CHECK_TIME_SECONDS=10", "NCCL_SOCKET_IFNAME=eth1"} <= set(told)
    assert not any("NOBODYS" in word for word in told)
    assert after(launchers.command("pipeline.train", 3, Local(launcher="mpirun")), "--host") == "localhost:3"


def test_sbatch_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    slurm = Slurm(ranks_per_node=8, options=["--partition=gpu", "--time=8:00:00"])
    script = launchers.sbatch_script("pipeline.train", 12, Local(launcher="slurm", slurm=slurm))
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert {"#SBATCH --ntasks=12", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=8"} <= set(lines)
    assert {"#SBATCH --partition=gpu", "#SBATCH --time=8:00:00"} <= set(lines)
    assert shlex.split(lines[-2]) == ["cd", str(folder)]
    assert shlex.split(lines[-1]) == ["exec", sys.executable, "-m", "pipeline.slurm_job", "pipeline.train"]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_mpi_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFDET_LOADER_WORKERS", "4")
    where = Local(launcher="kubernetes", kubernetes=CLUSTER)
    job = YAML(typ="safe").load(launchers.mpi_job("pipeline.train", 16, where))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    launcher, worker = (job["spec"]["mpiReplicaSpecs"][role] for role in ("Launcher", "Worker"))
    assert (launcher["replicas"], worker["replicas"], job["spec"]["slotsPerWorker"]) == (1, 2, 8)
    line = launcher["template"]["spec"]["containers"][0]["command"]
    assert after(line, "-np") == "16"
    assert "EFFDET_LOADER_WORKERS=4" in line
    assert line[-4:] == ["python", "-m", "pipeline.train", "--worker"]
    (container,) = worker["template"]["spec"]["containers"]
    assert "command" not in container  # the operator's: sshd
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    with pytest.raises(PipelineError, match=r"ranks is 12, which is no multiple of .*gpus_per_worker 8"):
        launchers.mpi_job("pipeline.train", 12, where)


def test_on_cpus_a_pod_has_one_rank() -> None:
    where = Local(launcher="kubernetes", kubernetes=CLUSTER.model_copy(update={"gpus_per_worker": 0}))
    spec = YAML(typ="safe").load(launchers.mpi_job("pipeline.train", 3, where))["spec"]
    assert (spec["slotsPerWorker"], spec["mpiReplicaSpecs"]["Worker"]["replicas"]) == (1, 3)
    assert "resources" not in spec["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(("launcher", "first"), [("horovodrun", "horovodrun"), ("mpirun", "mpirun")])
def test_preview_is_what_a_shell_takes(launcher: str, first: str) -> None:
    where = Local.model_validate({"launcher": launcher})
    assert shlex.split(launchers.preview("pipeline.train", 2, where)) == launchers.command("pipeline.train", 2, where)
    assert Path(launchers.command("pipeline.train", 2, where)[0]).name == first


def test_one_rank_needs_no_launcher_here() -> None:
    assert shlex.split(launchers.preview("pipeline.train", 1, Local())) == [sys.executable, "-m", "pipeline.train"]
    cluster = Local(launcher="slurm", slurm=Slurm(ranks_per_node=8))
    assert "#SBATCH --ntasks=1\n" in launchers.preview("pipeline.train", 1, cluster)


# Of three nodes with 2, 2 and 1 tasks: the last one, and the second of the first node.
@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ({"PROCID": 4, "NODEID": 2, "LOCALID": 0}, "4 5 0 1 2 3"),
        ({"PROCID": 1, "NODEID": 0, "LOCALID": 1}, "1 5 1 2 0 2"),
    ],
)
def test_what_srun_says_in_horovods_words(task: dict[str, int], expected: str) -> None:
    given = {f"SLURM_{name}": str(value) for name, value in task.items()} | {
        "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    }
    found = variables(given, "1234")
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    assert " ".join(found[f"HOROVOD_{name}"] for name in names) == expected
    assert (found["HOROVOD_GLOO_RENDEZVOUS_ADDR"], found["HOROVOD_GLOO_RENDEZVOUS_PORT"]) == ("10.0.0.1", "1234")


def test_a_rank_without_srun_is_told_so() -> None:
    with pytest.raises(PipelineError, match="no variable 'SLURM_NODEID'; a rank is to be started by srun"):
        variables({}, "1")
    assert tasks_per_node("4") == [4]


@pytest.mark.slow
def test_dry_run_needs_no_data_and_runs_nothing(tmp_path: Path) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    settings = {"EFFDET_LAUNCHER": "slurm", "EFFDET_SLURM": "{ranks_per_node: 8}", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "pipeline.train", "--dry-run"]
    done = subprocess.run(
        line, cwd=tmp_path, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n#SBATCH ")
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]
