"""What a session may ask for. Held against the request before anything is allocated for it."""

from __future__ import annotations

from dataclasses import dataclass

from preconditioner_protos.v1 import preconditioner_pb2 as pb
from preconditioner_service.sessions import MAX_DEPTH, budget_bytes


class QuotaError(Exception):
    """A quota would be exceeded; the text names it, the value and the limit."""


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """Limits of one session.

    Attributes:
        max_blocks: of its manifest.
        max_side: length of any side.
        max_job_bytes: what all ranks of a job may make the service hold.
    """

    max_blocks: int
    max_side: int
    max_job_bytes: int

    def check_size(self, manifest: pb.Manifest) -> None:
        """Hold the number of blocks against the quota; cheap, so that it can come before all other checks.

        Raises:
            QuotaError: too many.
        """
        if len(manifest.blocks) > self.max_blocks:
            raise QuotaError(f"manifest.blocks: {len(manifest.blocks)} blocks, allowed are {self.max_blocks}")
        if manifest.snapshots_in_flight > MAX_DEPTH:
            raise QuotaError(
                f"manifest.snapshots_in_flight: {manifest.snapshots_in_flight}, allowed are {MAX_DEPTH}"
            )

    def check(self, manifest: pb.Manifest, held_by_job: int) -> None:
        """Hold a manifest that keeps to the protocol against all quotas.

        Args:
            manifest: it passed :func:`preconditioner_protos.check_manifest`.
            held_by_job: budgets of the job's other sessions, in bytes.

        Raises:
            QuotaError: one would be exceeded.
        """
        for index, block in enumerate(manifest.blocks):
            longest = max(side.length for side in block.sides)
            if longest > self.max_side:
                raise QuotaError(
                    f"manifest.blocks[{index}] ({block.name!r}): a side of {longest}, allowed are "
                    f"{self.max_side}; use smaller blocks"
                )
        needed = held_by_job + budget_bytes(manifest)
        if needed > self.max_job_bytes:
            raise QuotaError(
                f"the job's statistics and preconditioners may take {needed} bytes, allowed are "
                f"{self.max_job_bytes}"
            )
