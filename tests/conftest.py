"""The three marks, and who may skip: a test that `needs` a program which is missing, and nobody else."""

import os
import shutil
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

# Tests call dvc, horovodrun and python by name, and must get this environment's, also where it is not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ.update(DVC_NO_ANALYTICS="1", GX_ANALYTICS_ENABLED="false")

MARKS = {"fast", "slow", "system"}
PACKAGES = {  # program -> Debian package, for the programs that tests need
    "chromium": "chromium",
    "ip": "iproute2",
    "mount": "mount",
    "mpicxx": "libopenmpi-dev",
    "mpirun": "openmpi-bin",
    "munged": "munge",
    "node": "nodejs",
    "npm": "npm",
    "psql": "postgresql",
    "sbatch": "slurm-client",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sshd": "openssh-server",
    "unshare": "util-linux",
}


def missing_programs(item: pytest.Item) -> list[str]:
    # Daemons live in /usr/sbin, which is not on everyone's PATH.
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    needed = dict.fromkeys(program for mark in item.iter_markers("needs") for program in mark.args)
    return [program for program in needed if shutil.which(program, path=path) is None]


def install_line(programs: list[str]) -> str:
    return "apt-get install -y " + " ".join(dict.fromkeys(PACKAGES[program] for program in programs))


@pytest.hookimpl(tryfirst=True)  # before pytest selects by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marks = MARKS & {mark.name for mark in item.iter_markers()}
        if len(marks) > 1:
            raise pytest.UsageError(f"{item.nodeid}: marked {', '.join(sorted(marks))}; keep one")
        if not marks:
            item.add_marker("fast")
        for mark in item.iter_markers("needs"):
            if marks != {"system"}:
                raise pytest.UsageError(f"{item.nodeid}: needs {', '.join(mark.args)}; mark it `system`")
            if unknown := set(mark.args) - set(PACKAGES):
                raise pytest.UsageError(
                    f"{item.nodeid}: needs {', '.join(unknown)}; add it to tests/conftest.py: PACKAGES"
                )
        if missing := missing_programs(item):
            item.add_marker(pytest.mark.skip(f"{', '.join(missing)} not found; {install_line(missing)}"))


def pytest_report_collectionfinish(items: list[pytest.Item]) -> list[str]:
    missing = dict.fromkeys(program for item in items for program in missing_programs(item))
    return [f"missing: {program}; install it with: {install_line([program])}" for program in missing]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and not missing_programs(item):
        forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped:  # a whole module
        forbid_skip(report)
    return report


def forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    report.outcome = "failed"
    report.longrepr = f"skipped, though all it `needs` is here: {report.longrepr}"
