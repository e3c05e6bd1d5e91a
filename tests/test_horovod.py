"""What docker/build_horovod.sh changes in Horovod 0.28.1: what others may send is not unpickled as it comes."""

import contextlib
import http.client
import io
import pickle
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from horovod.runner.common.util.network import PingResponse, Wire
from horovod.runner.elastic.rendezvous import PUT_WORKER_ADDRESSES, create_rendezvous_handler
from horovod.runner.elastic.worker import HostsUpdatedRequest, HostUpdateResult
from horovod.runner.http.http_client import put_data_into_kvstore, read_data_from_kvstore
from horovod.runner.http.http_server import KVStoreServer, RendezvousServer

pytestmark = pytest.mark.fast


class Planted:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.path,)


def test_a_worker_is_registered_and_a_pickle_is_not_opened(tmp_path: Path) -> None:
    registered: list[Any] = []

    class Driver:
        def register_worker_server(self, *worker: Any) -> None:
            registered.append(worker)

    server = RendezvousServer()
    port = server.start(create_rendezvous_handler(Driver()))
    server.init([])
    try:
        addresses = {"eth0": [("10.0.0.2", 1234)]}, b"\x00'key\xff"
        put_data_into_kvstore("127.0.0.1", port, PUT_WORKER_ADDRESSES, "host:0", addresses)
        _put(port, f"/{PUT_WORKER_ADDRESSES}/host:1", tmp_path / "opened")
    finally:
        server.stop()
    assert registered == [("host", 0, *addresses)]
    assert not (tmp_path / "opened").exists()


def test_a_planted_value_is_not_opened_by_who_reads_it(tmp_path: Path) -> None:
    server = KVStoreServer(verbose=0)
    port = server.start_server()
    try:
        _put(port, "/runfunc/func", tmp_path / "opened")
        with pytest.raises((ValueError, SyntaxError)):
            read_data_from_kvstore("127.0.0.1", port, "runfunc", "func")
    finally:
        server.shutdown_server()
    assert not (tmp_path / "opened").exists()


def test_services_read_their_messages_and_nothing_else(tmp_path: Path) -> None:
    assert vars(_sent(PingResponse("worker", "10.0.0.2"))) == {"service_name": "worker", "source_address": "10.0.0.2"}
    for result in (*HostUpdateResult, HostUpdateResult.mixed):
        assert vars(_sent(HostsUpdatedRequest(3, result))) == {"timestamp": 3, "res": result}
    with pytest.raises(pickle.UnpicklingError, match=r"is no message"):
        _sent(Planted(tmp_path / "opened"))
    with pytest.raises(pickle.UnpicklingError, match=r"is no message"):
        _sent(PingResponse("worker", Planted(tmp_path / "opened")))
    assert not (tmp_path / "opened").exists()


def _sent(message: Any) -> Any:
    """As the other side reads it, whose key the sender knows."""
    wire, line = Wire(b"key"), io.BytesIO()
    wire.write(message, line)
    line.seek(0)
    return wire.read(line)


def _put(port: int, path: str, planted: Path) -> None:
    """As someone who is not of the job: a pickle, in base64, which is what 0.28.1 opens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("PUT", path, b64encode(pickle.dumps(Planted(planted))))
    with contextlib.closing(connection), contextlib.suppress(http.client.RemoteDisconnected):  # it gave up on that
        connection.getresponse().read()
