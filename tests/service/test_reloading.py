"""Files that change while the service runs."""

from __future__ import annotations

import logging

import pytest

from preconditioner_service import files, logs
from preconditioner_service.files import FileError
from preconditioner_service.reloading import Reloading


@pytest.fixture
def number(tmp_path):
    path = tmp_path / "number"
    path.write_text("1")
    return path


@pytest.fixture
def reloading(number):
    def load() -> int:
        text = files.read(number, "number").decode()
        if not text.isdecimal():
            raise FileError(f"{len(text)} characters are no number")
        return int(text)

    return Reloading("number", [number], load)


@pytest.fixture
def events(caplog, monkeypatch):
    monkeypatch.setattr(logs.LOGGER, "propagate", True)
    caplog.set_level(logging.INFO, logger=logs.LOGGER.name)
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def test_a_change_holds_when_it_was_seen_twice(reloading, number):
    assert not reloading.refresh()
    number.write_text("22")
    assert not reloading.refresh(), "it may still be written"
    assert reloading.refresh()
    assert reloading.value == 22
    assert not reloading.refresh()


def test_at_once_if_asked_to(reloading, number):
    number.write_text("22")
    assert reloading.refresh(at_once=True)
    assert reloading.value == 22


def test_what_grows_is_not_read(reloading, number):
    for text in ("22", "2233", "223344"):
        number.write_text(text)
        assert not reloading.refresh()
    assert reloading.refresh()
    assert reloading.value == 223344


def test_bad_content_changes_nothing_and_is_told_once(reloading, number, events):
    for text in ("bad", "dab"):
        number.write_text(text)
        for _ in range(5):
            assert not reloading.refresh()
    assert reloading.value == 1
    assert events() == [("ERROR", "not reloaded")]
    number.unlink()
    for _ in range(5):
        reloading.refresh()
    assert reloading.value == 1
    assert len(events()) == 2, "another problem"
    number.write_text("3")
    reloading.refresh()
    assert reloading.refresh()
    assert reloading.value == 3


def test_a_link_that_is_swapped_is_a_change(reloading, number, tmp_path):
    """As Kubernetes does."""
    number.unlink()
    for name, text in (("a", "4"), ("b", "5")):
        (tmp_path / name).write_text(text)
        link = tmp_path / "link"
        link.symlink_to(tmp_path / name)
        link.rename(number)
        assert reloading.refresh(at_once=True)
        assert reloading.value == int(text)


def test_the_first_value_must_be_good(number):
    number.chmod(0o666)
    with pytest.raises(FileError, match=r"number .*every user of this machine may change it; chmod o-w"):
        Reloading("number", [number], lambda: files.read(number, "number"))
    with pytest.raises(FileError, match="No such file"):
        files.read(number.with_name("none"), "number")


def test_secrets_that_every_user_may_read_are_told(number, events):
    number.chmod(0o640)
    files.warn_if_exposed(number)
    assert events() == []
    number.chmod(0o644)
    files.warn_if_exposed(number)
    assert events() == [("WARNING", "secret readable by every user of this machine")]


def test_new_files_have_their_mode_whatever_the_umask(tmp_path):
    path = tmp_path / "secret"
    files.write_new(path, b"x", 0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        files.write_new(path, b"y", 0o600)
    assert path.read_bytes() == b"x"


def test_an_unforeseen_error_changes_nothing_and_its_text_is_not_told(number, events):
    def load() -> int:
        return int(number.read_text())

    reloading = Reloading("number", [number], load)
    number.write_text("secret")
    assert not reloading.refresh(at_once=True)
    assert reloading.value == 1
    assert events() == [("ERROR", "not reloaded")]
    number.write_text("22")
    assert reloading.refresh(at_once=True)
