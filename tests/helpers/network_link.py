"""What lies between a trainer and a service, to be slowed, made lossy, and cut.

Three ways:

- :class:`NamespaceLink` with tc: two network namespaces and a router between them, whose queues are netem's.
- The same with a relay of packets in place of the router, where the kernel has no netem.
- :class:`ProxyLink`, where there is no right to make namespaces. A TCP proxy loses no packets, so a loss is a
  stall as long as a retransmission takes.

Addresses exist only inside the namespaces, and these only for as long as the link.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preconditioner_worker.faults.proxy import Proxy, Shape
from service_process import ServiceProcess

TRAINER, SERVICE = "10.231.0.1", "10.231.1.1"
_numbers = itertools.count()


def _run(*command: str) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if finished.returncode:
        raise OSError(f"{' '.join(command)}: {finished.stderr.strip()}")
    return finished.stdout


def why_no_namespaces() -> str | None:
    """Why this machine cannot make them; None if it can."""
    if shutil.which("ip") is None:
        return "there is no ip command here (iproute2)"
    name = f"probe-{os.getpid()}-{next(_numbers)}"
    try:
        _run("ip", "netns", "add", name)
    except OSError as error:
        return f"no right to make network namespaces ({error})"
    try:
        _run("ip", "-n", name, "tuntap", "add", "dev", "probe", "mode", "tun")
    except OSError as error:
        return f"neither netem nor TUN devices ({error})" if why_no_netem() else None
    finally:
        _run("ip", "netns", "del", name)
    return None


def why_no_netem() -> str | None:
    """Why tc cannot delay and lose packets here; None if it can."""
    if shutil.which("tc") is None:
        return "there is no tc command here (iproute2)"
    name = f"probe-{os.getpid()}-{next(_numbers)}"
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
    except OSError as error:
        return f"the kernel has no netem ({str(error).rpartition(': ')[2]})"
    finally:
        _run("ip", "netns", "del", name)
    return None


class Namespaces:
    """Two namespaces without a wire; ``trainer`` and ``service`` are their names."""

    def __init__(self) -> None:
        stem = f"pre-{os.getpid()}-{next(_numbers)}"
        self.trainer, self.service, self.router = f"{stem}-t", f"{stem}-s", f"{stem}-r"
        self._made: list[str] = []
        for name in (self.trainer, self.service):
            self.make(name)

    def make(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        self._made.append(name)
        _run("ip", "-n", name, "link", "set", "lo", "up")

    def configure(self, name: str, device: str, own: str, gateway: str | None = None) -> None:
        _run("ip", "-n", name, "addr", "add", own, "dev", device)
        _run("ip", "-n", name, "link", "set", device, "up")
        if gateway is not None:
            via = ["via", gateway] if gateway else []
            _run("ip", "-n", name, "route", "add", "default", *via, "dev", device)

    def remove(self) -> None:
        for name in self._made:
            with contextlib.suppress(OSError):
                _run("ip", "netns", "del", name)


class RouterWire:
    """A third namespace that forwards, whose queues are tc's. Cut, it drops without a word."""

    kind = "network namespaces, tc netem"

    def __init__(self, spaces: Namespaces) -> None:
        self._router = spaces.router
        spaces.make(self._router)
        for name, device, net in ((spaces.trainer, "t", "10.231.0"), (spaces.service, "s", "10.231.1")):
            _run(
                "ip", "-n", self._router, "link", "add", device, "type", "veth",
                "peer", "name", "wire", "netns", name,
            )  # fmt: skip
            spaces.configure(self._router, device, f"{net}.2/24")
            spaces.configure(name, "wire", f"{net}.1/24", gateway=f"{net}.2")
        self.set(cut=False)

    def set(
        self, *, delay: float = 0.0, loss: float = 0.0, rate: int | None = None, cut: bool = False
    ) -> None:
        forward = f"net.ipv4.ip_forward={int(not cut)}"
        _run("ip", "netns", "exec", self._router, "sysctl", "-qw", forward)
        for device in ("t", "s"):
            netem = ["netem", "delay", f"{delay * 1e3:g}ms", "loss", f"{loss * 100:g}%"]
            if rate is not None:
                netem += ["rate", f"{rate}bit"]
            _run("ip", "netns", "exec", self._router, "tc", "qdisc", "replace", "dev", device, "root", *netem)

    def close(self) -> None:
        """Nothing beyond the namespace."""


