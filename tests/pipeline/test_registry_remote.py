"""A release over ssh: both remotes, git's and DVC's, behind Debian's sshd on loopback."""

import shutil
import sys
from pathlib import Path

import pytest

from pipeline import registry
from pipeline.verify import read_lock, verify
from tests.effdet.test_checkpoint_remote import Server
from tests.pipeline.small_registry import (
    ENVIRONMENT,
    clone,
    commit_candidate,
    consume,
    run,
    write_models,
    write_repository,
)

pytestmark = [pytest.mark.system, pytest.mark.needs("sshd")]


@pytest.fixture
def server(tmp_path):
    started = Server(tmp_path / "server")
    yield started
    started.stop()


def test_model_of_production_over_ssh(server, tmp_path, monkeypatch):
    write_models(tmp_path / "models")
    run(tmp_path, "git", "init", "-q", "--bare", "-b", "main", "origin")
    origin = f"ssh://stores{tmp_path}/origin"
    for name, value in {**ENVIRONMENT, **server.client()}.items():
        monkeypatch.setenv(name, value)
    write_repository(tmp_path / "repo", tmp_path / "models", origin, f"ssh://stores{tmp_path}/store")
    commit_candidate(tmp_path / "repo", 0.4, added=2)
    monkeypatch.chdir(tmp_path / "repo")
    monkeypatch.setattr(sys, "argv", ["promote", "promote", "--push", "origin"])
    registry.main()
    shutil.rmtree(tmp_path / "repo")
    assert (tmp_path / "store" / "files" / "md5").is_dir()
    clone(origin, tmp_path / "fresh")
    monkeypatch.chdir(tmp_path / "fresh")
    found = verify(read_lock(Path("dvc.lock").read_text()))  # what a reviewer's machine says of main
    assert found.exit_status == 0, (found.warnings, found.cannot)
    assert consume(tmp_path / "fresh", tmp_path / "got-from-clone") == 7
    assert consume(origin, tmp_path / "got") == 7
