"""Rank 0: it alone has requests and a scheduler, and tells the others what to run before it runs it."""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from slipstream.engine.results import Pending
from slipstream.engine.runner import Runner
from slipstream.engine.scheduler import Plan
from slipstream.overlap import Ticket
from slipstream.scale.company import Company, start
from slipstream.scale.group import START_S, Group
from slipstream.scale.line import Kind
from slipstream.scale.wire import write_plan

_POLL_S, _RELEASE_S = 20e-6, 10.0


class Lead(Group):
    """Starts the other ranks. device: of this rank; each further one has the next GPU.

    hello: what they build their part from, as JSON can carry it. command: what runs one of them (``slipstream.rank``).
    """

    def __init__(
        self, hello: dict[str, Any], count: int, device: torch.device, timeout_s: float, command: Sequence[str]
    ) -> None:
        folder = Path(tempfile.mkdtemp(prefix="slipstream-ranks-"))
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
        super().__init__(0, count, folder, device, timeout_s)
        common = {"count": count, "folder": str(folder), "timeout_s": timeout_s, "threads": torch.get_num_threads()}
        members = []
        for index in range(1, count):
            own = "cpu" if device.type == "cpu" else f"cuda:{device.index + index}"
            members.append(start(command, index, hello | common | {"index": index, "device": own}))
        self.company = Company(members, timeout_s, self.links.abort)
        self.links.meet = self.company.meet
        # Whoever forgets to close an engine, or ends with it, leaves no process and no folder behind.
        self._end = weakref.finalize(self, _end, self.company, folder)
        self._runner: weakref.ref[LeadRunner] | None = None

    def make_runner(self, *args: Any, **options: Any) -> Runner:
        runner = LeadRunner(self.company, *args, **options)
        self._runner = weakref.ref(runner)
        return runner

    def loading(self) -> AbstractContextManager[None]:
        """Around what all ranks do until they can run steps."""
        return self.company.waiting(START_S)

    def close(self) -> None:
        if self._end() is not None:
            runner = None if self._runner is None else self._runner()
            if runner is not None:
                runner.forget_steps()
            self.company.release().join(_RELEASE_S)


def _end(company: Company, folder: Path) -> bool:
    company.close()
    shutil.rmtree(folder, ignore_errors=True)
    return True


class LeadRunner(Runner):
    """Runs what it tells the others to run. Whatever fails in it is :class:`slipstream.scale.company.RankLost`."""

    def __init__(self, company: Company, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._company = company

    def launch(self, plan: Plan) -> Pending:
        with self._company.waiting():
            self._company.tell(Kind.STEP, write_plan(plan))
            pending = super().launch(plan)
        pending.ticket = _Watched(pending.ticket, self._company)
        return pending

    def forget_steps(self) -> None:
        """Captured steps keep the ranks' communicator."""
        self._steps.clear()

    def warmup(self) -> None:
        with self._company.waiting():
            self._company.tell(Kind.WARMUP)
            super().warmup()


class _Watched:
    """A ticket that is given up when a rank is lost: its work may never end."""

    def __init__(self, ticket: Ticket[dict[str, Any]], company: Company) -> None:
        self._ticket, self._company = ticket, company

    def done(self) -> bool:
        return self._ticket.done()

    def wait(self) -> dict[str, Any]:
        return self._ticket.wait()

    def block(self) -> dict[str, Any]:
        with self._company.waiting():
            while not self._ticket.done():
                self._company.check()
                time.sleep(_POLL_S)
            return self._ticket.block()
