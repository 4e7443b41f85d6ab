"""What the gateway costs: time that it adds to a first token, and chunks that it forwards, with an engine of no model.

Three processes: this one is the clients, the second is the gateway as ``helix serve`` builds it, the third speaks the
engine's wire and answers at once (`fake_engine.py`).  A request's time to its first token is then gateway (HTTP, checks,
template, tokens, the connection to the engine and back, text, JSON) and whatever costs time without one too: two wakings
of a process over a socket, and this process's own queue, where the answer that is looked for may stand behind 15 chunks
of others.  So the same clients then ask an engine that speaks HTTP itself (`direct_engine.py`), at the same pace, with chunks of
the same shape at the same steps.  What the gateway adds is told as the difference of the two distributions at the same
percentile; both are told too.

Chunks a second are told for one core: chunks forwarded by the second of processor time that the gateway's process used.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import report

from helix_gateway.gateway.server import run_event_loop
from helix_gateway.runtime.model_source import resolve

FLOOD_STEP_MS = 0.3
PACED_TOKENS = 32
LONGEST_PAUSE_S = 0.4
GOAL_MS = 2.0
WARM_UP_S = 3.0
"""The first conversation imports what renders templates."""
HERE = Path(__file__).resolve().parent


def run_gateway(model):
    """The second process: the gateway over an engine that computes nothing."""
    from helix_gateway.gateway.addresses import bind
    from helix_gateway.gateway.app import create_app
    from helix_gateway.gateway.server import run
    from helix_gateway.gateway.settings import GatewaySettings
    from helix_gateway.service import launch, process
    from helix_gateway.service.observer import EngineObserver
    from helix_gateway.service.settings import EngineSettings
    from helix_gateway.telemetry.logging import configure_logging
    from helix_gateway.telemetry.metrics import Metrics
    from helix_gateway.telemetry.settings import LogSettings
    from helix_gateway.text.tokenizer import Tokenizer

    configure_logging(LogSettings())
    launch.ENGINE_COMMAND = (sys.executable, str(HERE / "fake_engine.py"))
    settings = EngineSettings(model_path=model)
    metrics = Metrics()
    service = process.ProcessService(settings, Tokenizer.load(model), EngineObserver(metrics, "fake"))
    app = create_app(GatewaySettings(port=0, served_model_names=("fake",)), {"fake": service}, metrics)

    async def stop(_app):
        await service.stop()

    app.on_shutdown.append(stop)
    settings = GatewaySettings(port=0)
    sys.exit(run(app, settings, bind(settings), service.start))


class Server:
    """The process that is asked, and what it has used of the processor."""

    def __init__(self, command, step_ms):
        environment = {**os.environ, "HELIX_FAKE_STEP_MS": str(step_ms)}
        self.process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        line = self.process.stdout.readline()
        assert "listens on" in line, line
        self.port = int(line.rsplit(":", 1)[1].strip().rstrip("/").removesuffix("/v1"))

    def cpu_s(self):
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=30)


class Client(asyncio.Protocol):
    """One connection that asks again and again and does no more than look for the ends of chunks and answers."""

    def __init__(self, dice, max_tokens, longest_pause_s):
        self.dice = dice
        self.max_tokens = max_tokens
        self.longest_pause_s = longest_pause_s
        self.first_byte_ms = []
        self.chunks = 0
        self.stopping = False
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport = transport
        self.ask()

    def connection_lost(self, error):
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the gateway closed the connection"))

    def ask(self):
        words = " ".join(str(self.dice.randrange(10**6)) for _ in range(20))
        body = json.dumps(
            {"messages": [{"role": "user", "content": words}], "stream": True, "max_tokens": self.max_tokens}
        ).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        self.waiting = True
        self.asked_s = time.perf_counter()
        self.transport.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)

    def data_received(self, data):
        if self.waiting and b"data: " in data:
            self.waiting = False
            self.first_byte_ms.append((time.perf_counter() - self.asked_s) * 1e3)
        self.chunks += data.count(b"data: {")
        if data.endswith(b"0\r\n\r\n"):
            if self.stopping:
                self.done.set_result(None)
                self.transport.close()
            else:
                # Answers of one length end together; questions that came together too would wait for each other.
                asyncio.get_running_loop().call_later(self.dice.uniform(0, self.longest_pause_s), self.ask)


async def load(server, options, max_tokens, longest_pause_s):
    """Streams that ask again and again; first-byte times and chunks a second, in all and of the gateway's time."""
    loop = asyncio.get_running_loop()
    dice = random.Random(options.seed)
    clients = []
    for _ in range(options.streams):
        client = Client(dice, max_tokens, longest_pause_s)
        await loop.create_connection(lambda client=client: client, "127.0.0.1", server.port)
        clients.append(client)
        await asyncio.sleep(dice.uniform(0, 0.05))
    await asyncio.sleep(WARM_UP_S)
    for client in clients:
        client.first_byte_ms.clear()
    start_s, start_cpu_s, start_chunks = time.perf_counter(), server.cpu_s(), sum(c.chunks for c in clients)
    await asyncio.sleep(options.seconds)
    elapsed_s, cpu_s = time.perf_counter() - start_s, server.cpu_s() - start_cpu_s
    chunks = sum(client.chunks for client in clients) - start_chunks
    for client in clients:
        client.stopping = True
    await asyncio.gather(*(client.done for client in clients))
    return {
        "first_token_ms": [value for client in clients for value in client.first_byte_ms],
        "chunks_per_s": chunks / elapsed_s,
        "chunks_per_core_s": chunks / cpu_s,
        "cpu_share": cpu_s / elapsed_s,
    }


