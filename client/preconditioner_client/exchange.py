"""What the optimizer needs of whoever computes its roots: one small interface, and its in-process form.

The optimizer speaks to an :class:`Exchange` only. ``service_exchange.ServiceExchange`` carries it over gRPC;
:class:`LocalExchange` computes the roots in process, with an exact delay in steps, for tests, synchronous
baselines and studies of staleness.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from preconditioner_client.config import Ridge
from preconditioner_client.roots import inverse_root
from preconditioner_protos import unpack


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One block as the service knows it.

    Attributes:
        name: parameter and slice, for people.
        sides: lengths n of the preconditioned sides.
        root_orders: p per side; the preconditioner is ``(A + ridge I)^(-1/p)``.
        ridge: how the spectrum is conditioned.
    """

    name: str
    sides: tuple[int, ...]
    root_orders: tuple[float, ...]
    ridge: Ridge


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """All that a session fixes.

    Attributes:
        job: name of the training job.
        epoch: grows with every life of the job.
        blocks: named by their index everywhere else.
        rank: of this process.
        world_size: number of processes of the job.
        max_staleness: the bound N, in steps.
        snapshots_in_flight: how many versions of a block may be under way.
        devices: for each block where its preconditioners go on to. Those for CUDA should arrive in
            page-locked memory; an exchange may do without. Empty: all stay on the host.
    """

    job: str
    epoch: int
    blocks: tuple[BlockSpec, ...]
    rank: int = 0
    world_size: int = 1
    max_staleness: int = 0
    snapshots_in_flight: int = 1
    devices: tuple[torch.device, ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Statistics of one block as they stood after step ``step``.

    Attributes:
        block: index in the session's blocks.
        step: the version's step.
        sides: per side a 1-D float32 CPU tensor of ``n (n + 1) / 2`` values, the upper triangle row by row.
            The receiver owns them; nobody writes to them again.
        ready: recorded when an asynchronous copy from the device into ``sides`` was enqueued; they must not
            be read before it is done. None: they can be read now.
    """

    block: int
    step: int
    sides: tuple[torch.Tensor, ...]
    ready: torch.cuda.Event | None = None


@dataclass(frozen=True, slots=True)
class Arrival:
    """A preconditioner: per side an exactly symmetric float32 CPU tensor of shape (n, n)."""

    block: int
    step: int
    sides: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Rejection:
    """No preconditioner will come from (block, step).

    ``reason`` is the name of the protocol's ``NackReason`` without its prefix, as in ``ROOT_FAILED``, of a
    NACK or of what was wrong with the preconditioner that came; or ``OUTBOX_FULL``: the snapshot was never
    sent.
    """

    block: int
    step: int
    reason: str
    detail: str


class ExchangeError(RuntimeError):
    """The service refuses this trainer for good; the message says why and what to do."""


@runtime_checkable
class Exchange(Protocol):
    """Takes snapshots, brings preconditioners. No method but :meth:`wait` and :meth:`close` ever blocks.

    All methods are called from the training thread.
    """

    @property
    def generation(self) -> int:
        """Grows whenever a connection is made anew; what was offered before may be lost."""

    def open(self, session: SessionSpec) -> None:
        """Begin, or begin anew with another manifest or epoch; what was offered before is dropped."""

    def offer(self, snapshots: Sequence[Snapshot], step: int) -> None:
        """Hand over snapshots during step ``step``. One that was not sent yet may be replaced."""

    def collect(self, step: int) -> list[Arrival | Rejection]:
        """What has arrived, in order of arrival; each is returned once.

        Raises:
            ExchangeError: the service refuses this trainer for good. Raised once, and only before the first
                session was opened; later refusals are logged, since training must go on.
        """

    def wait(self, timeout: float) -> bool:
        """Block until :meth:`collect` may have something or ``generation`` changed.

        Args:
            timeout: seconds to block at most.

        Returns:
            False if nothing happened within ``timeout``.
        """

    def counters(self) -> dict[str, int]:
        """Totals since construction.

        ``bytes_sent``, ``bytes_received`` (packed matrices), ``snapshots_sent``, ``snapshots_replaced``
        (never sent), ``received``, ``dropped`` (arrived, but corrupt or outdated), ``nacks``, ``connections``
        and ``connected`` (0 or 1).
        """

    def close(self) -> None:
        """End the session; may block for a few seconds. Idempotent."""


class LocalExchange:
    """Roots computed in this process, and delivered exactly ``delay`` steps after their snapshot.

    With ``delay=0`` a preconditioner is there in the very step of its snapshot, as in synchronous Shampoo.
    Deterministic: no thread, no clock.
    """

    def __init__(self, delay: int = 0) -> None:
        if delay < 0:
            raise ValueError(f"delay must be >= 0 steps, not {delay}")
        self._delay = delay
        self._session: SessionSpec | None = None
        self._queue: deque[Snapshot] = deque()
        self._counters = dict.fromkeys(
            (
                "bytes_sent",
                "bytes_received",
                "snapshots_sent",
                "snapshots_replaced",
                "received",
                "dropped",
                "nacks",
                "connections",
            ),
            0,
        )

    @property
    def generation(self) -> int:
        """See :class:`Exchange`."""
        return self._counters["connections"]

    def open(self, session: SessionSpec) -> None:
        """See :class:`Exchange`."""
        self._session = session
        self._queue.clear()
        self._counters["connections"] += 1

    def offer(self, snapshots: Sequence[Snapshot], step: int) -> None:
        """See :class:`Exchange`."""
        self._queue.extend(snapshots)
        self._counters["snapshots_sent"] += len(snapshots)
        self._counters["bytes_sent"] += sum(side.nbytes for s in snapshots for side in s.sides)

    def collect(self, step: int) -> list[Arrival | Rejection]:
        """See :class:`Exchange`."""
        arrived: list[Arrival | Rejection] = []
        while self._queue and self._queue[0].step + self._delay <= step:
            arrived.append(self._compute(self._queue.popleft()))
        return arrived

    def _compute(self, snapshot: Snapshot) -> Arrival | Rejection:
        if self._session is None:
            raise RuntimeError("offer came before open")
        spec = self._session.blocks[snapshot.block]
        if snapshot.ready is not None:
            snapshot.ready.synchronize()
        try:
            sides = tuple(
                inverse_root(torch.from_numpy(unpack(packed.numpy(), n)), p, spec.ridge)
                for packed, n, p in zip(snapshot.sides, spec.sides, spec.root_orders, strict=True)
            )
        except ValueError as error:
            self._counters["nacks"] += 1
            return Rejection(snapshot.block, snapshot.step, "ROOT_FAILED", str(error))
        self._counters["received"] += 1
        self._counters["bytes_received"] += sum(n * (n + 1) // 2 * 4 for n in spec.sides)
        return Arrival(snapshot.block, snapshot.step, sides)

    def wait(self, timeout: float) -> bool:
        """See :class:`Exchange`. Nothing happens here between two steps, so it returns at once."""
        return False

    def counters(self) -> dict[str, int]:
        """See :class:`Exchange`."""
        return {**self._counters, "connected": int(self._session is not None)}

    def close(self) -> None:
        """See :class:`Exchange`."""
        self._queue.clear()
