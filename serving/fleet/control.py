"""Commands to a running fleet: lines of JSON over a socket in its run folder, which only its owner may enter.

-> {"do": "add"}
<- {"say": "starting r3 on 127.0.0.1:18003"}
<- {"ok": true, "result": "r3"}           or {"ok": false, "error": "...", "code": 1}
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import socket
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from hstu_trt.contract.errors import ConfigError, HstuTrtError
from hstu_trt.serving.fleet.fleet import FleetError, Tell

SOCKET = "control.sock"
LOCK = "lock"
_LONGEST_PATH = 107
_LONGEST_LINE = 1 << 16

Handler = Callable[[dict[str, Any], Tell], Awaitable[Any]]


def take_run_folder(run: Path) -> TextIO:
    """Makes the folder, readable for its owner alone, and holds it until the result is closed. Raises FleetError."""
    run.mkdir(parents=True, exist_ok=True, mode=0o700)
    run.chmod(0o700)
    if len(str(run / SOCKET)) > _LONGEST_PATH:
        raise ConfigError(f"--run {run}: the path of its socket has more than {_LONGEST_PATH} characters")
    lock = (run / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise FleetError(f"a fleet already runs in {run}; see hstu-trt fleet status --run {run}") from None
    return lock


async def listen(run: Path, handle: Handler) -> asyncio.AbstractServer:
    """Answers commands with ``handle``, which raises HstuTrtError for those that it refuses."""
    path = run / SOCKET
    path.unlink(missing_ok=True)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def say(message: dict[str, Any]) -> None:
            with suppress(OSError, RuntimeError):  # who asked may have gone; the command goes on
                writer.write((json.dumps(message) + "\n").encode())

        try:
            say(await _answer(await reader.readline(), handle, lambda text: say({"say": text})))
            await writer.drain()
        except (OSError, ValueError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, path, limit=_LONGEST_LINE)
    path.chmod(0o600)
    return server


async def _answer(line: bytes, handle: Handler, tell: Tell) -> dict[str, Any]:
    try:
        command = json.loads(line)
        if not isinstance(command, dict):
            raise ValueError
    except ValueError:
        return {"ok": False, "error": "a command is a line with a JSON object", "code": ConfigError.exit_code}
    try:
        return {"ok": True, "result": await handle(command, tell)}
    except HstuTrtError as error:
        return {"ok": False, "error": str(error), "code": error.exit_code}
    except Exception as error:  # a bug in one command ends neither the fleet nor the wait of who asked
        return {"ok": False, "error": f"{type(error).__name__}: {error}", "code": FleetError.exit_code}


def ask(run: Path, command: dict[str, Any], tell: Tell, timeout_s: float | None = None) -> Any:
    """Sends a command and waits for its result. Raises FleetError with what the fleet answered.

    timeout_s: longest silence; None: what the fleet does may take as long as it takes.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(run / SOCKET))
        except OSError as error:
            raise FleetError(
                f"no fleet runs in {run} ({error.strerror or error}); hstu-trt fleet --deployment DIR starts one"
            ) from None
        try:
            connection.sendall((json.dumps(command) + "\n").encode())
            return _result(connection.makefile(), tell)
        except TimeoutError:
            raise FleetError(f"the fleet in {run} says nothing for {timeout_s:g} s: it hangs, or was stopped") from None


def _result(lines: Iterable[str], tell: Tell) -> Any:
    for line in lines:
        message = json.loads(line)
        if "say" in message:
            tell(message["say"])
        elif message["ok"]:
            return message["result"]
        else:
            refusal = FleetError(message["error"])
            refusal.exit_code = message["code"]
            raise refusal
    raise FleetError("the fleet ended before it answered")
