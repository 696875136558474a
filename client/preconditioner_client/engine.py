"""What every optimizer here shares: blocks, statistics, exchange and versions; all but the update rule.

An :class:`Engine` is told the parameters group by group, and then, once a step, the gradients. It answers
with which blocks may be preconditioned, and does it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from preconditioner_client.agreement import Described, agree
from preconditioner_client.averaging import Averaging
from preconditioner_client.config import GraftingConfig, StalenessConfig
from preconditioner_client.connect import credit_of, history_of, hold, let_go, make_exchange, newest_epoch
from preconditioner_client.distribution import AUTO, DistributedConfig, Ranks, check_distributed, local
from preconditioner_client.exchange import Exchange, SessionSpec
from preconditioner_client.gradients import (
    Place,
    check_finite,
    check_places,
    check_same_groups,
    judge,
    named,
)
from preconditioner_client.grafting import graft
from preconditioner_client.guard import Guard, SkippedSteps, is_deferred
from preconditioner_client.held_blocks import HeldBlocks
from preconditioner_client.plan import GroupPlan, GroupSettings, LeftAlone, Loads, StackPlan, plan_group
from preconditioner_client.refresh import Refresher
from preconditioner_client.schedule import Mask
from preconditioner_client.service_config import ServiceConfig
from preconditioner_client.sharing import SharedUpdates
from preconditioner_client.transfer import UploadingExchange, upload

MaybeTensors = Sequence[torch.Tensor | None]
"""One entry for each parameter of a group; None for one without a gradient in this step."""


class Engine:
    """Preconditions the gradients of a growing list of parameter groups.

    Args:
        staleness: refresh interval, bound, adoption and policy.
        service: see :func:`preconditioner_client.connect.make_exchange`.
        job: name at the service.
        distributed: see :meth:`preconditioner_client.distribution.Ranks.of`.

    Attributes:
        distributed: as given.
        credit_bytes: what the service may have sent without receipt.
        plans: of the groups, in order.
        parameters: of all groups.
        ranks: how the parameters lie over ranks, once there is a group.
        refresher: freshness of every block of this rank.
        step: number of the latest step, 0 before the first.
        epoch: of the current session.
    """

    def __init__(
        self,
        staleness: StalenessConfig,
        service: str | ServiceConfig | Exchange | None,
        job: str | None,
        distributed: str | DistributedConfig = AUTO,
    ) -> None:
        self.distributed = check_distributed(distributed)
        self.plans: list[GroupPlan] = []
        self.ranks = Ranks()
        self._held = HeldBlocks()
        self.refresher = Refresher(staleness, [], self._held.snapshots, self._held.adopt)
        self.step = 0
        self._raw_exchange, self._job = make_exchange(service, job)
        self.credit_bytes = credit_of(self._raw_exchange)
        # Larger than any before, also where the clock was set back meanwhile.
        self.epoch = max(time.time_ns() // 1000, newest_epoch(self._raw_exchange, self._job) + 1)
        self._history = self.refresher.history = history_of(self._raw_exchange)
        self._step_began: float | None = None
        self._waited_before = 0.0
        self._usable: Mask = np.empty(0, dtype=np.bool_)
        self._exchange = self._raw_exchange
        self._session_due = False
        self._session_opened = False
        self._check_due = False
        self._loads = Loads()
        self.parameters: list[torch.Tensor] = []
        self._devices: list[torch.device] = []
        self._texts: list[tuple[str, Callable[[], str]]] = []
        self._cut: list[tuple[str, torch.Tensor]] = []
        self._places: list[Place] = []
        self._compared: list[torch.Tensor] = []
        self._shared: SharedUpdates | None = None
        # Of the latest step: what replicas that nothing joined would use again.
        self._last_shared: SharedUpdates | None = None
        self._skipped = SkippedSteps()

    def add_group(
        self,
        settings: GroupSettings,
        parameters: Sequence[torch.Tensor],
        names: Sequence[str],
        compared: Sequence[torch.Tensor] | None = None,
        update: Callable[[], str] = str,
    ) -> None:
        """Plan the blocks of another group; they join the session with the next step.

        Under more than one rank all must add the same groups in the same order.

        Args:
            settings: of the group; :class:`LeftAlone` if nothing of it is preconditioned.
            parameters: what is preconditioned.
            names: one for each parameter.
            compared: one for each parameter: what replicas must hold the same bits of; default itself.
            update: what else must be alike on all ranks, since replicas would drift apart; asked for when
                ranks compare it, as a scheduler may change it between now and then.

        Raises:
            ValueError: the parameters lie over ranks in a way that is not supported, or not as the earlier
                groups do; names the first.
        """
        ranks = Ranks.of(self.distributed, parameters, names) if parameters else self.ranks
        if self.parameters and ranks != self.ranks:
            raise ValueError(
                f"{names[0]} lies on other ranks than the groups before: give it to an optimizer of its own"
            )
        plan = plan_group(settings, parameters, names, len(self._held), ranks, self._loads)
        self.ranks = ranks
        self.plans.append(plan)
        self._held.extend(plan)
        self.refresher.extend(plan.snapshot_costs(), self.step, plan.own)
        own = parameters if compared is None else compared
        self._compared.extend(own)
        if not isinstance(settings, LeftAlone):
            self._cut.extend(zip(names, own, strict=True))
            self._places.extend((parameter.shape, parameter.device) for parameter in own)
        for parameter, name in zip(parameters, names, strict=True):
            self.parameters.append(parameter)
            self._devices.append(parameter.device)
            lasting = f"{name} {tuple(parameter.shape)} {parameter.dtype} {settings}"
            self._texts.append((lasting, update))
        self._shared = None
        self._session_due |= bool(plan.blocks)
        self._check_due |= bool(parameters)

    def forget_moved(self, groups: Sequence[Sequence[torch.Tensor]]) -> bool:
        """Drop all plans if they are of other tensors than these, or of the same on another device.

        Only before the first step, when there is nothing to lose: frameworks ask for the state of an
        optimizer, and only then shard its parameters or move them.

        Args:
            groups: for each group that was added its parameters as they are now.

        Returns:
            Whether the groups are to be added again.

        Raises:
            ValueError: steps were made, and the groups have other parameters than then.
        """
        if self.step:
            check_same_groups(groups, self.parameters, [plan.names for plan in self.plans])
            return False
        now = [parameter for of_group in groups for parameter in of_group]
        kept = len(now) == len(self.parameters) and all(
            new is old and new.device == device
            for new, old, device in zip(now, self.parameters, self._devices, strict=True)
        )
        if kept:
            return False
        self._forget()
        return True

    def _forget(self) -> None:
        self.plans = []
        self.parameters = []
        self._devices = []
        self._texts = []
        self._cut = []
        self._places = []
        self._compared = []
        self._held = HeldBlocks()
        self._loads = Loads()
        self._shared = self._last_shared = None
        self._session_due = self._check_due = False
        self.ranks = Ranks()
        self.refresher = Refresher(self.refresher.config, [], self._held.snapshots, self._held.adopt)
        self.refresher.history = self._history

    def examine(
        self, gradients: Sequence[MaybeTensors], found_inf: torch.Tensor | None = None
    ) -> Guard | None:
        """Find NaN and infinity before they reach anything.

        Args:
            gradients: for each group what this rank holds of its parameters' gradients. On an accelerator all
                become zero if one of them is not finite.
            found_inf: not 0 if ``GradScaler`` wants the step to be without effect; for accelerators only.

        Returns:
            The verdict, where the host does not wait for it. None: all are finite.

        Raises:
            ValueError: one is not finite, and the host knows it; see
                :func:`preconditioner_client.gradients.check_finite`. Or a parameter has another shape or
                device than when its blocks were cut.
        """
        check_places(self._cut, self._places)
        present = named(gradients, [plan.names for plan in self.plans])
        devices = {gradient.device for _, gradient in present}
        if len(devices) > 1 or not is_deferred(present[0][1].device):
            check_finite(present, self.ranks.maximum_over_shards)
            return None
        verdict, guard = judge(present, self.ranks.maximum_over_shards, found_inf)
        self._skipped.note(self.step + 1, [name for name, _ in present], verdict)
        return guard

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Stands around all that an optimizer does with the engine in a step, and records how it ends."""
        completed = False
        try:
            yield
            completed = True
        finally:
            # None: it came to an end before it was a step, as with gradients that are not finite.
            if self._history is not None and self._step_began is not None:
                waited = self.refresher.wait_seconds - self._waited_before
                seconds = time.perf_counter() - self._step_began
                self._step_began = None
                used = self._usable if completed else None
                self._history.step_ended(self.step, seconds, waited, used)

    def advance(self, gradients: Sequence[MaybeTensors], guard: Guard | None = None) -> Mask:
        """Begin the next step: accumulate statistics, offer snapshots, adopt what is there.

        Args:
            gradients: for each group what this rank holds of its parameters' gradients.
            guard: as :meth:`examine` returned it.

        Returns:
            For each block of this rank whether its preconditioner may be used in this step.

        Raises:
            ExchangeError: the service refused this trainer for good when it first answered.
            ValueError: on all ranks, when a session begins: they do not train the same, see
                :func:`preconditioner_client.agreement.agree`.
            RuntimeError: on all replicas: only some of them have new groups, or were loaded into.
        """
        if self._session_due or self._check_due:
            self._announce()
        # Not timed: ranks wait here for those that begin later.
        session = self._agreed_session() if self._session_due else None
        if self._check_due:
            # Parameters without blocks need no session, but the same settings everywhere.
            self._agree()
        self.step += 1
        if self._history is not None:
            self._step_began = time.perf_counter()
            self._waited_before = self.refresher.wait_seconds
            self._history.step_begun(self.step)
        if session is not None:
            self._open(session)
        self._accumulate(gradients, guard)
        if (shared := self._sharing()) is not None:
            shared.begin(gradients)
            self._last_shared = shared
        self.refresher.offer(self._exchange, self.step)
        self._usable = self.refresher.settle(self._exchange, self.step)
        return self._usable

    def _announce(self) -> None:
        """Make sure that no replica goes on as before while this one compares itself with all."""
        if self._last_shared is not None:
            joined = [name for plan in self.plans[self._last_shared.groups :] for name in plan.names]
            self._last_shared.announce(f"{joined[0]} is new" if joined else "a state was loaded")
            self._last_shared = None

    def _accumulate(self, gradients: Sequence[MaybeTensors], guard: Guard | None) -> None:
        """Take what this step brings into the statistics of this rank's blocks."""
        for plan, of_group in zip(self.plans, gradients, strict=True):
            if self.step % plan.settings.statistics.every:
                continue
            for entry in plan.stacks:
                rows = entry.rows_with(of_group)
                if rows:
                    entry.stack.accumulate(entry.stack.gather(of_group, rows), rows, guard)

    def precondition(
        self,
        plan: GroupPlan,
        filtered: MaybeTensors,
        updates: MaybeTensors,
        grafting: GraftingConfig,
        usable: Mask,
        averaging: Averaging | None = None,
    ) -> None:
        """Replace the diagonal direction in ``updates`` wherever a block of this rank has a usable version.

        After all groups :meth:`share` brings the other ranks' blocks.

        Args:
            plan: of the group.
            filtered: what is preconditioned, one entry for each parameter of the group.
            updates: the grafted diagonal directions, contiguous; overwritten block by block.
            grafting: whether a block takes the length of what it replaces, and how it is blended in.
            usable: as :meth:`advance` returned it.
            averaging: of preconditioned gradients, if it comes before grafting.
        """
        shared = self._sharing()
        number = next(i for i, known in enumerate(self.plans) if known is plan)
        if shared is not None:
            shared.begin_group(number, updates)
        for entry in plan.stacks:
            mask = usable[entry.first : entry.first + len(entry.stack)]
            present = entry.rows_with(updates)
            if averaging is not None and present:
                averaging.decay_blocks(entry.stack, present)
            rows = tuple(row for row in present if mask[row])
            if shared is None:
                self._precondition(entry, rows, filtered, updates, grafting, averaging)
                continue
            for piece in shared.pieces(entry):
                within = tuple(row for row in rows if piece.rows[0] <= row <= piece.rows[-1])
                self._precondition(entry, within, filtered, updates, grafting, averaging)
                shared.finished(number, piece)
        if shared is not None:
            shared.end_group(number)

    def _precondition(
        self,
        entry: StackPlan,
        rows: tuple[int, ...],
        filtered: MaybeTensors,
        updates: MaybeTensors,
        grafting: GraftingConfig,
        averaging: Averaging | None,
    ) -> None:
        if not rows:
            return
        blocks = entry.stack.precondition(entry.stack.gather(filtered, rows), rows)
        if averaging is not None:
            blocks = averaging.add_blocks(entry.stack, rows, blocks)
        diagonal = entry.stack.gather(updates, rows)
        weights = self._blend(entry, rows, grafting.blend_steps)
        entry.stack.scatter(graft(grafting, blocks, diagonal, weights), updates, rows)

    def share(self, updates: Sequence[MaybeTensors]) -> None:
        """Take every block's finished direction from the replica that owns it.

        Collective among replicas; nothing happens where there is one.

        Args:
            updates: for each group what :meth:`precondition` was given, or left, as ``updates``.

        Raises:
            RuntimeError: replicas had gradients of different parameters, see :class:`SharedUpdates`.
        """
        if (shared := self._sharing()) is not None:
            shared.complete(updates)

    def _sharing(self) -> SharedUpdates | None:
        """What brings the blocks of other replicas; None where there is one."""
        if self._shared is None and self.ranks.replicas > 1:
            self._shared = SharedUpdates(self.plans, self.ranks, self.device)
        return self._shared

    @property
    def device(self) -> torch.device:
        """On which ranks exchange: of the first parameter with blocks, as others may lie elsewhere."""
        first = 0
        for plan in self.plans:
            if plan.blocks:
                return self.parameters[first + plan.blocks[0].member.parameter].device
            first += len(plan.names)
        return self.parameters[0].device

    def metrics(self) -> dict[str, Any]:
        """Counters of freshness and exchange, see ``Shampoo.metrics``."""
        self._skipped.poll()
        return {
            **self._exchange.counters(),
            **self.refresher.metrics(),
            "step": self.step,
            "epoch": self.epoch,
            "age": self.refresher.age(self.step),
            "max_staleness": self.refresher.config.max_staleness,
            "nonfinite_steps": self._skipped.count,
        }

    def resume(self, step: int, saved_epoch: int) -> None:
        """Continue at a step in a new epoch: what an earlier life had under way is not adopted."""
        self.step = step
        self.epoch = max(time.time_ns() // 1000, saved_epoch + 1, self.epoch + 1)
        # The next step opens the session of the new epoch.
        self._session_due = any(plan.blocks for plan in self.plans)
        self._check_due = bool(self.parameters)

    def close(self) -> None:
        """End the exchange. Idempotent."""
        self._exchange.close()
        let_go(self._raw_exchange, self)

    def _agreed_session(self) -> SessionSpec:
        """What the next session is to be, as all ranks agree on it."""
        # The protocol fixes the manifest for an epoch, so added blocks need another one.
        self.epoch += self._session_opened
        self._session_opened = True
        self._agree()
        self._session_due = False
        staleness = self.refresher.config
        session = SessionSpec(
            job=self._job,
            epoch=self.epoch,
            blocks=tuple(spec for plan in self.plans for spec in plan.specs),
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            max_staleness=staleness.max_staleness,
            snapshots_in_flight=staleness.snapshots_in_flight,
            devices=tuple(self._held.devices()),
        )
        if self._history is not None:
            self._history.session(session, staleness, self.refresher.versions, self.step)
        return session

    def _agree(self) -> None:
        """Compare what all ranks must have alike, and take over their epoch and job. Collective."""
        if self.ranks.groups:
            described = [
                Described(f"{lasting} {update()}", local(parameter))
                for (lasting, update), parameter in zip(self._texts, self._compared, strict=True)
            ]
            common = f"{self.refresher.config}, {self.ranks.communication}"
            self.epoch, self._job = agree(
                self.ranks, self.epoch, self._job, self.step, common, described, self.device
            )
        self._check_due = False

    def _open(self, session: SessionSpec) -> None:
        if not session.blocks:
            return
        hold(self._raw_exchange, self)
        if any(device.type == "cuda" for device in session.devices):
            self._exchange = UploadingExchange(self._raw_exchange, session.devices)
        self._exchange.open(session)

    def _blend(self, entry: StackPlan, rows: Sequence[int], steps: int) -> torch.Tensor | None:
        """Weight of the preconditioned direction per row; None if it is 1 for all."""
        if steps == 0:
            return None
        begun = self.refresher.first_adopted[np.asarray(rows) + entry.first]
        weights = np.minimum(1.0, (self.step - begun + 1) / (steps + 1))
        if (weights == 1.0).all():
            return None
        return upload(weights.tolist(), torch.float32, entry.stack.device)
