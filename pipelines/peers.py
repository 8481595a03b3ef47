"""What ends all processes of a run when one of them ends.

A process that waits for another in a collective operation does not learn that the other is gone: gloo and NCCL wait for
their time-out where a machine or the network between two fails, and a process that waits hears no signal. So each has a
connection to process 0 beside theirs, on which nothing is said until one parts. The kernel keeps it alive, so a process
that computes for an hour is not taken for dead; one whose connection breaks ends with one line instead of waiting.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING

from pipelines.errors import UserError

if TYPE_CHECKING:
    from accelerate import PartialState

EXIT_LOST = 1

# Seconds of silence after which the kernel asks, seconds between two questions, answers that may fail to come.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
_GRACE = 15.0  # seconds in which the others may end by themselves when one has ended with an error of its own
_PATIENCE = 60.0  # seconds
_GREETING = struct.Struct("!32sI")

_lines: dict[int, socket.socket] = {}
_watching: threading.Thread | None = None


def watch_peers(state: PartialState) -> None:
    """End this process when one of those it was launched with is lost. All of them call this; once is enough.

    Args:
        state: of processes that have joined.

    Raises:
        UserError: if process 0 cannot be reached.
    """
    global _watching
    if _watching is not None or state.num_processes == 1:
        return
    _connect(state)
    _watching = threading.Thread(target=_watch, args=(state.process_index, state.num_processes), daemon=True)
    _watching.start()


def part(code: int) -> None:
    """Tell the others that this process ends by itself with an exit code; they follow where it is not 0."""
    for line in list(_lines.values()):
        with contextlib.suppress(OSError):
            line.sendall(bytes([code]))


def await_the_end(error: Exception) -> None:
    """Where a collective operation failed, wait a little: the others' end ends this process too, with a line.

    Args:
        error: what ended the work. Errors of other kinds return at once.
    """
    torch = sys.modules.get("torch")
    if _watching is None or torch is None:
        return
    if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        _watching.join(_PATIENCE)


def _connect(state: PartialState) -> None:
    from accelerate.utils import broadcast_object_list

    first, world = os.environ.get("MASTER_ADDR", "127.0.0.1"), state.num_processes
    if state.is_main_process:
        several_machines = int(os.environ.get("LOCAL_WORLD_SIZE", world)) < world
        server = socket.create_server(("" if several_machines else "127.0.0.1", 0), backlog=world)
        server.settimeout(_PATIENCE)
        token = secrets.token_bytes(32)
        broadcast_object_list([server.getsockname()[1], token])
        with server:
            try:
                while len(_lines) < world - 1:
                    line, _ = server.accept()
                    line.settimeout(_PATIENCE)
                    given, rank = _GREETING.unpack(_exactly(line, _GREETING.size))
                    if secrets.compare_digest(given, token):
                        _lines[rank] = line
                    else:
                        line.close()
            except OSError as error:
                mend = "let the machines reach one another on all ports"
                raise UserError("MASTER_ADDR", first, f"not all processes reached it ({error})", mend) from error
    else:
        box: list = [None, None]
        broadcast_object_list(box)
        port, token = box
        host = first if int(os.environ.get("LOCAL_WORLD_SIZE", world)) < world else "127.0.0.1"
        try:
            _lines[0] = socket.create_connection((host, port), timeout=_PATIENCE)
            _lines[0].sendall(_GREETING.pack(token, state.process_index))
        except OSError as error:
            problem = f"port {port} of the first machine cannot be reached ({error.strerror or error})"
            raise UserError("MASTER_ADDR", first, problem, "let the machines reach one another on all ports") from error
    for line in _lines.values():
        line.settimeout(None)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _exactly(line: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = line.recv(size - len(found))
        if not more:
            raise ConnectionResetError("closed while greeting")
        found += more
    return found


def _watch(rank: int, world: int) -> None:
    with selectors.DefaultSelector() as selector:
        for peer, line in _lines.items():
            selector.register(line, selectors.EVENT_READ, peer)
        while selector.get_map():
            for key, _ in selector.select():
                try:
                    said, why = key.fileobj.recv(1), "it ended without a word"
                except OSError as error:
                    said, why = b"", error.strerror or str(error)
                if not said:
                    _end(rank, world, key.data, why)
                selector.unregister(key.fileobj)
                if said[0]:
                    part(said[0])  # process 0 tells the others
                    time.sleep(_GRACE)
                    os._exit(said[0])


def _end(rank: int, world: int, peer: int, why: str) -> None:
    mend = "see what it said; given again on every machine, the same command goes on from the last checkpoint"
    error = UserError("process", f"{peer} of {world}", f"process {rank} lost the connection to it ({why})", mend)
    print(f"\nerror: {error}", file=sys.stderr, flush=True)  # a progress bar's line may stand open
    part(EXIT_LOST)  # whoever can still be reached
    sys.stdout.flush()
    os._exit(EXIT_LOST)
