"""How long ``helix serve`` of a model that is already there takes until it would serve a request.

Each start is a process of its own, timed from its start to the first 200 of ``/ready``; the first of them may have to
compile, the later ones find the compiled code.
"""

import argparse
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import report


def is_ready(url):
    try:
        with urllib.request.urlopen(url + "/ready", timeout=5) as response:
            return response.status == 200
    except urllib.error.HTTPError:
        return False


def start_once():
    """Seconds until ready, and until a first completion is answered."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "helix_gateway", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        url = re.search(r"http://\S+", next(line for line in server.stdout if "http://" in line))[0]
        while not is_ready(url):
            time.sleep(0.05)
        ready = time.perf_counter() - began
        body = b'{"prompt": "Hello", "max_tokens": 1}'
        request = urllib.request.Request(url + "/v1/completions", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=60).read()
        answered = time.perf_counter() - began
        server.send_signal(signal.SIGTERM)
    return ready, answered


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args()
    first, *later = [start_once() for _ in report.tracked(range(1 + options.repeats), "Starts")]
    ready = statistics.median(seconds for seconds, _ in later)
    answered = statistics.median(seconds for _, seconds in later)
    rows = [["the first start measured", *first], [f"median of {len(later)} later", ready, answered]]
    report.print_table("Start of helix serve", ["", "ready s", "first completion s"], rows)
    results = {"first_s": first, "later_s": later, "ready_median_s": ready, "first_completion_median_s": answered}
    report.save("startup", results, lambda axes: draw(axes, later), folder=options.out)


def draw(axes, later):
    axes.bar(range(len(later)), [ready for ready, _ in later])
    axes.axhline(10, color="grey", linestyle=":", label="goal")
    axes.set_xlabel("start")
    axes.set_ylabel("seconds until ready")
    axes.legend()


if __name__ == "__main__":
    main()
