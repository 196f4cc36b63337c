"""A rank as a thread of the test's process: the same code from the first message on, without the seconds of imports."""

import socket
import sys
import threading
from contextlib import suppress

from slipstream.rank import load
from slipstream.scale.company import Member
from slipstream.scale.follower import follow
from slipstream.scale.line import receive_numbers, receive_text, send_text

sys.setswitchinterval(1e-4)  # a thread that has its answer should not wait 5 ms for the interpreter


class ThreadProcess:
    def __init__(self, line):
        self.line, self.killed = line, False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        try:
            follow(load(self.line, receive_text(self.line)), self.messages())
        except (RuntimeError, ValueError) as error:
            with suppress(OSError):
                send_text(self.line, f"{type(error).__name__}: {error}")
        self.line.close()

    def messages(self):
        try:
            while True:
                yield receive_numbers(self.line)
        except (EOFError, OSError):
            return

    def poll(self):
        return None if self.thread.is_alive() else 0

    def kill(self):
        """As far as a thread can be: it may be amid a sum that rank 0 never joins."""
        self.killed = True
        with suppress(OSError):
            self.line.shutdown(socket.SHUT_RDWR)

    def wait(self, timeout=None):
        self.thread.join(0 if self.killed else timeout)
        return -9 if self.killed else 0


def start(command, rank, hello):
    ours, theirs = socket.socketpair()
    process = ThreadProcess(theirs)
    send_text(ours, hello)
    return Member(rank, ours, process)
