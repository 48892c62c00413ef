"""How training workers on several machines find each other: by the address under which Ray knows their machine.

Left alone, gloo listens where the machine's host name leads. On many machines that is 127.0.1.1, and the workers of
others would knock at their own doors. `GLOO_SOCKET_IFNAME`, where it is set, is left as it is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray.util
from ray.train.torch import TorchConfig

_INTERFACE = "GLOO_SOCKET_IFNAME"


def find_interface(address: str) -> str | None:
    """Give the name of the network interface that has an address, if one of this machine does."""
    for name, found in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in found):
            return name
    return None


def listen_where_ray_does() -> None:
    """Let gloo, in this process, listen at the address under which Ray knows this machine."""
    if name := find_interface(ray.util.get_node_ip_address()):
        os.environ.setdefault(_INTERFACE, name)


class _OwnAddress(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(listen_where_ray_does)
        super().on_start(worker_group, backend_config)


@dataclass
class Reachable(TorchConfig):
    """Connects the workers of a training, wherever their host names lead."""

    @property
    def backend_cls(self) -> type:
        """Give what Ray Train starts the process group with."""
        return _OwnAddress
