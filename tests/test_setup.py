"""Set-up: what `make` needs, makes once, and makes again when a pin changes; and the rules of the tests themselves."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PREREQUISITES = ["python3.11", "gcc", "g++", "cmake", "make", "git"]
# Of Debian's essential packages, what make's recipes and the Horovod script call.
ESSENTIAL = ["awk", "bash", "cat", "cp", "cut", "dirname", "grep", "gzip", "id", "mkdir", "mktemp", "nproc", "rm"]
ESSENTIAL += ["sed", "sha256sum", "tar", "touch"]

CHANGED_IN_HOROVOD = {
    "common/gloo/gloo_controller.cc": "global_ranks_.reserve(size_);",
    "common/gloo/gloo_context.cc": "::InitializeForProcessSet\n device_attr.iface = gloo_iface_;",
    "runner/common/util/network.py": "cloudpickle.loads(message)",
    "runner/elastic/rendezvous.py": "codec.loads_base64(value)",
    "runner/elastic/worker.py": "self.res = res",
    "runner/http/http_client.py": "codec.loads_base64(answer)",
    "tensorflow/CMakeLists.txt": "xla_mpi_ops.cc",
}

# Stands for python3.11 and for the interpreter of the environment it makes: writes down how it was called, and fails
# where it takes the file that the environment variable names.
STUB_PYTHON = """#!/bin/bash
echo "$*" >>"$CALLS"
case "$*" in
  "-m venv --clear "*) rm -rf "$4"; mkdir -p "$4/bin"; cat "$0" >"$4/bin/python"; chmod +x "$4/bin/python" ;;
  *"$FAIL_AT") exit 1 ;;
  "-m pip download "*) while [ "$1" != --dest ]; do shift; done; cp "$SDIST" "$2/horovod-0.28.1.tar.gz" ;;
esac
"""


class Machine:
    """A copy of what set-up reads, and a PATH that holds stand-ins for the prerequisites and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.project = folder / "project"
        self.programs = folder / "bin"
        self.calls_file = folder / "calls"
        self.sdist = self._sdist(folder / "sdist")
        for part in ("docker", "requirements"):
            shutil.copytree(ROOT / part, self.project / part)
        shutil.copy(ROOT / "Makefile", self.project)
        self.programs.mkdir()
        for program in [*ESSENTIAL, "chmod", "make"]:
            found = shutil.which(program)
            assert found, program
            (self.programs / program).symlink_to(found)
        for program in set(PREREQUISITES) - {"make"}:
            self.add(program)

    def _sdist(self, folder: Path) -> Path:
        """What the Horovod script changes of Horovod's source, packed."""
        for file, line in CHANGED_IN_HOROVOD.items():
            path = folder / "horovod-0.28.1" / "horovod" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{line}\n")
        with tarfile.open(folder / "horovod.tar.gz", "w:gz") as archive:
            archive.add(folder / "horovod-0.28.1", "horovod-0.28.1")
        return folder / "horovod.tar.gz"

    def add(self, program: str) -> None:
        (self.programs / program).write_text(STUB_PYTHON if program == "python3.11" else "#!/bin/bash\n")
        (self.programs / program).chmod(0o755)

    def make(self, target: str = "setup", fail_at: str = "nothing") -> subprocess.CompletedProcess[str]:
        self.calls_file.unlink(missing_ok=True)
        environment = {"PATH": str(self.programs), "CALLS": str(self.calls_file), "FAIL_AT": fail_at}
        environment["SDIST"] = str(self.sdist)
        return subprocess.run(
            [shutil.which("make") or "make", target],
            cwd=self.project,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self) -> list[str]:
        """What the last make called Python with, less its questions."""
        if not self.calls_file.exists():
            return []
        return [call for call in self.calls_file.read_text().splitlines() if not call.startswith("-c ")]

    def installed(self) -> list[str]:
        """The requirement files of the last make, in order."""
        return [Path(call).name for call in self.calls() if " -r " in call]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_make_alone_lists_the_targets(machine: Machine) -> None:
    listed = machine.make("help").stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    assert set(re.findall(r"^make ([a-z-]+) +\S", listed, re.MULTILINE)) == set(phony[1].split()) - {"help"}
    assert ".DEFAULT_GOAL := help" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("program", PREREQUISITES)
