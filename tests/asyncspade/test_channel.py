"""What travels between ranks: messages cut anywhere, refused when they do not fit, paced; no wait without end."""

import struct
import time

import pytest
import torch

from slipstream.asyncspade import channel
from slipstream.asyncspade.channel import ChannelLost, Dialing, Pace, TcpChannel
from slipstream.asyncspade.protocol import HEADER, Decoder, Kind, Message, ProtocolError, Sizes, encode, text_tensor

EXACT = {"Hk": 2, "Hq": 4, "D": 8, "K": 5}
MOST = {"seats": 3, "values": 3, "chunk": 4, "window": 2, "packed": 30}
SIZES = Sizes(frozenset(Kind), torch.bfloat16, EXACT, MOST)


def step(n=2, dtype=torch.bfloat16, heads=2, **tags):
    rows = torch.arange(3 * n).view(n, 3)
    q, k = torch.randn(n, 4, 8).to(dtype), torch.randn(n, heads, 8).to(dtype)
    return Message(Kind.STEP, (rows, q, k, k[:0]), 7, 3, 1)._replace(**tags)


def raw(message):
    return bytearray(b"".join(encode(message)))


def decode(data, sizes=SIZES, piece=1 << 20):
    decoder, found = Decoder(sizes), []
    while data:
        room = decoder.wants()
        count = min(len(room), piece, len(data))
        room[:count] = data[:count]
        data = data[count:]
        if (message := decoder.filled(count)) is not None:
            found.append(message)
    return found


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_messages_survive_any_cut(piece):
    sent = [
        step(1),
        Message(Kind.REFUSE, (text_tensor("wörtlich"),)),
        step(3),
        Message(Kind.REFUSE, (text_tensor(""),)),
    ]
    found = decode(b"".join(raw(message) for message in sent), piece=piece)
    assert [m.kind for m in found] == [m.kind for m in sent] and found[1].text == "wörtlich" and found[3].text == ""
    assert found[0][2:5] == (7, 3, 1) and sum(m.num_bytes for m in found) == sum(len(raw(m)) for m in sent)
    for one, other in zip(found, sent, strict=True):
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(one.tensors, other.tensors, strict=True))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data.__setitem__(slice(0, 4), b"HTTP"), "no message of Slipstream"),
        (lambda data: struct.pack_into("<H", data, 4, 9), "version 9"),
        (lambda data: struct.pack_into("<H", data, 6, 99), "kind 99"),
        (lambda data: struct.pack_into("<I", data, 28, 200), "200 tensors"),
        (lambda data: struct.pack_into("<Q", data, 32, 1 << 50), "announces"),
        (lambda data: struct.pack_into("<B", data, HEADER.size, 77), "dtype 77"),
        (lambda data: struct.pack_into("<I", data, HEADER.size + 2, 1 << 31), "at most 3"),
    ],
)
def test_spoiled_bytes_are_refused_before_there_is_room_for_them(change, says):
    data = raw(step())
    change(data)
    with pytest.raises(ProtocolError, match=says):
        decode(bytes(data))


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (step(4), "seats = 4, at most 3"),
        (step(2, torch.float32), "float32"),
        (step(2, heads=3), "Hk = 3"),
        (step()._replace(tensors=(step().tensors[0], *step(1).tensors[1:])), "seats = 1, not 2"),
    ],
)  # fmt: skip
def test_tensors_that_were_not_agreed_on_are_refused(message, says):
    with pytest.raises(ProtocolError, match=says):
        decode(bytes(raw(message)))


def test_a_table_that_was_good_is_checked_anew_for_other_sizes_and_another_length():
    spoiled = raw(step())
    struct.pack_into("<Q", spoiled, 32, 1 << 50)
    for sizes, data, says in (
        (SIZES, spoiled, "announces"),
        (Sizes(SIZES.kinds, SIZES.dtype, EXACT), raw(step()), "at most 0"),
    ):
        decoder = Decoder(SIZES)
        with pytest.raises(ProtocolError, match=says):
            for message in (raw(step()), data):
                while message:
                    room = decoder.wants()
                    room[:] = message[: len(room)]
                    message = message[len(room) :]
                    decoder.filled(len(room))
                decoder.sizes = sizes


