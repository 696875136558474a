"""Strings pass a type checker, and misspelt ones do not: it reports an ignored error that is none."""

from preconditioner_client import GraftingConfig, Ridge, StalenessConfig, StalePolicy, StatisticsConfig

config = StalenessConfig(policy="graft", adoption="eager")
policy: StalePolicy = config.policy
GraftingConfig(method="adam")
Ridge(kind="trace")
StatisticsConfig(accumulation="sum")
StalenessConfig(policy=StalePolicy.WAIT)
StalenessConfig(policy="gratf")  # type: ignore[arg-type]