@pytest.mark.parametrize("target", ["demo", "test"])
def test_a_missing_prerequisite_stops_with_the_command_that_installs_it(
    machine: Machine, program: str, target: str
) -> None:
    (machine.programs / program).unlink()
    made = machine.make(target)
    packages = "python3.11 python3.11-venv" if program == "python3.11" else program
    assert made.returncode != 0
    assert re.search(
        rf"not found on this machine; install with: (sudo )?apt-get install -y {re.escape(packages)}\.", made.stderr
    )
    assert machine.calls() == []
    assert not (machine.project / ".venv").exists()


def test_all_that_is_missing_is_named_at_once(machine: Machine) -> None:
    for program in ("cmake", "g++"):
        (machine.programs / program).unlink()
    assert "apt-get install -y g++ cmake." in machine.make().stderr


def test_a_second_call_does_nothing(machine: Machine) -> None:
    assert machine.make().returncode == 0
    assert machine.installed() == ["build.txt", "ml.txt", "horovod.txt"]
    second = machine.make()
    assert second.returncode == 0
    assert machine.calls() == []


def test_an_environment_behind_a_link_is_left_alone(machine: Machine, tmp_path: Path) -> None:
    """`venv --clear` follows links: other people's environment would be emptied."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "used").touch()
    (machine.project / ".venv").symlink_to(tmp_path / "shared")
    made = machine.make()
    assert made.returncode != 0
    assert "error: .venv is a link" in made.stderr
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["used"]
    assert machine.calls() == []


@pytest.mark.parametrize(
    ("fail_at", "then_installed"),
    [
        ("build.txt", ["build.txt", "ml.txt", "horovod.txt"]),
        ("ml.txt", ["build.txt", "ml.txt", "horovod.txt"]),
        ("horovod.txt", ["horovod.txt"]),
    ],
)
def test_an_interrupted_set_up_is_not_taken_for_done(machine: Machine, fail_at: str, then_installed: list[str]) -> None:
    assert machine.make(fail_at=fail_at).returncode != 0
    assert machine.make().returncode == 0
    assert machine.installed() == then_installed


@pytest.mark.parametrize(
    ("changed", "then_installed"),
    [
        ("requirements/ml.txt", ["build.txt", "ml.txt", "horovod.txt"]),
        ("requirements/horovod.txt", ["horovod.txt"]),
        ("docker/build_horovod.sh", ["horovod.txt"]),
        ("requirements/airflow.txt", []),
    ],
)
def test_changed_pins_are_installed(machine: Machine, changed: str, then_installed: list[str]) -> None:
    machine.make()
    with (machine.project / changed).open("a") as file:
        file.write("# changed\n")
    machine.make()
    assert machine.installed() == then_installed


def test_airflow_has_an_environment_of_its_own(machine: Machine) -> None:
    assert machine.make("airflow-setup").returncode == 0
    assert machine.installed() == ["airflow.txt"]
    assert all(call.startswith("-m ") and ".venv " not in call for call in machine.calls())
    assert machine.make("airflow-setup").returncode == 0
    assert machine.installed() == []
    with (machine.project / "requirements/airflow.txt").open("a") as file:
        file.write("# changed\n")
    assert machine.make("airflow-setup", fail_at="airflow.txt").returncode != 0
    machine.make("airflow-setup")
    assert machine.installed() == ["airflow.txt"]


def test_horovod_is_built_again_once_there_is_mpi(machine: Machine) -> None:
    machine.make()
    machine.add("mpicxx")
    machine.make()
    assert machine.installed() == ["horovod.txt"]


@pytest.mark.parametrize("name", ["build.txt", "ml.txt", "airflow.txt", "horovod.txt", "tools.txt"])
def test_every_requirement_is_pinned_and_hashed_and_from_no_named_index(name: str) -> None:
    text = "\n".join(
        line for line in (ROOT / "requirements" / name).read_text().splitlines() if not line.startswith("#")
    )
    requirements = text.replace("\\\n", "").splitlines()
    assert requirements
    for requirement in requirements:
        assert re.fullmatch(r"[a-z0-9-]+(\[\S+\])?==\S+( ;.*?)?( +--hash=sha256:[0-9a-f]{64})+", requirement)


def test_the_environment_holds_what_the_pins_say() -> None:
    pinned = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "requirements/ml.txt").read_text(), re.MULTILINE))
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    ).stdout
    installed = {
        re.sub(r"[._]", "-", name).lower(): version
        for name, version in (line.split("==") for line in listed.splitlines())
    }
    assert {name: installed.get(name) for name in pinned} == pinned
    assert "torch" not in installed


@pytest.mark.system
@pytest.mark.needs("mpicxx", "mpirun")
def test_two_processes_meet_over_mpi(tmp_path) -> None:
    # Told in files: mpirun may cut two ranks' printed lines into one another.
    program = (
        "import sys, pathlib, tensorflow as tf, horovod.tensorflow as hvd; hvd.init(); assert hvd.mpi_enabled();"
        "total = hvd.allreduce(tf.constant(hvd.rank() + 1), op=hvd.Sum).numpy();"
        "pathlib.Path(sys.argv[1], str(hvd.rank())).write_text(str(total))"
    )
    ran = subprocess.run(
        ["horovodrun", "--mpi", "-np", "2", sys.executable, "-c", program, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    sums = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert sums == {"0": "3", "1": "3"}, ran.stderr  # 1 + 2, told by both


def run_pytest(folder: Path, tests: str) -> str:
    """pytest's output over a file of tests, under this project's rules; bash is a known program, and so is nowhere."""
    (folder / "tests").mkdir()
    (folder / "tests/test_sample.py").write_text("import pytest\n" + tests)
    conftest = (ROOT / "tests/conftest.py").read_text()
    known = "PACKAGES = {"
    assert known in conftest
    programs = '"bash": "bash-package", "nowhere": "nowhere-package", '
    (folder / "tests/conftest.py").write_text(conftest.replace(known, known + programs))
    shutil.copy(ROOT / "pyproject.toml", folder)
    ran = subprocess.run([sys.executable, "-m", "pytest"], cwd=folder, capture_output=True, text=True, check=False)
    return ran.stdout + ran.stderr


def test_a_missing_program_is_named_first_and_its_test_skipped_with_the_reason(tmp_path: Path) -> None:
    output = run_pytest(tmp_path, "@pytest.mark.system\n@pytest.mark.needs('nowhere', 'bash')\ndef test_it(): pass\n")
    install = "apt-get install -y nowhere-package"
    assert f"missing: nowhere; install it with: {install}" in output
    assert re.search(rf"SKIPPED .*: nowhere not found; {install}$", output, re.MULTILINE)
    assert "1 skipped in" in output


def test_a_test_whose_programs_are_here_may_not_skip(tmp_path: Path) -> None:
    tests = "@pytest.mark.system\n@pytest.mark.needs('bash')\ndef test_it(): pytest.skip('not today')\n"
    output = run_pytest(tmp_path, tests)
    assert "skipped, though all it `needs` is here" in output
    assert "not today" in output
    assert "1 failed in" in output


def test_a_module_may_not_skip_itself(tmp_path: Path) -> None:
    output = run_pytest(tmp_path, "pytest.importorskip('nothing_of_this_name')\n")
    assert "skipped, though all it `needs` is here" in output
    assert "1 error in" in output


@pytest.mark.parametrize(
    ("marks", "complaint"),
    [
        ("@pytest.mark.fast\n@pytest.mark.slow", "marked fast, slow; keep one"),
        ("@pytest.mark.slow\n@pytest.mark.needs('bash')", "needs bash; mark it `system`"),
        ("@pytest.mark.system\n@pytest.mark.needs('vi')", "needs vi; add it to tests/conftest.py: PACKAGES"),
        ("@pytest.mark.quick", "'quick' not found in `markers`"),
    ],
)
def test_a_test_bears_one_known_mark(tmp_path: Path, marks: str, complaint: str) -> None:
    assert complaint in run_pytest(tmp_path, f"{marks}\ndef test_it(): pass\n")
