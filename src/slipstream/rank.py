"""``python -m slipstream.rank FD``: one more rank of a tensor-parallel engine; started by rank 0, ends with it."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from slipstream.build import Options, Parts, build
from slipstream.scale.follower import follow
from slipstream.scale.group import Group
from slipstream.scale.line import READY, receive_numbers, receive_text, send_text

_LOST = 3  # exit code when rank 0 is gone


def serve(line: socket.socket, prepare: Callable[[Parts], object] | None = None) -> None:
    """Load this rank's part and follow rank 0, whose first message says what to load. Errors are told to it, too.

    prepare: called with what was built, before the first step.
    """
    hello = receive_text(line)
    inbox = _listen(line, hello["folder"])
    try:
        follow(load(line, hello, prepare), iter(inbox.get, None))
    except Exception as error:
        with suppress(OSError):
            send_text(line, f"{type(error).__name__}: {error}")
        raise


def load(line: socket.socket, hello: dict[str, Any], prepare: Callable[[Parts], object] | None = None) -> Any:
    """This rank's runner."""
    device = torch.device(hello["device"])
    torch.set_num_threads(hello["threads"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = Group(hello["index"], hello["count"], Path(hello["folder"]), device, hello["timeout_s"])
    group.links.meet = lambda: send_text(line, READY)
    parts = build(hello["model"], Options(**hello["options"]), group)
    if prepare is not None:
        prepare(parts)
    return parts.engine.runner


def _listen(line: socket.socket, folder: str) -> queue.SimpleQueue[list[int]]:
    """Gets what rank 0 says. When it is gone this process ends at once, even amid a collective that never will."""
    inbox: queue.SimpleQueue[list[int]] = queue.SimpleQueue()

    def read() -> None:
        try:
            while True:
                inbox.put(receive_numbers(line))
        except (EOFError, OSError):
            shutil.rmtree(folder, ignore_errors=True)  # rank 0 may have had no time for it
            os._exit(_LOST)

    threading.Thread(target=read, name="rank 0", daemon=True).start()
    return inbox


def main(prepare: Callable[[Parts], object] | None = None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides
    serve(socket.socket(fileno=int(sys.argv[-1])), prepare)
    sys.stdout.flush()
    os._exit(0)  # nothing here needs an orderly end, and NCCL's may wait for a rank that is gone


if __name__ == "__main__":
    main()
