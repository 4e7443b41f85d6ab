"""`/docs` in a real Chromium: every route is there to read and to try, by mouse and by keyboard, at any width."""

import asyncio
import json
import re
import urllib.request

import pytest
from fake_service import ANSWER, FakeService

from compat_tests.browser.conftest import gateway
from compat_tests.serving import start_server, stop_server

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONTRAST = """(selector) => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const element = document.querySelector(selector);
  let behind = element;
  const clear = (node) => getComputedStyle(node).backgroundColor === "rgba(0, 0, 0, 0)";
  while (clear(behind) && behind.parentElement) behind = behind.parentElement;
  const pair = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(luminance);
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}"""


def document_of(url):
    with urllib.request.urlopen(url + "/openapi.json") as response:
        return json.load(response)


async def text_of(page, selector):
    return re.sub(r"\s+", " ", await page.locator(selector).inner_text())


async def test_every_route_is_shown_with_its_fields_bounds_answers_and_streams(open_page, served):
    document = await asyncio.to_thread(document_of, served)
    async with open_page(served) as watched:
        page = watched.page
        for path, methods in document["paths"].items():
            for operation in methods.values():
                shown = await text_of(page, f"section#{operation['operationId']}")
                assert path in shown
                assert operation["summary"] in shown
                for status in operation["responses"]:
                    assert status in shown, (path, status)
                assert await page.locator(f"nav a[href='#{operation['operationId']}']").count() == 1
        chat = await text_of(page, "#create_chat_completion")
        assert "temperature number · 0 to 2 · default 1" in chat
        assert "top_p number · over 0 to 1" in chat
        assert "stop string or array of string" in chat
        assert "messages required array of ChatMessage" in chat
        assert "text/event-stream each event: ChatCompletionChunk" in chat
        assert "undefined" not in await text_of(page, "body")


async def test_what_is_tried_streams_into_the_page_and_can_be_stopped(open_page):
    async with gateway(FakeService("x" * 200, token_s=0.03)) as (url, service), open_page(url) as watched:
        box = watched.page.locator("#generate_stream .try")
        await box.get_by_role("button", name="Send").click()
        answer = box.locator(".answer")
        await answer.wait_for()
        early = len(await answer.inner_text())
        await asyncio.sleep(0.2)
        assert 0 < early < len(await answer.inner_text()) < 60
        assert service.open == 1
        await box.get_by_role("button", name="Stop").click()
        await box.get_by_text("Stopped.").wait_for()
        for _ in range(100):
            if not service.open:
                break
            await asyncio.sleep(0.02)
        assert service.open == 0
        assert await box.get_by_role("button", name="Send").is_enabled()


async def test_an_answer_that_comes_whole_is_shown_with_its_seed(open_page, served):
    async with open_page(served) as watched:
        box = watched.page.locator("#create_chat_completion .try")
        await box.get_by_role("button", name="Send").click()
        await box.get_by_text("x-helix-seed").wait_for()
        assert await box.locator(".answer").inner_text() == ANSWER
        assert '"object": "chat.completion"' in await box.locator("pre").nth(1).inner_text()


async def test_the_key_is_sent_where_one_is_set_and_a_refusal_is_shown(open_page):
    async with gateway(api_keys=("secret",)) as (url, _), open_page(url) as watched:
        box = watched.page.locator("#list_models .try")
        await box.get_by_role("button", name="Send").click()
        await box.get_by_text("A key is needed").first.wait_for()
        assert len(watched.complaints) == 1
        assert "401" in watched.complaints.pop()
        await watched.page.get_by_label("Key").fill("secret")
        await box.get_by_role("button", name="Send").click()
        await box.get_by_text('"tiny"').first.wait_for()


async def test_the_page_is_worked_with_the_keyboard_alone(open_page, served):
    async with open_page(served) as watched:
        page = watched.page
        await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.className") == "skip"
        await page.keyboard.press("Enter")
        await page.locator("#create_completion-body").focus()
        await page.keyboard.press("Control+Enter")
        await page.locator("#create_completion .answer").wait_for()
        unnamed = await page.evaluate(
            "[...document.querySelectorAll('input, select, textarea, button')].filter((each) => "
            "!(each.getAttribute('aria-label') || each.labels?.length || each.textContent.trim())).length"
        )
        assert unnamed == 0


async def test_snippets_say_what_is_in_the_body_and_python_is_python(open_page, served):
    async with open_page(served) as watched:
        box = watched.page.locator("#create_chat_completion .try")
        body = {"messages": [{"role": "user", "content": "it's"}], "stream": True, "seed": None, "top_k": 5}
        await box.locator("textarea").fill(json.dumps(body))
        code = box.locator("pre").last
        assert "it'\\''s" in await code.inner_text()
        assert f"curl {served}/v1/chat/completions" in await code.inner_text()
        await box.get_by_role("tab", name="Python").click()
        program = await code.inner_text()
        compile(program, "snippet", "exec")
        assert "stream=True" in program
        assert 'extra_body={"top_k": 5}' in program
        await box.locator("textarea").fill("{")
        assert "not valid JSON" in await code.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_text_is_readable_in_light_and_in_dark(open_page, served, scheme):
    async with open_page(served, color_scheme=scheme) as watched:
        backs = {}
        for selector in ("main p", ".bounds", ".type", ".method.post", ".required", ".fault", "button.send", "nav h2"):
            backs[selector] = await watched.page.evaluate(CONTRAST, selector)
        assert min(backs.values()) >= 4.5, backs
        background = "getComputedStyle(document.body).backgroundColor"
        before = await watched.page.evaluate(background)
        await watched.page.get_by_role("button", name="Switch between light and dark").click()
        assert await watched.page.evaluate(background) != before


@pytest.mark.parametrize("width", [390, 820, 1440])
async def test_nothing_runs_out_of_the_page_at_any_width(open_page, served, width):
    async with open_page(served, viewport={"width": width, "height": 844}) as watched:
        page = watched.page
        await page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
        await page.locator("#create_chat_completion").get_by_role("button", name="Send").click()
        await page.locator("#create_chat_completion .answer").wait_for()
        assert await page.evaluate("document.documentElement.scrollWidth") <= width


async def test_a_model_named_like_a_script_stays_text(open_page):
    name = "<img src=x onerror=alert(1)>"
    async with gateway(served_model_names=(name,)) as (url, _), open_page(url) as watched:
        assert name in await watched.page.locator("#generate textarea").input_value()
        assert await watched.page.locator("main img").count() == 0


async def test_a_real_model_streams_into_the_page(open_page, smollm2_path):
    server = await asyncio.to_thread(start_server, smollm2_path, "--kv-cache-memory", "256MiB")
    try:
        async with open_page(server.url) as watched:
            box = watched.page.locator("#create_chat_completion .try")
            await box.get_by_label("Example").select_option(label="As a stream")
            await box.get_by_role("button", name="Send").click()
            await box.get_by_role("button", name="Stop", disabled=True).wait_for()
            assert len(await box.locator(".answer").inner_text()) > 20
            assert "first text after" in await box.locator(".figures").last.inner_text()
            assert "[DONE]" in await box.locator("details pre").text_content()
    finally:
        await asyncio.to_thread(stop_server, server)
