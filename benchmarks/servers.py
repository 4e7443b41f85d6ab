"""The servers that `vs_llama_cpp.py` sets side by side: Helix in its settings, llama.cpp in its own; started and ended.

Knows nothing about what they are asked.
"""

import asyncio
import contextlib
import os
import platform
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import llama_cpp_peer
import psutil

from helix_gateway.cli.load.level import Limit
from helix_gateway.cli.load.prompts import RequestOptions
from helix_gateway.cli.load.session import Plan, Session
from helix_gateway.cli.openai_client import OpenAIClient
from helix_gateway.runtime.model_source import resolve

START_S = 300
WEIGHTS = {
    "float32": ("--dtype", "float32"),
    "bfloat16": ("--dtype", "bfloat16"),
    "int8, KV int8": ("--quantization", "int8", "--kv-cache-dtype", "int8"),
    "Q4_1, KV float32": ("--quantization", "auto", "--kv-cache-dtype", "float32"),
    "Q4_1, KV int8": ("--quantization", "auto", "--kv-cache-dtype", "int8"),
}
"""Helix's own, by name; the last is what it does where nothing is asked for."""
ON_AVX2 = ("int8, KV int8", "Q4_1, KV int8")
"""Also measured with the instructions that the peer's wheel is compiled for (docs/development.md)."""
AVX2 = {
    "NUMBA_CPU_NAME": "znver3",
    "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+bmi,+bmi2,+popcnt",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}
"""Leaves AVX-512 and VNNI out of what numba compiles, of oneDNN's kernels and of torch's."""


@dataclass(frozen=True)
class Setting:
    """One server as it is started for a round."""

    name: str
    command: tuple[str, ...]
    """What is run; {port} and {parallel} and {context} stand for numbers."""
    environment: dict[str, str] = field(default_factory=dict)
    """Beside this process's own."""
    predicts: bool = False
    """Whether a request's ``prediction`` is of use to it."""


def helix(weights, speculation):
    command = (sys.executable, "-m", "helix_gateway", "serve", "--port", "{port}", "--max-num-seqs", "{parallel}")
    flags = (*WEIGHTS[weights], "--speculation", speculation)
    return Setting(f"helix {weights} {speculation}", command + flags, predicts=speculation != "off")


def on_avx2(setting, folder):
    """The same without AVX-512; what is compiled for it is kept apart from what other starts find and count."""
    environment = {**AVX2, "NUMBA_CACHE_DIR": str(folder.resolve())}
    return Setting(f"{setting.name}, AVX2", setting.command, environment, setting.predicts)


def helix_settings(folder):
    """All of Helix's."""
    modes = ("off", "auto")
    settings = [helix(weights, speculation) for weights in WEIGHTS for speculation in modes]
    if platform.machine().lower() in ("x86_64", "amd64"):
        lesser = [helix(weights, speculation) for weights in ON_AVX2 for speculation in modes]
        settings += [on_avx2(setting, folder / "compiled-for-avx2") for setting in lesser]
    return settings


def llama(kind, file, speculation):
    script = str(Path(llama_cpp_peer.__file__))
    command = (sys.executable, script, str(file), "--port", "{port}", "--parallel", "{parallel}")
    name = f"llama.cpp {kind}" + (" ngram" if speculation == llama_cpp_peer.NGRAM else "")
    return Setting(name, (*command, "--context", "{context}", "--speculation", speculation))


def peer_settings(folder):
    """All of llama.cpp's: the file as shipped, and two more that are made of it in a folder."""
    shipped = resolve(None)
    files = {"Q4_1": shipped} | {kind: llama_cpp_peer.requantised(shipped, kind, folder) for kind in ("Q4_0", "Q8_0")}
    return [llama(kind, path, how) for kind, path in files.items() for how in ("off", llama_cpp_peer.NGRAM)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def server(setting, parallel, context):
    """Start it, wait until it answers, and end it: its base URL, seconds to ready, and its process."""
    port = free_port()
    numbers = {"port": port, "parallel": parallel, "context": context}
    command = [part.format(**numbers) for part in setting.command]
    began_s = time.perf_counter()
    with subprocess.Popen(
        command,
        env=os.environ | setting.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            url = f"http://127.0.0.1:{port}/v1"
            asyncio.run(ready(url, process))
            yield url, time.perf_counter() - began_s, process
        finally:
            process.stdin.close()
            process.terminate()


async def ready(url, process):
    """Until one token was answered."""
    for _ in range(START_S * 10):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        with contextlib.suppress(Exception):
            async with OpenAIClient(url, timeout_s=60) as client:
                options = RequestOptions(model=await client.only_model(None), max_tokens=1)
                await Session(client, Plan(options, [], Limit(requests=1), warm_up=1), iter(())).run()
                return
        await asyncio.sleep(0.1)
    raise RuntimeError(f"the server did not answer within {START_S} s")


def resident_bytes(process):
    """Of a process and all that it has started."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return sum(member.memory_info().rss for member in family)
