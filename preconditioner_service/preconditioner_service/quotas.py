"""What a job may have, over all of its sessions. Held against requests before anything is made for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service.sessions import MAX_DEPTH
from preconditioner_service.shares import Share


class QuotaError(Exception):
    """A quota would be exceeded; the text names the value, the limit and the setting."""


@dataclass(frozen=True)
class Usage:
    """What sessions of a job hold.

    Attributes:
        sessions: how many.
        blocks: of their manifests.
        nbytes: their budgets of statistics and preconditioners.
    """

    sessions: int = 0
    blocks: int = 0
    nbytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """Limits of one job; each bears the name of its setting.

    Attributes:
        max_sessions: one per rank.
        max_blocks: of all sessions.
        max_side: length of any side.
        max_job_bytes: what all sessions may make the service hold.
        max_in_flight_seconds: estimated seconds of one worker that may be computed at a time.
        max_refresh_rate: blocks computed a second; a burst may have each block once.
    """

    max_sessions: int
    max_blocks: int
    max_side: int
    max_job_bytes: int
    max_in_flight_seconds: float = math.inf
    max_refresh_rate: float = math.inf

    def check_size(self, manifest: pb.Manifest) -> None:
        """Hold the number of blocks against the quota; cheap, so that it can come before all other checks.

        Raises:
            QuotaError: too many.
        """
        if len(manifest.blocks) > self.max_blocks:
            raise QuotaError(
                f"manifest.blocks: {len(manifest.blocks)} blocks, allowed are {self.max_blocks} (max_blocks)"
            )
        if manifest.snapshots_in_flight > MAX_DEPTH:
            raise QuotaError(
                f"manifest.snapshots_in_flight: {manifest.snapshots_in_flight}, allowed are {MAX_DEPTH}"
            )

    def check_sides(self, manifest: pb.Manifest) -> None:
        """Hold the blocks of a manifest that keeps to the protocol against the largest side.

        Raises:
            QuotaError: one is larger.
        """
        for index, block in enumerate(manifest.blocks):
            longest = max(side.length for side in block.sides)
            if longest > self.max_side:
                raise QuotaError(
                    f"manifest.blocks[{index}] ({block.name!r}): a side of {longest}, allowed are "
                    f"{self.max_side} (max_side); use smaller blocks"
                )

    def check_job(self, job: str, others: Usage, own: Usage) -> None:
        """Hold what a job would have with one more session against its quotas.

        Args:
            job: its name.
            others: of the sessions that will stand beside the one asked for.
            own: of the one asked for.

        Raises:
            QuotaError: one would be exceeded.
        """
        for value, limit, what in (
            (others.sessions + own.sessions, self.max_sessions, "sessions, allowed are {} (max_sessions)"),
            (
                others.blocks + own.blocks,
                self.max_blocks,
                "blocks over all ranks, allowed are {} (max_blocks)",
            ),
            (
                others.nbytes + own.nbytes,
                self.max_job_bytes,
                "bytes of statistics and preconditioners, allowed are {} (max_job_bytes)",
            ),
        ):
            if value > limit:
                raise QuotaError(f"job {job!r} would have {value} " + what.format(limit))

    def govern(self, share: Share, weight: float) -> None:
        """Set what a job may take of the workers from now on."""
        share.weight = weight
        share.max_in_flight_seconds = self.max_in_flight_seconds
        share.max_refresh_rate = self.max_refresh_rate
