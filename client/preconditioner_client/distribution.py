"""How parameters lie over the ranks of a job: who holds which rows, and who holds the same.

Ranks stand in a grid of shards x replicas. Plain parameters under ``DistributedDataParallel`` are
replicas of one shard; ``fully_shard`` makes every rank a shard of its own, or on a mesh of two dimensions
(HSDP) a replica of a shard. The replicas of a shard divide its blocks among them, and each takes over the
finished updates of the others.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How the work is divided among the ranks of a data-parallel job.

    Attributes:
        process_group: the ranks that hold the same plain parameters, as for ``DistributedDataParallel``.
            None: all. ``DTensor`` parameters bring their own mesh, and this is not looked at.
        communication_dtype: in which replicas send each other their finished updates. ``torch.float32``
            (default) is exact but for float64 parameters. ``torch.bfloat16`` halves the bytes and rounds
            every block's direction, on its owner too, so that replicas stay bit-identical.
        overlap: send finished updates in buckets, each while the blocks of the next are preconditioned,
            instead of all at once at the end. All are there before a weight changes.
        bucket_bytes: with ``overlap``, about what each replica contributes to a bucket, >= 1; a bucket is at
            least one block, and none reaches over a parameter group.
    """

    process_group: dist.ProcessGroup | None = None
    communication_dtype: torch.dtype = torch.float32
    overlap: bool = False
    bucket_bytes: int = 8 * 1024 * 1024

    def __post_init__(self) -> None:
        if self.bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be >= 1, not {self.bucket_bytes}")
        if self.communication_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"communication_dtype must be torch.float32 or torch.bfloat16, not {self.communication_dtype}"
            )


AUTO, OFF = "auto", "off"


