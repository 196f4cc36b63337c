"""Cache ranks as child processes, and a proxy before them that delays, reorders, repeats, spoils and cuts."""

import os
import random
import select
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch

from slipstream import LLM, SamplingParams
from slipstream.asyncspade.protocol import Decoder, Kind, Sizes, encode

SOURCE = Path(__file__).parent.parent.parent / "src"
MODEL = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "eos_token_id": 63,
}
METHOD = {"budget": 24, "recent": 8, "sink": 2, "min_context": 0, "window": 16, "predictor": "analog"}
KEYS = {"scoring": "keys", "aggregate": "sum"}
INDEX = {"blocks": 6, "block": 8, "channels": 8}
CHILD = """
import sys, torch
from slipstream.asyncspade.rank_process import RankConfig, RankProcess
from slipstream.attention.calibration import ModelIdentity
torch.set_num_threads(1)
rank = RankProcess(RankConfig(**eval(sys.argv[1])), lambda line: print(line, file=sys.stderr, flush=True))
print("READY", rank.address, flush=True)
rank.serve()
"""


class Rank:
    """A cache rank of its own process. ``said``: its lines."""

    def __init__(self, address="127.0.0.1:0", **config):
        self.config = config
        self.start(address)

    def start(self, address=None):
        arguments = str({"address": address or self.address, **self.config})
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.said = []
        ready = self.process.stdout.readline().split()
        assert ready[:1] == ["READY"], self.process.stderr.read()
        self.address = ready[1]
        threading.Thread(target=self._listen, args=(self.process.stderr,), daemon=True).start()

    def _listen(self, lines):
        for line in lines:
            self.said.append(line)

    def says(self, word, timeout_s=10):
        """Whether it says so: its lines come through a thread."""
        deadline = time.monotonic() + timeout_s
        while not (found := any(word in line for line in self.said)) and time.monotonic() < deadline:
            time.sleep(0.01)
        return found

    def kill(self):
        self.process.kill()
        self.process.wait(10)


class Anything(Sizes):
    """Sizes that fit every message: for whoever stands between two that check."""

    def check(self, kind, entries):
        pass


class Proxy:
    """Passes messages between an engine and a rank through ``change(towards_rank, message) -> [(delay_s, bytes)]``.

    Messages of one direction keep their order, but for their delays: what is later due is sent later.
    """

    def __init__(self, target, change):
        self._target, self._change = target, change
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open, self.num_connections = True, 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        with suppress(OSError, ValueError):  # the listener is closed
            self._accept()

    def _accept(self):
        while self._open:
            if not select.select([self._listener], [], [], 0.1)[0]:
                continue
            near, _ = self._listener.accept()
            host, port = self._target().rsplit(":", 1)
            try:
                far = socket.create_connection((host, int(port)))
            except OSError:
                near.close()
                continue
            self.num_connections += 1
            self.pair = near, far
            for source, sink, towards in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pass, args=(source, sink, towards), daemon=True).start()

    def _pass(self, source, sink, towards):
        decoder, due = Decoder(Anything(frozenset())), []
        try:
            while True:
                wait = max(0, due[0][0] - time.monotonic()) if due else 5
                if select.select([source], [], [], wait)[0]:
                    count = source.recv_into(decoder.wants())
                    if not count:
                        break
                    message = decoder.filled(count)
                    for delay, raw in self._change(towards, message) if message else ():
                        due.append((time.monotonic() + delay, random.random(), raw))
                    due.sort()
                while due and due[0][0] <= time.monotonic():
                    sink.sendall(due.pop(0)[2])
        except (OSError, ValueError):  # ValueError: select on what is closed
            pass
        self._end(source, sink)

    def _end(self, *socks):
        for sock in socks:
            with suppress(OSError):  # the other direction's thread may have been first
                sock.shutdown(socket.SHUT_RDWR)  # which wakes that thread; to close alone would not
            sock.close()

    def cut(self):
        self._end(*self.pair)

    def close(self):
        self._open = False
        self._listener.close()


def raw(message):
    return b"".join(encode(message))


def by_row(message):
    """A SETS message as one message for each of its requests."""
    if message.kind != Kind.SETS:
        return [message]
    return [
        message._replace(tensors=tuple(x[i : i + 1] for x in message.tensors)) for i in range(len(message.tensors[0]))
    ]


def prompts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 60, (length,), generator=generator).tolist() for length in lengths]


def load(model=MODEL, *, page_size=16, kv_memory="4MiB", max_num_seqs=8, **method):
    """A tiny engine with random weights; ``cache_rank=...`` and other options of AsyncSpade."""
    return LLM(
        model, device="cpu", load_format="dummy", page_size=page_size, kv_memory=kv_memory, max_num_seqs=max_num_seqs,
        max_batch_tokens=100, attention={"method": "asyncspade", **METHOD, **(KEYS | method)},
    )  # fmt: skip


def params(max_tokens=16, **more):
    return SamplingParams(**{"temperature": 0.8, "seed": 3, "max_tokens": max_tokens, "ignore_eos": True} | more)


def tokens(llm, asked, own=None):
    return [[chain.token_ids for chain in output.outputs] for output in llm.generate(asked, own or params())]
