"""Hubs that do not answer, refuse, or answer a byte at a time: each is named or cancelled in time, on real sockets."""

import threading
import time

import pytest

from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.stream import hub, hub_patience
from streamblocks.stream.abandoned_work import Abandoned, work_beside
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import REPOSITORY_BLOCKS, Recipe

from fake_hub import fake_hub, no_hub, point_libraries_at, silent_hub, unreachable_hub


class Cancelled(BaseException):
    pass


@pytest.fixture
def use_hub(monkeypatch, tmp_path):
    def use(address):
        point_libraries_at(monkeypatch, address, tmp_path / "cache")

    return use


def after(seconds):
    """A check that raises from then on, and the time at which it first did."""
    end = time.monotonic() + seconds

    def check(*_):
        if time.monotonic() > end:
            raise Cancelled

    return check


def ask(check=hub.never_cancelled):
    return hub.find_repository("owner/model", None, check=check)


def ask_for_files(check=hub.never_cancelled):
    return hub.fetch_files(
        "owner/model", None, lambda name: name.endswith(".json"), most_files=9, most_bytes=99_999, check=check
    )


@pytest.mark.parametrize("call", [ask, ask_for_files])
def test_without_a_network_the_sentence_says_so_at_once(use_hub, call):
    with no_hub() as address:
        use_hub(address)
        begun = time.monotonic()
        with pytest.raises(CheckpointError, match=r"'owner/model' could not be fetched \(no connection to .* network"):
            call()
        # The library itself tries a file again for a minute.
        assert time.monotonic() - begun < 4


def test_what_no_packet_comes_back_from_is_no_network(use_hub, monkeypatch):
    monkeypatch.setattr(hub_patience, "_CONNECTED", 1.0)
    with unreachable_hub() as address:
        use_hub(address)
        with pytest.raises(CheckpointError, match=r"no connection to .* in 1 s, so there is no network"):
            ask()


@pytest.mark.parametrize("call", [ask, ask_for_files])
def test_a_hub_that_never_answers_is_named(use_hub, monkeypatch, call):
    monkeypatch.setattr(hub_patience, "_CONNECTED", 0.6)
    monkeypatch.setattr(hub_patience, "_ANSWERED", 0.8)
    with silent_hub() as address:
        use_hub(address)
        with pytest.raises(CheckpointError, match=r"is connected to and has not answered in 0\.8 s"):
            call()


def load_with_its_own_blocks(check):
    materialise(Recipe("owner/model", blocks=REPOSITORY_BLOCKS), on_load=check)


@pytest.mark.usefixtures("no_pipeline")
@pytest.mark.parametrize("call", [ask, ask_for_files, load_with_its_own_blocks])
def test_a_hub_that_never_answers_is_cancelled(use_hub, call):
    with silent_hub() as address:
        use_hub(address)
        begun = time.monotonic()
        with pytest.raises(Cancelled):
            call(after(0.2))
        assert time.monotonic() - begun < 2


def test_a_download_a_byte_at_a_time_is_cancelled_and_its_connection_closed(use_hub, tmp_path):
    (tmp_path / "model" / "vae").mkdir(parents=True)
    (tmp_path / "model" / "vae" / "config.json").write_text("{}" + " " * 10_000)
    with fake_hub("owner/model", tmp_path / "model", dripping=0.02) as (address, asked):
        use_hub(address)
        repository = ask()
        begun = time.monotonic()
        with pytest.raises(Cancelled):
            repository.fetch(after(0.5))
        assert time.monotonic() - begun < 2
        # Nobody goes on in the dark: neither a transfer nor the lock on the file that the next prompt would wait for.
        while "GONE" not in asked:
            assert time.monotonic() - begun < 5, asked
            time.sleep(0.02)
        with pytest.raises(Cancelled):
            repository.fetch(after(0.5))
        assert asked.count("GET vae/config.json") == 2


def test_a_repositorys_code_a_byte_at_a_time_is_cancelled(use_hub, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "modular_config.json").write_text("{}" + " " * 10_000)
    with fake_hub("owner/model", tmp_path / "model", dripping=0.02) as (address, asked):
        use_hub(address)
        begun = time.monotonic()
        with pytest.raises(Cancelled):
            ask_for_files(after(0.5))
        assert time.monotonic() - begun < 2
        assert "GET modular_config.json" in asked


def test_work_gives_its_result_and_its_error_and_is_ended_when_nobody_waits():
    assert work_beside(lambda: threading.current_thread().name, lambda: None) == "streamblocks abandonable"
    with pytest.raises(ZeroDivisionError):
        work_beside(lambda: 1 / 0, lambda: None)
    ended = threading.Event()

    def endless():
        try:
            while True:
                time.sleep(0.01)
        except Abandoned:
            ended.set()

    with pytest.raises(Cancelled):
        work_beside(endless, after(0))
    assert ended.wait(2)