def check_distributed(value: str | DistributedConfig) -> str | DistributedConfig:
    """Refuse what is neither a config nor one of the two words.

    Raises:
        ValueError: with what is possible.
    """
    if value not in (AUTO, OFF) and not isinstance(value, DistributedConfig):
        raise ValueError(f'distributed must be "auto", "off" or a DistributedConfig, not {value!r}')
    return value


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where this rank stands in the grid.

    Attributes:
        shard: position among the shards.
        shards: their number.
        replica: position among the replicas of this shard.
        replicas: their number.
        shard_group: one replica of every shard; None if there is one shard.
        replica_group: all replicas of this shard; None if there is one replica.
        grid: global ranks, ``grid[replica][shard]``.
        mesh: of the ``DTensor`` parameters.
        placements: of the ``DTensor`` parameters.
        communication_dtype: see :class:`DistributedConfig`.
        bucket_bytes: see :class:`DistributedConfig`; None without overlap.
    """

    shard: int = 0
    shards: int = 1
    replica: int = 0
    replicas: int = 1
    shard_group: dist.ProcessGroup | None = None
    replica_group: dist.ProcessGroup | None = None
    grid: tuple[tuple[int, ...], ...] = ((0,),)
    mesh: Any = None
    placements: tuple[Any, ...] = ()
    communication_dtype: torch.dtype = torch.float32
    bucket_bytes: int | None = None

    @property
    def rank(self) -> int:
        """Number of this rank in the job's sessions."""
        return self.replica * self.shards + self.shard

    @property
    def world_size(self) -> int:
        """Number of ranks that train these parameters together."""
        return self.shards * self.replicas

    @property
    def communication(self) -> str:
        """How finished updates are shared, which all ranks must have set alike."""
        return f"communication_dtype={self.communication_dtype}, bucket_bytes={self.bucket_bytes}"

    @property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        """Groups that together connect all ranks: a reduction over each in turn is one over all."""
        return tuple(group for group in (self.replica_group, self.shard_group) if group is not None)

    def rows(self, length: int, shard: int) -> tuple[int, int] | None:
        """First and one past the last row of a shard, for a dimension 0 of this length; None: unsharded."""
        if self.mesh is None:
            return None
        # As torch.chunk cuts, and with it DTensor: the last shards may be short or empty.
        size = -(-length // self.shards)
        return min(shard * size, length), min((shard + 1) * size, length)

    def maximum_over_shards(self, tensor: torch.Tensor) -> None:
        """Take the elementwise maximum over all shards, in place. Replicas have the same values anyway."""
        if self.shard_group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.shard_group)

    def norms(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Euclidean norms, 0-D, of the parameters of which this rank holds ``tensors``."""
        norms = list(torch._foreach_norm(tensors))
        if self.shard_group is None:
            return norms
        squares = torch.stack(norms).square()
        dist.all_reduce(squares, group=self.shard_group)
        return list(squares.sqrt().unbind(0))

    @staticmethod
    def of(
        distributed: str | DistributedConfig, parameters: Sequence[torch.Tensor], names: Sequence[str]
    ) -> Ranks:
        """The grid that a group's parameters lie on.

        Args:
            distributed: ``"off"``: this process alone, whatever others do; ``"auto"``: as a default
                :class:`DistributedConfig` if ``torch.distributed`` is in use, else as ``"off"``.
            parameters: of the group.
            names: of the parameters.

        Raises:
            ValueError: parameters of different kinds or meshes, a placement that is not supported, or a
                device that the process group has no backend for; names the parameter and what it has.
        """
        ranks = Ranks._laid(distributed, parameters, names)
        for group in ranks.groups if parameters else ():
            _check_backend(group, parameters[0], names[0])
        return ranks

    @staticmethod
    def _laid(
        distributed: str | DistributedConfig, parameters: Sequence[torch.Tensor], names: Sequence[str]
    ) -> Ranks:
        sharded = [is_dtensor(parameter) for parameter in parameters]
        config = distributed if isinstance(distributed, DistributedConfig) else DistributedConfig()
        if any(sharded):
            return _of_mesh(config, parameters, names)
        if distributed == OFF or not (dist.is_available() and dist.is_initialized()):
            if isinstance(distributed, DistributedConfig):
                raise ValueError(
                    "a DistributedConfig needs torch.distributed.init_process_group() before the first step"
                )
            return Ranks()
        group: Any = config.process_group or dist.group.WORLD
        members = tuple(dist.get_process_group_ranks(group))
        if len(members) == 1:
            return Ranks()
        return Ranks(
            replica=dist.get_rank(group),
            replicas=len(members),
            replica_group=group,
            grid=tuple((member,) for member in members),
            communication_dtype=config.communication_dtype,
            bucket_bytes=config.bucket_bytes if config.overlap else None,
        )


def _check_backend(group: dist.ProcessGroup, parameter: torch.Tensor, name: str) -> None:
    """Refuse parameters that are where their ranks cannot reach each other, as offloaded ones under NCCL."""
    known = sorted({device.type for device in group._device_types})
    # One that is written in Python may not say what it has.
    if known and parameter.device.type not in (*known, "meta"):
        raise ValueError(
            f"{name} is on {parameter.device}, but the process group of its ranks has backends only for "
            f"{', '.join(known)}: begin with torch.distributed.init_process_group('cpu:gloo,cuda:nccl')"
        )


def _of_mesh(config: DistributedConfig, parameters: Sequence[torch.Tensor], names: Sequence[str]) -> Ranks:
    # Some parameter is a DTensor, so torch.distributed.tensor is imported already; it costs a second.
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh: Any = next(p for p in parameters if isinstance(p, DTensor)).device_mesh
    placements: tuple[Any, ...] | None = None
    for parameter, name in zip(parameters, names, strict=True):
        if not isinstance(parameter, DTensor):
            raise ValueError(
                f"{name} is a plain tensor beside DTensor parameters: give it to an optimizer of its own, "
                f"or shard its module too"
            )
        supported = all(
            type(p) is Replicate or (type(p) is Shard and p.dim == 0) for p in parameter.placements
        )
        kinds = [type(p) for p in parameter.placements]
        if not supported or len(set(kinds)) != len(kinds):
            raise ValueError(
                f"{name} has the placements {tuple(parameter.placements)}; supported are Shard(0) "
                f"(fully_shard), Replicate, and Replicate with Shard(0) on a mesh of two dimensions (HSDP)"
            )
        if parameter.device_mesh != mesh or (placements or parameter.placements) != parameter.placements:
            raise ValueError(
                f"{name} lies on {parameter.device_mesh} as {tuple(parameter.placements)}, other parameters "
                f"on {mesh} as {placements}: give each its own optimizer"
            )
        placements = parameter.placements
    assert placements is not None
    shard_dim, replica_dim = _dim_of(placements, Shard), _dim_of(placements, Replicate)
    coordinate = mesh.get_coordinate()
    ranks = mesh.mesh
    if shard_dim is None:
        ranks = ranks.unsqueeze(1)
    elif replica_dim is None:
        ranks = ranks.unsqueeze(0)
    elif shard_dim < replica_dim:
        ranks = ranks.T
    replicas, shards = ranks.shape
    return Ranks(
        shard=0 if shard_dim is None else coordinate[shard_dim],
        shards=shards,
        replica=0 if replica_dim is None else coordinate[replica_dim],
        replicas=replicas,
        shard_group=None if shard_dim is None or shards == 1 else mesh.get_group(shard_dim),
        replica_group=None if replica_dim is None or replicas == 1 else mesh.get_group(replica_dim),
        grid=tuple(tuple(row) for row in ranks.tolist()),
        mesh=mesh,
        placements=tuple(placements),
        communication_dtype=config.communication_dtype,
        bucket_bytes=config.bucket_bytes if config.overlap else None,
    )


def _dim_of(placements: Sequence[Any], kind: type) -> int | None:
    return next((number for number, p in enumerate(placements) if type(p) is kind), None)


def is_dtensor(tensor: object) -> bool:
    """Whether this is a ``DTensor``, without importing what nobody has imported yet."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor; shares its memory. To be called without gradients."""
    if not is_dtensor(tensor):
        return tensor
    sharded: Any = tensor
    held: torch.Tensor = sharded.to_local()
    # A gradient that is still being reduced is waited for.
    return held.wait() if hasattr(held, "wait") else held


def like(parameter: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """A tensor placed as ``parameter`` is, of which this rank holds ``held``; shares its memory."""
    if not is_dtensor(parameter):
        return held
    from torch.distributed.tensor import DTensor

    whole: Any = parameter
    result: torch.Tensor = DTensor.from_local(
        held,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return result


def held_part(parameter: torch.Tensor, whole: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """What this rank holds of a plain tensor of the whole parameter's shape."""
    rows = ranks.rows(whole.shape[0], ranks.shard) if whole.ndim else None
    return whole if rows is None else whole[rows[0] : rows[1]]