def test_only_what_may_come_now_is_read():
    with pytest.raises(ProtocolError, match="STEP message came where only HELLO may"):
        decode(bytes(raw(step())), Sizes(frozenset({Kind.HELLO})))


@pytest.fixture
def line():
    """Two ends of one connection, as ``line(pace)``."""
    made = []

    def make(pace=None):
        listener = channel.listen(("127.0.0.1", 0))
        dialing = Dialing(listener.getsockname())
        theirs, _ = listener.accept()
        listener.close()
        made.extend([TcpChannel(dialing.ready(1.0), SIZES, pace), TcpChannel(theirs, SIZES, pace)])
        return made[-2:]

    yield make
    for end in made:
        end.close()


def test_both_ends_talk_and_count(line):
    near, far = line()
    for i in range(5):
        near.send(step(step=i))
        far.send(step(step=10 + i))
    assert [far.receive(1).step for _ in range(5)] == list(range(5))
    assert [near.receive(1).step for _ in range(5)] == list(range(10, 15))
    assert near.bytes_out == far.bytes_in == 5 * len(raw(step()))


def test_no_wait_is_longer_than_it_may_be(line):
    near, far = line()
    start = time.monotonic()
    assert near.receive(0.0) is None and near.receive(0.1) is None
    big = Sizes(frozenset(Kind), torch.float32, EXACT | {"K": 1 << 20}, MOST)
    near.sizes = far.sizes = big
    sets = Message(
        Kind.SETS, (torch.ones(3, 3).long(), torch.zeros(3, 2, 1 << 20, dtype=torch.int32), torch.ones(3, 2).int())
    )
    with pytest.raises(ChannelLost, match="takes no messages"):  # nobody reads there
        for _ in range(8):
            near.send(sets, 0.2)
    assert time.monotonic() - start < 5
    with pytest.raises(ChannelLost):  # and it stays lost
        near.receive(0.0)


def test_what_came_before_the_end_is_still_received(line):
    near, far = line()
    near.send(step(step=1))
    near.send(step(step=2))
    near.close()
    time.sleep(0.05)
    assert [far.receive(1).step, far.receive(1).step] == [1, 2]
    with pytest.raises(ChannelLost, match="closed"):
        far.receive(1)


def test_a_spoiled_message_ends_the_channel_with_what_was_wrong(line):
    near, far = line()
    near.send(step(heads=2))
    near._sock.send(b"GET / HTTP/1.1\r\n" + b" " * 100)
    assert far.receive(1).kind == Kind.STEP
    with pytest.raises(ProtocolError, match="GET"):
        far.receive(1)


def test_a_paced_link_takes_its_time(line):
    message = step(3)
    size = len(raw(message))
    near, far = line(Pace(bits_per_s=8 * size / 0.05, delay_s=0.03))  # 50 ms each, and 30 ms on the way
    start = time.monotonic()
    for _ in range(3):
        near.send(message)
    times = []
    for _ in range(3):
        assert far.receive(2) is not None
        times.append(time.monotonic() - start)
    assert times == pytest.approx([0.08, 0.13, 0.18], abs=0.03)
    assert far.receive(0.0) is None


@pytest.mark.parametrize("text", ["", "localhost", ":80", "host:", "host:x", "host:70000", "host:-1"])
def test_addresses_that_are_none(text):
    with pytest.raises(ValueError, match="HOST:PORT"):
        channel.parse_address(text)


def test_addresses_and_keys(tmp_path):
    assert channel.parse_address("[::1]:80") == ("::1", 80) and channel.parse_address("a.b:0") == ("a.b", 0)
    assert channel.read_key(None, "127.0.0.2") is None
    with pytest.raises(ValueError, match="reachable from other machines"):
        channel.read_key(None, "0.0.0.0")
    key = tmp_path / "key"
    with pytest.raises(ValueError, match="cannot read the key file"):
        channel.read_key(key, "0.0.0.0")
    key.write_text("short")
    with pytest.raises(ValueError, match="at least 16"):
        channel.read_key(key, "127.0.0.1")


def test_an_address_in_use_and_one_where_nobody_is():
    listener = channel.listen(("127.0.0.1", 0))
    with pytest.raises(ValueError, match="cannot listen on 127.0.0.1"):
        channel.listen(listener.getsockname())
    address = listener.getsockname()
    listener.close()
    with pytest.raises(ChannelLost, match="refused"):
        Dialing(address).ready(1.0)
