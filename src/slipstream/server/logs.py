"""The log: one line per record, and a stream that may fail."""

from __future__ import annotations

import json
import logging
import time


class LogLines(logging.Formatter):
    """One line per record, JSON or ``key=value``; nothing that a client sends can begin a new one."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        facts = {"time": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name}
        facts |= {"message": record.getMessage(), **getattr(record, "facts", {})}
        if record.exc_info:
            facts["traceback"] = self.formatException(record.exc_info)
        if self._as_json:
            return json.dumps(facts, default=str)
        traceback = facts.pop("traceback", None)
        shown = " ".join(f"{key}={json.dumps(value, default=str)}" for key, value in list(facts.items())[4:])
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock} {facts['level']} {json.dumps(facts['message'])[1:-1]} {shown}".rstrip()
        return line if traceback is None else f"{line}\n{traceback}"


class LogHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Lines to a stream that may fail (a full disk, a reader that is gone): no request fails with it, the lines that
    are lost are counted (``slipstream_lost_log_lines``), and the first that can be written again says how many."""

    lost = 0  # of the process, as the root logger's handlers are
    unsaid = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if LogHandler.unsaid:
                line = f"{self.format(_gap(LogHandler.unsaid))}\n{line}"
            self.stream.write(line + self.terminator)
            self.flush()
            LogHandler.unsaid = 0
        except (OSError, ValueError):  # ValueError: the stream is closed
            LogHandler.lost += 1
            LogHandler.unsaid += 1


def _gap(count: int) -> logging.LogRecord:
    name = "slipstream.server"
    return logging.LogRecord(name, logging.WARNING, __file__, 0, "%d log lines were lost", (count,), None)


def log_to_stderr(as_json: bool) -> None:
    """Give the root logger our format, for our lines and the HTTP server's."""
    handler = LogHandler()
    handler.setFormatter(LogLines(as_json))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
