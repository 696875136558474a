"""Snapshots that wait to be sent, and those that wait for an answer.

A plain data structure: whoever shares it between threads guards it with a lock of his own. Nothing here
looks into a tensor, so every operation costs microseconds.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from preconditioner_client.exchange import Snapshot

Key = tuple[int, int]
"""(block, step)."""


class Outbox:
    """The newest snapshots of every block, in the order in which the blocks asked, under credit.

    A snapshot that was not sent yet gives way to a newer one of its block, which takes over its place in
    the queue, so that a block that changes often does not starve.

    Args:
        block_bytes: packed bytes of one snapshot of each block.
        per_block: how many snapshots of one block may wait; beyond it the oldest gives way.
        max_bytes: bound of all that wait; beyond it the longest waiting are dropped. None: ``per_block``
            of every block is the bound.
    """

    def __init__(self, block_bytes: Sequence[int], per_block: int = 1, max_bytes: int | None = None) -> None:
        if per_block < 1:
            raise ValueError(f"per_block must be >= 1, not {per_block}")
        self._block_bytes = tuple(block_bytes)
        self._per_block = per_block
        self._max_bytes = max_bytes
        self._waiting: OrderedDict[int, deque[Snapshot]] = OrderedDict()
        self._waiting_bytes = 0
        self._unanswered: dict[Key, int] = {}
        self._unanswered_bytes = 0
        self._newest_sent: dict[int, int] = {}
        self._newest_acknowledged: dict[int, int] = {}
        self._uncertain: set[Key] = set()
        self._credit = 0
        self.replaced = 0
        """Snapshots that were never sent, because a newer one came or the bound was reached."""

    @property
    def waiting_bytes(self) -> int:
        """Packed bytes that wait to be sent."""
        return self._waiting_bytes

    @property
    def unanswered_bytes(self) -> int:
        """Packed bytes that were sent and neither acknowledged nor refused."""
        return self._unanswered_bytes

    @property
    def credit_bytes(self) -> int:
        """What may be unanswered on this stream, unless it is one block alone."""
        return self._credit

    def __len__(self) -> int:
        """Snapshots that wait to be sent."""
        return sum(len(queue) for queue in self._waiting.values())

    def put(self, snapshot: Snapshot) -> list[Snapshot]:
        """Queue a snapshot.

        One is ignored that waits already, or that is not newer than the newest of its block that was sent on
        this stream or that the service acknowledged in this session: the service would refuse it.

        Returns:
            Those that the byte bound drops, possibly this one: nothing newer of their block is under way.

        Raises:
            IndexError: the block is not in the session.
        """
        block = snapshot.block
        if not 0 <= block < len(self._block_bytes):
            raise IndexError(f"block {block} is not in the session's {len(self._block_bytes)} blocks")
        known = max(self._newest_sent.get(block, -1), self._newest_acknowledged.get(block, -1))
        if snapshot.step <= known:
            return []
        queue = self._waiting.get(block)
        if queue is None:
            queue = self._waiting[block] = deque()
        elif queue[-1].step >= snapshot.step:
            return []
        queue.append(snapshot)
        self._waiting_bytes += self._block_bytes[block]
        if len(queue) > self._per_block:
            queue.popleft()
            self._waiting_bytes -= self._block_bytes[block]
            self.replaced += 1
        dropped: list[Snapshot] = []
        while self._max_bytes is not None and self._waiting_bytes > self._max_bytes:
            dropped.append(self._pop())
            self.replaced += 1
        return dropped

    def begin_stream(self, credit_bytes: int, same_session: bool) -> None:
        """A new stream: nothing of it is unanswered. What waits is kept.

        Args:
            credit_bytes: of the service.
            same_session: the service knows what it acknowledged before; what it was sent without an answer
                coming back, it may have or not.
        """
        if same_session:
            self._uncertain.update(self._unanswered)
        else:
            self._newest_acknowledged.clear()
            self._uncertain.clear()
        self._unanswered.clear()
        self._unanswered_bytes = 0
        self._newest_sent.clear()
        self._credit = credit_bytes

    def sendable(self) -> bool:
        """Whether :meth:`take` would give a snapshot: one waits, and credit allows it."""
        if not self._waiting:
            return False
        head = self._block_bytes[next(iter(self._waiting))]
        return not self._unanswered or self._unanswered_bytes + head <= self._credit

    def take(self) -> Snapshot | None:
        """The next snapshot to send, which counts as unanswered from now on; None if there is none."""
        if not self.sendable():
            return None
        snapshot = self._pop()
        size = self._block_bytes[snapshot.block]
        self._unanswered[snapshot.block, snapshot.step] = size
        self._unanswered_bytes += size
        self._newest_sent[snapshot.block] = snapshot.step
        return snapshot

    def forget_waiting(self) -> None:
        """Drop what waits; the trainer offers it again."""
        self._waiting.clear()
        self._waiting_bytes = 0

    def acknowledged(self, block: int, step: int) -> None:
        """A receipt came: its bytes are credit again, and the service has the snapshot."""
        if self._settle(block, step):
            self._newest_acknowledged[block] = max(step, self._newest_acknowledged.get(block, -1))

    def refused(self, block: int, step: int, outdated: bool) -> bool:
        """A refusal on arrival came: its bytes are credit again.

        Args:
            block: of the snapshot.
            step: of the snapshot.
            outdated: the service has one that is not older.

        Returns:
            True if there is no news in it: the snapshot was accepted before in truth, and only its receipt
            was lost with a stream; or it was answered before.
        """
        if outdated and (block, step) in self._uncertain:
            self.acknowledged(block, step)
            return True
        return not self._settle(block, step)

    def _settle(self, block: int, step: int) -> bool:
        self._uncertain.discard((block, step))
        size = self._unanswered.pop((block, step), None)
        if size is None:
            return False  # never sent on this stream, or answered before: gives no credit
        self._unanswered_bytes -= size
        return True

    def _pop(self) -> Snapshot:
        block, queue = next(iter(self._waiting.items()))
        snapshot = queue.popleft()
        self._waiting_bytes -= self._block_bytes[block]
        if queue:
            self._waiting.move_to_end(block)
        else:
            del self._waiting[block]
        return snapshot
