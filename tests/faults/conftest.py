"""The catalogue's frame: what is run, on what, and what is printed at the end."""

from __future__ import annotations

from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from fault_catalogue import FaultReport
from fault_stage import Stage
from processes import alive, command_line
from service_process import ServiceProcess, wait_for

REPORT = pytest.StashKey[FaultReport]()
ROWS_BEFORE = pytest.StashKey[int]()
LONG = "part of the whole catalogue: make faults"


def pytest_configure(config):
    config.stash[REPORT] = FaultReport()


def pytest_collection_modifyitems(config, items):
    if config.getoption("--whole-catalogue"):
        return
    long = pytest.mark.skip(reason=LONG)
    for item in items:
        if item.get_closest_marker("long_form"):
            item.add_marker(long)


def pytest_runtest_setup(item):
    item.stash[ROWS_BEFORE] = len(item.config.stash[REPORT].records)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What was not injected, and what went wrong beside a row, stands in the table too."""
    report = item.config.stash[REPORT]
    outcome = yield
    if outcome.skipped:
        _, _, why = outcome.longrepr
        if LONG not in why:
            report.not_injected(item.name, why.removeprefix("Skipped: "), failed=False)
    elif outcome.failed and not any(row.violations for row in report.records[item.stash[ROWS_BEFORE] :]):
        why = str(call.excinfo.value).partition("\n")[0][:200]
        report.not_injected(item.name, f"in {call.when}, {call.excinfo.typename}: {why}", failed=True)
    return outcome


def pytest_terminal_summary(terminalreporter, config):
    report = config.stash[REPORT]
    if not report.records:
        return
    terminalreporter.section("fault catalogue")
    # A pipe has no width, and rows folded to 80 columns are hard to read.
    report.print(Console(file=terminalreporter._tw._file, width=160))
    if path := config.getoption("--faults-json"):
        report.write(Path(path))


@pytest.fixture
def fault_report(request) -> FaultReport:
    """Where a test tells what it did; see :mod:`fault_catalogue`."""
    return request.config.stash[REPORT]


@pytest.fixture
def service():
    """A service of the test's own, to be killed at will."""
    with ServiceProcess() as running:
        yield running


@pytest.fixture(scope="session")
def _stage(tmp_path_factory):
    stage = Stage(tmp_path_factory.mktemp("histories"))
    yield stage
    stage.close()


@pytest.fixture
def stage(_stage) -> Stage:
    """A service and a trainer that all tests share; a test may do to them what it likes."""
    _stage.set()
    return _stage


@pytest.fixture(scope="session", autouse=True)
def nobody_left_behind():
    """What was started has ended when all is over, services and Ray's processes among it."""
    # It is the interpreter's own, begins with the first process of multiprocessing and ends with pytest.
    resource_tracker.ensure_running()
    me = psutil.Process()
    before = {process.pid for process in me.children(recursive=True)}
    yield

    def left():
        spared = {*before, forkserver._forkserver._forkserver_pid}  # ends with pytest, too
        return [
            process for process in me.children(recursive=True) if process.pid not in spared and alive(process)
        ]

    try:
        wait_for(lambda: not left(), timeout=30, what="the end of every process that was started")
    except AssertionError as error:
        raise AssertionError(
            f"{error}: {[(process.pid, command_line(process)) for process in left()]}"
        ) from None
