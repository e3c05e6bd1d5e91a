"""Creates an MPIJob (kubeflow.org/v2beta1, its operator runs in the cluster) with kubectl, and shows its log."""

import json
import subprocess
import time

from pipeline.errors import PipelineError
from pipeline.launchers import mpi_job
from pipeline.local import Local
from pipeline.rank_output import Heard, follow

ROLE = "training.kubeflow.org/job-name={name},training.kubeflow.org/job-role=launcher"


class KubernetesJob:
    """The job, its launcher pod's log, and that pod's exit code."""

    def __init__(self, module: str, ranks: int, where: Local, heard: Heard) -> None:
        self._namespace = where.kubernetes.namespace if where.kubernetes else "default"
        self._heard = heard
        self._taken_away = False
        self._log: subprocess.Popen[bytes] | None = None
        created = self._kubectl("create", "-f", "-", "-o", "name", given=mpi_job(module, ranks, where))
        self._name = created.strip().rpartition("/")[2]  # "mpijob.kubeflow.org/effdet-train-x2b7p"
        print(f"Kubernetes MPIJob {self._name} in namespace {self._namespace}", flush=True)

    def code(self) -> int | None:
        pods = json.loads(self._kubectl("get", "pods", "-l", ROLE.format(name=self._name), "-o", "json"))["items"]
        if not pods:  # the operator has not made it yet, or it was taken away
            return 1 if self._taken_away else None
        states = [status["state"] for status in pods[-1]["status"].get("containerStatuses", [])]
        if self._log is None and any("running" in state or "terminated" in state for state in states):
            self._show(pods[-1]["metadata"]["name"])
        ended = [state["terminated"]["exitCode"] for state in states if "terminated" in state]
        if ended and self._log is not None:
            self._log.wait()
            return int(ended[0])
        time.sleep(2)  # a question to the cluster, not to this machine
        return None

    def _show(self, pod: str) -> None:
        line = ["kubectl", "--namespace", self._namespace, "logs", "--follow", pod]
        self._log = subprocess.Popen(line, process_group=0, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if self._log.stdout:
            follow(self._log.stdout, False, self._heard)

    def ask_to_stop(self) -> None:
        """Takes the job away: pods are not told to save, and a run goes on from its last checkpoint."""
        self.end()

    def end(self) -> None:
        self._taken_away = True
        self._kubectl("delete", "mpijob", self._name, "--ignore-not-found", "--wait=false")

    def _kubectl(self, *words: str, given: str | None = None) -> str:
        """What kubectl says. PipelineError with its words where it fails."""
        line = ["kubectl", "--namespace", self._namespace, *words]
        try:
            done = subprocess.run(line, input=given, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise PipelineError("kubectl: not found: launcher kubernetes needs it; --dry-run needs it not") from None
        if done.returncode:
            raise PipelineError(f"kubectl {words[0]}: {done.stderr.strip() or f'exit {done.returncode}'}")
        return done.stdout