class RelayWire:
    """Packets carried by :mod:`packet_relay`."""

    kind = "network namespaces, packets relayed"

    def __init__(self, spaces: Namespaces) -> None:
        self._relay = subprocess.Popen(
            ["ip", "netns", "exec", spaces.trainer, sys.executable,
             str(Path(__file__).with_name("packet_relay.py")), "wire", spaces.service, "wire"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._answer() == "ready", "the relay did not start"
        spaces.configure(spaces.trainer, "wire", f"{TRAINER}/32", gateway="")
        spaces.configure(spaces.service, "wire", f"{SERVICE}/32", gateway="")

    def set(
        self, *, delay: float = 0.0, loss: float = 0.0, rate: int | None = None, cut: bool = False
    ) -> None:
        assert self._relay.stdin is not None
        settings = {"delay": delay, "loss": loss, "rate": rate, "cut": cut}
        self._relay.stdin.write(json.dumps(settings) + "\n")
        self._relay.stdin.flush()
        assert self._answer() == "set", "the relay is gone"

    def _answer(self) -> str:
        assert self._relay.stdout is not None
        return self._relay.stdout.readline().strip()

    def close(self) -> None:
        assert self._relay.stdin is not None
        assert self._relay.stdout is not None
        self._relay.stdin.close()
        self._relay.wait(10)
        self._relay.stdout.close()


class NamespaceLink:
    """Trainer and service in a namespace each.

    ``trainer_prefix`` stands before the trainer's command; ``start_service`` makes the service.
    """

    def __init__(self) -> None:
        self._spaces = Namespaces()
        self.note = why_no_netem()
        try:
            self._wire: Any = (RelayWire if self.note else RouterWire)(self._spaces)
        except BaseException:
            self._spaces.remove()
            raise
        self.kind = self._wire.kind
        self.trainer_prefix = ["ip", "netns", "exec", self._spaces.trainer]

    def make_service(self, arguments: Sequence[str] = ()) -> ServiceProcess:
        """Not started yet."""
        return ServiceProcess(
            arguments=["--allow-plaintext", *arguments],
            host=SERVICE,
            prefix=["ip", "netns", "exec", self._spaces.service],
        )

    def reach(self, service: ServiceProcess) -> str:
        """The address for the trainer."""
        return service.address

    def shape(self, *, round_trip: float = 0.0, loss: float = 0.0, rate: int | None = None) -> None:
        """Both directions alike; ``rate`` in bit/s."""
        self._wire.set(delay=round_trip / 2, loss=loss, rate=rate)

    def cut(self) -> None:
        """Nothing passes, and nobody is told."""
        self._wire.set(cut=True)

    def heal(self) -> None:
        """As at first."""
        self._wire.set()

    def close(self) -> None:
        self._wire.close()
        self._spaces.remove()


class ProxyLink:
    """A :class:`NamespaceLink` without rights."""

    kind = "TCP proxy"
    note = None

    def __init__(self) -> None:
        self.trainer_prefix: list[str] = []
        self._proxy: Proxy | None = None

    def make_service(self, arguments: Sequence[str] = ()) -> ServiceProcess:
        """Not started yet."""
        return ServiceProcess(arguments=arguments)

    def reach(self, service: ServiceProcess) -> str:
        """The address for the trainer."""
        self._proxy = self._proxy or Proxy(service.address)
        return self._proxy.address

    def shape(self, *, round_trip: float = 0.0, loss: float = 0.0, rate: int | None = None) -> None:
        """Both directions alike; ``rate`` in bit/s."""
        assert self._proxy is not None
        self._proxy.shape(Shape(delay=round_trip / 2, loss=loss, rate=rate))

    def cut(self) -> None:
        """Nothing passes, and nobody is told."""
        assert self._proxy is not None
        self._proxy.stall()

    def heal(self) -> None:
        """As at first."""
        assert self._proxy is not None
        self._proxy.heal()

    def close(self) -> None:
        if self._proxy is not None:
            self._proxy.close()
