"""Commands to a fleet, over a real socket: what comes back, and what comes of a fleet that is not there or hangs."""

import asyncio
import contextlib
import socket
import threading

import pytest

from hstu_trt.contract.errors import ConfigError
from hstu_trt.serving.fleet.control import SOCKET, ask, listen, take_run_folder
from hstu_trt.serving.fleet.fleet import FleetError


async def handle(command, tell):
    match command["do"]:
        case "add":
            tell("starting r3")
            return "r3"
        case "bug":
            raise ZeroDivisionError("by 0")
        case _:
            raise ConfigError("no such command")


@pytest.fixture
def run(tmp_path):
    """The folder of a fleet that does what ``handle`` does."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(listen(tmp_path, handle), loop).result(60)
    yield tmp_path
    loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(60)
    loop.close()


def test_a_command_is_told_of_and_answered(run):
    said = []
    assert ask(run, {"do": "add"}, said.append) == "r3"
    assert said == ["starting r3"]


REFUSED = {"nonsense": ("no such command", ConfigError.exit_code), "bug": ("ZeroDivisionError: by 0", 1)}


@pytest.mark.parametrize("command", REFUSED)
def test_a_refusal_keeps_its_words_and_its_exit_code(run, command):
    text, code = REFUSED[command]
    with pytest.raises(FleetError, match=text) as caught:
        ask(run, {"do": command}, print)
    assert caught.value.exit_code == code
    assert ask(run, {"do": "add"}, lambda text: None) == "r3", "a bug in one command ends nothing else"


@pytest.mark.parametrize("line", [b"\n", b"add\n", b"[1]\n", b"\xff\n"])
def test_what_is_no_command_is_told_so(run, line):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(run / SOCKET))
        connection.sendall(line)
        assert b"a command is a line with a JSON object" in connection.makefile("rb").readline()


def test_nobody_there(tmp_path):
    with pytest.raises(FleetError, match=r"no fleet runs in .*No such file"):
        ask(tmp_path, {"do": "status"}, print)


@contextlib.contextmanager
def listening(folder, answer):
    """A fleet that takes connections and does what ``answer`` does with the first."""
    with socket.socket(socket.AF_UNIX) as fleet:
        fleet.bind(str(folder / SOCKET))
        fleet.listen()
        thread = threading.Thread(target=lambda: answer(fleet.accept()[0]), daemon=True)
        thread.start()
        yield
        thread.join(60)


def test_a_fleet_that_hangs_keeps_nobody_waiting_who_asks_for_its_status(tmp_path):
    asked = threading.Event()
    with listening(tmp_path, lambda connection: asked.wait(60)):
        with pytest.raises(FleetError, match=r"says nothing for 0\.2 s: it hangs"):
            ask(tmp_path, {"do": "status"}, print, timeout_s=0.2)
        asked.set()


def test_a_fleet_that_ends_meanwhile(tmp_path):
    with (
        listening(tmp_path, lambda connection: (connection.recv(1000), connection.close())),
        pytest.raises(FleetError, match="the fleet ended before it answered"),
    ):
        ask(tmp_path, {"do": "add"}, print)


def test_a_run_folder_has_one_fleet(tmp_path):
    lock = take_run_folder(tmp_path / "run")
    with pytest.raises(FleetError, match="a fleet already runs in"):
        take_run_folder(tmp_path / "run")
    lock.close()
    take_run_folder(tmp_path / "run").close()
    with pytest.raises(ConfigError, match="more than 107 characters"):
        take_run_folder(tmp_path / ("x" * 110))
