"""Joins two network namespaces by a wire of its own making: packets are delayed, lost and paced in userspace.

For kernels without netem. Each end is a TUN device, so the kernel's own TCP meets the delay and the loss. Run
it inside of the first namespace; it ends with its standard input, and the devices with it::

    packet_relay.py FIRST_DEVICE SECOND_NAMESPACE SECOND_DEVICE

A line of JSON on standard input sets how both directions treat what comes from then on: ``{"delay": seconds,
"loss": share, "rate": bit per second or null, "cut": bool}``.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import struct
import sys
import time

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
CLONE_NEWNET = 0x40000000
# Packets that wait for a paced wire; as many as a small router has.
QUEUE = 100


def tun(name: str) -> int:
    """A TUN device of the current namespace."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return device


def enter(namespace: str) -> None:
    """Go over to another namespace (os.setns is there from Python 3.12 on only)."""
    handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(handle, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"setns {namespace}")
    os.close(handle)


class Wire:
    """Both directions."""

    def __init__(self, seed: int = 0) -> None:
        self.delay, self.loss, self.rate, self.cut = 0.0, 0.0, None, False
        self.due: list[tuple[float, int, int, bytes]] = []
        self._random = random.Random(seed)
        self._number = 0
        self._free: dict[int, float] = {}

    def take(self, packet: bytes, to: int) -> None:
        now = time.monotonic()
        if self.cut or self._random.random() < self.loss:
            return
        leaves = now
        if self.rate:
            seconds = len(packet) * 8 / self.rate
            begins = max(now, self._free.get(to, now))
            if begins - now > QUEUE * 1500 * 8 / self.rate:
                return
            leaves = self._free[to] = begins + seconds
        self._number += 1
        heapq.heappush(self.due, (leaves + self.delay, self._number, to, packet))

    def deliver(self) -> float | None:
        """Hand out what is due; seconds until there is more."""
        while self.due:
            wait = self.due[0][0] - time.monotonic()
            if wait > 0:
                return wait
            _, _, to, packet = heapq.heappop(self.due)
            if not self.cut:
                with contextlib.suppress(OSError):  # the device is not up yet
                    os.write(to, packet)
        return None


def main(first: str, namespace: str, second: str) -> None:
    one = tun(first)
    enter(namespace)
    two = tun(second)
    print("ready", flush=True)
    wire, other = Wire(), {one: two, two: one}
    while True:
        readable, _, _ = select.select([0, one, two], [], [], wire.deliver())
        for source in readable:
            if source != 0:
                wire.take(os.read(source, 65536), other[source])
                continue
            line = sys.stdin.readline()
            if not line:
                return
            for name, value in json.loads(line).items():
                setattr(wire, name, value)
            print("set", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
