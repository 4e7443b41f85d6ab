"""Requests made from our own `/openapi.json`: good ones and broken ones are answered as it says, and never with a 5xx."""

import asyncio
import threading

import pytest
import schemathesis
from conftest import running
from fake_service import FakeService
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from helix_gateway.gateway.app import ROUTES
from helix_gateway.gateway.openapi import describe

SHARE = 2
"""Every so many-th of the usual number of examples: an example costs more here than elsewhere."""
SCHEMA = schemathesis.openapi.from_dict(describe(ROUTES, "tiny"))
OPERATIONS = {f"{route.method} {route.told_path}": (route.told_path, route.method) for route in ROUTES}
POSTS = [label for label in OPERATIONS if label.startswith("POST")]
GETS = [label for label in OPERATIONS if label.startswith("GET")]


@pytest.fixture(scope="module")
def url():
    """A gateway in a thread of its own, since requests are made by a library that waits for each."""
    started, ended = threading.Event(), asyncio.Event()
    where = []

    async def serve():
        async with running(FakeService("ok")) as gateway:
            where.extend((gateway.url, asyncio.get_running_loop()))
            started.set()
            await ended.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(10)
    yield where[0]
    where[1].call_soon_threadsafe(ended.set)
    thread.join(10)


UNSPOKEN = (
    "must be a token id from 0 to",
    "must be named by a token id from 0 to",
    "maximum context length",
    "must be at least `n`",
    "cannot be streamed",
    "needs `logprobs`",
    "must be at most `max_tokens`",
    "(0 is for `echo`)",
    "lacks the field",
    "as the first prompt is",
    "fit into one request",
)
"""Reasons for a refusal that a JSON schema has no words for, or that only the model knows."""


def search(url, label, mode, share=SHARE):
    path, method = OPERATIONS[label]

    @settings(max_examples=max(1, settings().max_examples // share), suppress_health_check=list(HealthCheck))
    @given(SCHEMA[path][method].as_strategy(generation_mode=mode))
    def ask(case):
        response = case.call_and_validate(base_url=url, excluded_checks=[positive_data_acceptance])
        if response.status_code >= 400:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            if mode is GenerationMode.POSITIVE:
                assert response.status_code == 404 or any(reason in error["message"] for reason in UNSPOKEN), error

    ask()


@pytest.mark.parametrize("label", POSTS)
def test_requests_as_described_are_answered_as_described(url, label):
    search(url, label, GenerationMode.POSITIVE)


@pytest.mark.parametrize("label", POSTS)
def test_requests_that_break_the_description_are_refused(url, label):
    search(url, label, GenerationMode.NEGATIVE)


@pytest.mark.parametrize("label", GETS)
def test_what_is_asked_without_a_body_is_answered_as_described(url, label):
    search(url, label, GenerationMode.POSITIVE, SHARE * 10)
