"""Reading ahead: what the page cache holds is told, what it lacks is read, and nothing else is."""

import logging
import os
from pathlib import Path

import pytest

from toyllm.kernels.errors import ToyllmError
from toyllm.models import preload
from toyllm.models.preload import available_memory, read_ahead, resident_share

MIB = 2**20


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.write(b"w" * (12 * MIB + 5))
        file.flush()
        os.fsync(file.fileno())
    return path


def evict(path: Path) -> None:
    """Drop a file from the page cache, or skip the test where the file system does not."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_share(path) != 0.0:
        pytest.skip("this file system does not drop pages, or does not tell")


def test_a_file_just_written_is_resident(weights):
    assert resident_share(weights) in (1.0, None)


def test_an_evicted_file_is_not_and_stays_so_when_asked_again(weights):
    evict(weights)
    share = resident_share(weights)  # `evict` has asked once already
    assert share is not None
    assert share < 0.5


def test_a_file_read_in_part_is_resident_in_part(weights):
    evict(weights)
    with weights.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.read(6 * MIB)
    share = resident_share(weights)
    assert share is not None
    assert 0.4 < share < 0.7


def test_an_empty_file_is_resident(tmp_path):
    (tmp_path / "empty").touch()
    assert resident_share(tmp_path / "empty") in (1.0, None)


def test_a_system_that_cannot_say_is_believed(weights, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "preadv", refuse)
    assert resident_share(weights) is None
    read_ahead([weights], pytest.fail)


def test_cold_files_are_read_to_the_last_byte_and_become_resident(weights, tmp_path):
    warm = tmp_path / "warm"
    warm.write_bytes(b"w" * MIB)
    evict(weights)
    calls = []
    read_ahead([weights, warm], lambda done, total: calls.append((done, total)))
    size = weights.stat().st_size
    assert calls == [(8 * MIB, size), (size, size)]
    assert resident_share(weights) == 1.0


def test_resident_files_are_left_alone(weights):
    read_ahead([weights], pytest.fail)


def test_files_larger_than_memory_are_not_read_and_a_note_says_so(weights, monkeypatch, caplog):
    monkeypatch.setattr(preload, "resident_share", lambda path: 0.0)
    monkeypatch.setattr(preload, "available_memory", lambda: MIB)
    with caplog.at_level(logging.INFO, "toyllm"):
        read_ahead([weights], pytest.fail)
    assert "not read ahead" in caplog.text


def test_an_interrupt_ends_it_between_two_chunks(weights, monkeypatch):
    monkeypatch.setattr(preload, "resident_share", lambda path: 0.0)
    calls = []

    def interrupt(done, total):
        calls.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_ahead([weights], interrupt)
    assert calls == [8 * MIB]


def test_a_file_that_is_gone_is_a_clear_error(tmp_path):
    with pytest.raises(ToyllmError, match="gone: cannot be read"):
        read_ahead([tmp_path / "gone"], pytest.fail)


def test_available_memory_is_a_plausible_figure():
    available = available_memory()
    assert available is None or MIB < available <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