def measure(command, step_ms, options, max_tokens, longest_pause_s):
    server, measured = Server(command, step_ms), {}

    async def run():
        measured.update(await load(server, options, max_tokens, longest_pause_s))

    try:
        run_event_loop(run())
        return measured
    finally:
        server.close()


def first_tokens_ms(runs):
    return sorted(value for run in runs for value in run["first_token_ms"])


def percentile(values, share):
    return values[min(len(values) - 1, int(share * len(values)))]


def median(runs, key):
    return statistics.median(run[key] for run in runs)


def plot(first, direct):
    def draw(axes):
        for label, values in (("through the gateway", first), ("without it", direct)):
            axes.plot(values, [(place + 1) / len(values) for place in range(len(values))], label=label)
        goal_ms = percentile(direct, 0.99) + GOAL_MS
        axes.axvline(goal_ms, linestyle=":", color="grey")
        axes.axhline(0.99, linestyle=":", color="grey")
        axes.set_xlabel(f"ms to the first token (dotted: 99 %, and {GOAL_MS:.0f} ms above that without a gateway)")
        axes.set_ylabel("share of requests")
        # Of what takes longer still it is enough to see that it is there.
        axes.set_xlim(0, 1.5 * max(goal_ms, percentile(first, 0.99)))
        axes.set_ylim(0, 1.01)
        axes.legend()

    return draw


def first_token_rows(first, direct):
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    through = {name: percentile(first, share) for name, share in shares.items()}
    without = {name: percentile(direct, share) for name, share in shares.items()}
    return [
        *([f"first token, {name} ms", through[name]] for name in shares),
        *([f"without the gateway, {name} ms", without[name]] for name in shares),
        *([f"added by the gateway, {name} ms", through[name] - without[name]] for name in shares),
        ["first tokens measured", len(first)],
        ["of them without the gateway", len(direct)],
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="whose tokenizer and template to use; left out, the default's")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step-ms", type=float, default=25.0, help="a step's time while first tokens are measured")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--run-gateway", metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_gateway:
        run_gateway(options.run_gateway)
    options.model = resolve(options.model)
    gateway = [__file__, "--run-gateway", options.model]
    direct_engine = [str(HERE / "direct_engine.py"), str(PACED_TOKENS)]
    paced, direct, flooded = [], [], []
    for _ in report.tracked(range(options.repeats), "Paced, without the gateway, then flooded"):
        paced.append(measure(gateway, options.step_ms, options, PACED_TOKENS, LONGEST_PAUSE_S))
        direct.append(measure(direct_engine, options.step_ms, options, PACED_TOKENS, LONGEST_PAUSE_S))
        flooded.append(measure(gateway, FLOOD_STEP_MS, options, 512, 0.0))
    first, without = first_tokens_ms(paced), first_tokens_ms(direct)
    rows = [
        *first_token_rows(first, without),
        ["gateway's share of a core at that load", median(paced, "cpu_share")],
        ["chunks/s, flooded", median(flooded, "chunks_per_s")],
        ["chunks/s of one core's time, flooded", median(flooded, "chunks_per_core_s")],
    ]
    report.print_table(f"The gateway alone, {options.streams} streams", ["figure", "value"], rows)
    if not options.no_save:
        used = {name: value for name, value in vars(options).items() if name not in {"model", "run_gateway"}}
        report.save(
            "gateway",
            {"options": used, "figures": dict(rows), "first_token_ms": first, "direct_ms": without},
            plot(first, without),
        )


if __name__ == "__main__":
    main()
