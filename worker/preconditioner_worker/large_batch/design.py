"""What is compared: optimizers, batch sizes, and the learning rates that each pair is given.

A cell is an optimizer at a batch size. All cells see the same number of images, each makes the same number
of runs, and the schedule is the same by fractions of a run.

Learning rates grow from a batch of 64 on: with the batch size for SGD (arXiv 1706.02677); with its square
root for LAMB (arXiv 1904.00962), for Adam, whose direction LAMB has, for Shampoo, whose steps have Adam's
length, and for K-FAC, whose published rates (arXiv 1811.12019) grow from batches of 4K to 128K by the power
0.62. For LARS they do not grow: its steps have the length of the weights whatever the batch, and probes
with the tuning seed were best near one rate at 64 and at 4096 (by the linear rule of arXiv 1708.03888 it
diverges here: biases and gains, which have no trust ratio, are stepped by the whole rate). Every cell tries
three rates, a factor of three apart, around what its rule says; the base rates are by the tunings on digits
that are not shifted, and by those probes. Where the best of them is the least or the greatest, the next one
beyond is tried, until the best lies between two others: where a rule puts its grid decides nothing.

Roots of K-FAC and Shampoo are computed in process and held back exactly one refresh interval of N steps, so
that ages run from N to 2N - 1, as published. N is an eighth of an epoch, at least one step and at most ten:
ten steps at batches up to 128, six at 256, three at 512, one from 1024 on. So even the 30 steps of ten
epochs at 4096 use preconditioners from the second step on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter

from preconditioner_worker.contenders import AnyContender
from preconditioner_worker.schedule import Schedule
from preconditioner_worker.tuning import TUNING_SEED
from preconditioner_worker.workloads.digits_shifted import TRAINING_IMAGES

OptimizerName: TypeAlias = Literal["sgd", "lars", "lamb", "adam", "kfac", "shampoo"]

OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
BATCH_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SEEDS = (0, 2)
"""Of the runs at the best rate; the grid has :data:`TUNING_SEED`."""

REFERENCE_BATCH = 64
FACTORS = (1 / 3, 1.0, 3.0)
"""Of the grid around a scaled rate."""
BEYOND = 3
"""Most rates that are tried beyond the ends of a grid."""
REFRESHES_PER_EPOCH = 8
LONGEST_INTERVAL = 10


class RateRule(NamedTuple):
    """The rate at :data:`REFERENCE_BATCH`, and the power of the batch size with which it grows."""

    base: float
    power: float


RATES: Mapping[OptimizerName, RateRule] = {
    "sgd": RateRule(0.03, 1.0),
    "lars": RateRule(8.0, 0.0),
    "lamb": RateRule(0.02, 0.5),
    "adam": RateRule(0.008, 0.5),
    "kfac": RateRule(0.01, 0.5),
    "shampoo": RateRule(0.008, 0.5),
}


class Record(BaseModel):
    """Part of a file of the study."""

    # Diverged runs hold infinities and NaN; JSON has none, so they travel as strings and come back.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class StudySettings(Record):
    """What all cells have in common.

    Attributes:
        epochs: length of every run.
        channels: of the network's first convolution.
        schedule: of the learning rate.
        tuning_seed: of weights and batches of the runs that choose the rates.
    """

    epochs: PositiveInt = 10
    channels: PositiveInt = 8
    schedule: Schedule = Schedule()
    tuning_seed: Annotated[int, Field(ge=0)] = TUNING_SEED


def epoch_steps(batch_size: int) -> int:
    """Steps of an epoch."""
    return TRAINING_IMAGES // batch_size


def grid(optimizer: OptimizerName, batch_size: int) -> tuple[float, ...]:
    """The learning rates that a cell tries, to three digits."""
    base, power = RATES[optimizer]
    middle = base * (batch_size / REFERENCE_BATCH) ** power
    return tuple(_rounded(factor * middle) for factor in FACTORS)


def beyond(tried: Sequence[float], best: float | None) -> float | None:
    """The rate to try after a grid: beyond the end at which the best lies, to three digits.

    Args:
        tried: all rates so far, at least two.
        best: the best of them; None if all diverged, as those that are too great do.

    Returns:
        None where the best lies between two others, or after :data:`BEYOND` rates outside of the grid.
    """
    if len(tried) >= len(FACTORS) + BEYOND:
        return None
    if best is None or best == min(tried):
        return _rounded(min(tried) * FACTORS[0])
    return _rounded(best * FACTORS[-1]) if best == max(tried) else None


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def interval(batch_size: int) -> int:
    """N: steps between snapshots, and from a snapshot to its use."""
    return min(max(epoch_steps(batch_size) // REFRESHES_PER_EPOCH, 1), LONGEST_INTERVAL)


def contender(optimizer: OptimizerName, batch_size: int, lr: float) -> AnyContender:
    """Hyperparameters of a run."""
    chosen: dict[str, object] = {"name": optimizer, "lr": lr}
    if optimizer in ("kfac", "shampoo"):
        steps = interval(batch_size)
        chosen |= {"refresh_every": steps, "service": f"local:{steps}"}
    adapter: TypeAdapter[AnyContender] = TypeAdapter(AnyContender)
    return adapter.validate_python(chosen)
