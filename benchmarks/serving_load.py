"""A development server in a process of its own, and callers who ask it, in turns or all at once."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keras_mrl_serving import Options

MAX_ROWS = Options(timeout_s=300, max_batch_size=64, max_in_flight=1)
BATCHING = """
max_batch_size { value: 64 }
batch_timeout_micros { value: 1000 }
max_enqueued_batches { value: 1000 }
num_batch_threads { value: 2 }
"""

SERVER = """
import sys, time
import tensorflow as tf
from keras_mrl_serving.server import DevServer

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

path, parameters = sys.argv[1:]
batching = {"enable_batching": True, "batching_parameters_file": parameters} if parameters else {}
tf.constant(1.0) + 1.0  # what TensorFlow itself takes is no model's
before, began = resident(), time.perf_counter()
server = DevServer(path, model_name="m", **batching)
target = server.start()
print(target, time.perf_counter() - began, resident() - before, flush=True)
server.wait()
"""


ECHO = """
from concurrent.futures import ThreadPoolExecutor
import grpc

class Echo(grpc.GenericRpcHandler):
    def service(self, call):
        return grpc.unary_unary_rpc_method_handler(lambda request, context: request)

server = grpc.server(ThreadPoolExecutor(64))
server.add_generic_rpc_handlers([Echo()])
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(f"127.0.0.1:{port}", flush=True)
server.wait_for_termination()
"""


@dataclass(frozen=True)
class Server:
    """Where it is, what it serves, what loading and warming up took, and its process."""

    target: str
    version: Path
    load_s: float
    mib: float
    process: int

    @property
    def cpu_s(self) -> float:
        """Seconds of CPU that the server has used, to the hundredth."""
        fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def served(base_path: Path, enable_batching: bool = False) -> Iterator[Server]:
    """Serve the only version under `base_path`."""
    with tempfile.NamedTemporaryFile("w", suffix=".config") as parameters:
        parameters.write(BATCHING)
        parameters.flush()
        file = parameters.name if enable_batching else ""
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(base_path), file],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            words = process.stdout.readline().split() if process.stdout else []
            if len(words) != 3:
                raise RuntimeError(
                    "The server must start. Received: its end. "
                    f"Run keras-mrl serve --model_base_path {base_path} and see what it says."
                )
            (version,) = (p for p in base_path.iterdir() if p.name.isdecimal())
            yield Server(words[0], version, float(words[1]), float(words[2]), process.pid)
        finally:
            process.terminate()
            process.wait()


@contextmanager
def echo() -> Iterator[Callable[[bytes], bytes]]:
    """What Python's gRPC itself takes: a server in a process of its own that answers as asked."""
    import grpc

    process = subprocess.Popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True)
    try:
        target = process.stdout.readline().strip() if process.stdout else ""
        with grpc.insecure_channel(target) as channel:
            call: Any = channel.unary_unary("/echo/Echo")
            yield call
    finally:
        process.terminate()
        process.wait()


@dataclass(frozen=True)
class Times:
    """Seconds of each call, in order."""

    seconds: tuple[float, ...]

    @property
    def ms(self) -> float:
        """Median milliseconds."""
        return 1e3 * statistics.median(self.seconds)

    def ratio_to(self, other: Times) -> float:
        """Median of the ratios of neighbouring calls: other work slows both alike."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(own / its for own, its in pairs)


def in_turns(calls: int, *functions: Callable[[int], object]) -> list[Times]:
    """Call each function in turn, `calls` times after one that does not count."""
    took: list[list[float]] = [[] for _ in functions]
    for turn in range(-1, calls):
        for function, times in zip(functions, took, strict=True):
            began = time.perf_counter()
            function(turn)
            if turn >= 0:
                times.append(time.perf_counter() - began)
    return [Times(tuple(times)) for times in took]


def cpu_share(
    server: Server, laps: int, asked: Callable[[int], object], full: Callable[[int], object]
) -> float:
    """CPU of the server in `asked`, as a share of that in `full`; a lap of each in turns.

    A lap must take many hundredths of a second of CPU, the unit that Linux counts in.
    """
    used = [0.0, 0.0]
    for lap in range(-1, laps):
        for turn, function in enumerate((asked, full)):
            before = server.cpu_s
            function(lap)
            if lap >= 0:
                used[turn] += server.cpu_s - before
    return used[0] / used[1]


def shares(
    server: Server,
    own: Callable[[int], object],
    full: Callable[[int], object],
    laps: int,
    calls: int,
) -> dict[str, float]:
    """Return what `own` takes as a share of `full`: medians over pairs of laps.

    Laps take turns, so that what else the machine does falls on both, and the CPU time of each
    process is read before and after.

    Args:
        server: Whose CPU counts.
        own: A call; it is given its number.
        full: The call that it is compared with.
        laps: Pairs of laps, after one that does not count.
        calls: Calls in a lap.
    """
    ratios: dict[str, list[float]] = {"cpu": [], "wall": [], "cpu_and_client": []}
    for lap in range(-1, laps):
        taken = []
        for function in (own, full):
            before = server.cpu_s, time.process_time(), time.perf_counter()
            for call in range(calls):
                function(call)
            after = server.cpu_s, time.process_time(), time.perf_counter()
            taken.append([end - begin for begin, end in zip(before, after, strict=True)])
        if lap >= 0:
            (own_server, own_client, own_wall), (server_s, client_s, wall_s) = taken
            ratios["cpu"].append(own_server / server_s)
            ratios["cpu_and_client"].append((own_server + own_client) / (server_s + client_s))
            ratios["wall"].append(own_wall / wall_s)
    return {name: round(statistics.median(values), 4) for name, values in ratios.items()}


def per_second(callers: int, calls: int, function: Callable[[int], object]) -> float:
    """Calls a second of so many callers at once, `calls` in all."""
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(function, range(callers)))
        began = time.perf_counter()
        list(pool.map(function, range(calls)))
        return calls / (time.perf_counter() - began)
