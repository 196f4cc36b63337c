"""Lanes: order, exceptions, closing; every lane gives what the inline lane gives (golden equality 4)."""

import threading
import time

import pytest
import torch

from slipstream.overlap import InlineLane, StreamLane, ThreadLane


@pytest.mark.parametrize("make", [InlineLane, ThreadLane])
def test_lane_runs_work_in_order_and_returns_results(make):
    lane, seen = make(), []

    def work(i):
        time.sleep(0.001 * (5 - i))
        seen.append(i)
        return i * i

    tickets = [lane.submit(work, i) for i in range(5)]
    assert [t.wait() for t in tickets] == [0, 1, 4, 9, 16]
    assert seen == list(range(5)) and all(t.done() for t in tickets)
    lane.close()
    with pytest.raises(RuntimeError, match="closed"):
        lane.submit(work, 1)


@pytest.mark.parametrize("make", [InlineLane, ThreadLane])
def test_exception_is_raised_by_every_wait_and_the_lane_lives_on(make):
    lane = make()
    bad = lane.submit(lambda: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            bad.wait()
    assert lane.submit(lambda: 7).wait() == 7
    lane.close()


def test_thread_lane_does_not_block_its_caller():
    lane, gate = ThreadLane(), threading.Event()
    ticket = lane.submit(gate.wait, 5)
    assert not ticket.done()
    gate.set()
    assert ticket.wait() is True
    lane.close()


@pytest.mark.gpu
def test_stream_lane_orders_the_waiting_stream():
    lane = StreamLane()
    x = torch.randn(2048, 2048, device="cuda")
    ticket = lane.submit(lambda: (x @ x) @ x)
    result = ticket.wait()
    assert torch.equal(result, (x @ x) @ x)
    lane.close()
