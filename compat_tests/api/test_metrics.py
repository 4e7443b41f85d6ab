"""`/metrics` as a scraper sees it: exact names, no key, quick, whatever state the engine is in."""

import asyncio
import runpy
import time
from pathlib import Path

import pytest
from conftest import chat_body, running
from fake_service import FakeService

from compat_tests.scraping import Scrape

pytestmark = pytest.mark.alone

WIRE_NAMES = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "kv_blocks_referenced", "kv_blocks_cached",
    "kv_blocks_total", "prefix_cache_queries_total", "prefix_cache_hits_total", "prompt_tokens_total",
    "generation_tokens_total", "request_success_total", "num_preemptions_total", "time_to_first_token_seconds",
    "inter_token_latency_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
    "spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total",
    "spec_decode_num_accepted_tokens_per_pos_total",
}  # fmt: skip
OUR_OWN = {
    "engine_state", "engine_restarts_total", "http_requests_total", "gateway_event_loop_lag_seconds",
    "spec_decode_depth", "step_seconds_total",
}  # fmt: skip


async def scrape(gateway, path="/metrics", **options):
    async with gateway.get(path, **options) as response:
        assert response.status == 200
        return Scrape(await response.text())


@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "/v1/metrics"])
async def test_the_names_are_those_of_the_dashboards(gateway, path):
    found = await scrape(gateway, path)
    assert found.names == WIRE_NAMES | OUR_OWN
    assert not [sample.name for sample in found.samples if sample.name.endswith("_created")]


async def test_a_scraper_needs_no_key():
    async with running(api_keys=("secret",)) as gateway:
        await scrape(gateway)


async def test_a_scraper_that_prefers_openmetrics_gets_it(gateway):
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    async with gateway.get("/metrics", headers={"Accept": accept}) as response:
        assert response.content_type == "application/openmetrics-text"
        assert (await response.text()).endswith("# EOF\n")
    async with gateway.get("/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=")


@pytest.mark.parametrize("state", ["starting", "ready", "restarting", "stopped"])
async def test_a_scrape_shows_the_engines_state(gateway, state):
    gateway.service.state = state
    found = await scrape(gateway)
    states = {s.labels["state"]: s.value for s in found.families["helix:engine_state"].samples}
    assert states == {known: float(known == state) for known in ("starting", "ready", "restarting", "stopped")}


async def test_http_requests_are_counted_by_route_and_status(gateway):
    await gateway.answer("/v1/chat/completions", chat_body())
    await gateway.answer("/chat/completions/", chat_body(temperature=3))
    for i in range(3):
        async with gateway.get(f"/v1/nonsense/{i}"):
            pass
    async with gateway.get("/v1/models/tiny"), gateway.session.request("PROPFIND", gateway.url + "/v1/models"):
        pass
    found = await scrape(gateway)

    def count(**labels):
        return found.value("http_requests_total", **labels)

    assert count(method="POST", route="/chat/completions", status="200") == 1
    assert count(method="POST", route="/chat/completions", status="400") == 1
    assert count(route="other", status="404") == 3
    assert count(route="/models/{model_id}", status="200") == 1
    assert count(method="other", status="405") == 1


async def test_a_scrape_among_streams_takes_less_than_50_ms():
    async with running(FakeService("x" * 400, token_s=0.001), models=None) as gateway:
        streams = [asyncio.create_task(gateway.chat(max_tokens=400)) for _ in range(8)]
        await asyncio.sleep(0.05)
        seconds = []
        for _ in range(20):
            began = time.perf_counter()
            await scrape(gateway)
            seconds.append(time.perf_counter() - began)
        await asyncio.gather(*streams)
        assert sorted(seconds)[len(seconds) // 2] < 0.05, seconds


async def test_a_loop_that_is_held_up_shows_in_its_lag(gateway):
    await asyncio.sleep(0.05)
    time.sleep(0.4)  # noqa: ASYNC251 - holding the loop up is the point
    await asyncio.sleep(0.05)
    found = await scrape(gateway)
    assert found.value("gateway_event_loop_lag_seconds_count") >= 1
    assert found.value("gateway_event_loop_lag_seconds_sum") >= 0.1


def test_the_page_about_metrics_says_what_the_code_says():
    folder = Path(__file__).resolve().parents[2]
    writer = runpy.run_path(str(folder / "scripts" / "write_metrics_doc.py"))
    written = (folder / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert written == writer["page"](), "run: python scripts/write_metrics_doc.py"
    for name in WIRE_NAMES | OUR_OWN:
        assert f"| `helix:{name}` |" in written, name
