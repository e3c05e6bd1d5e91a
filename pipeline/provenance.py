"""What a model was trained with: versions, the weights it began with, hardware, and where the work ran.

No time, host name or path is in it: the same run on the same kind of machine gives the same file.
"""

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import tensorflow as tf

from pipeline.local import Local

PACKAGES = ("horovod", "keras", "numpy", "tensorflow")
CPUINFO = Path("/proc/cpuinfo")


def hardware() -> dict[str, Any]:
    """This machine's processor and the GPU that this process may use, as JSON has them."""
    gpus = tf.config.get_visible_devices("GPU")
    return {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "gpus": [tf.config.experimental.get_device_details(gpu).get("device_name", "unknown") for gpu in gpus],
    }


def provenance(settings: Local, ranks: list[dict[str, Any]], precision: str, begins_with: str | None) -> dict[str, Any]:
    """The content of provenance.json. `ranks` has the hardware of each rank.

    `begins_with`: the weights that training began with (pipeline.initial_weights.identity); None for random ones.
    """
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "precision": precision,
        "begins_with": begins_with,
        "ranks": ranks,
        "local": {
            "launcher": settings.launcher,
            "slots": [int(host.rpartition(":")[2]) for host in settings.hosts],  # of each host, unnamed
            "loader_workers": settings.loader_workers,
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", CPUINFO.read_text(), re.MULTILINE) if CPUINFO.exists() else None
    return found[1].strip() if found else platform.machine()
