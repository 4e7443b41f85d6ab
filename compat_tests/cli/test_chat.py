"""``helix chat`` as a person drives it: in a terminal (a pseudo one), through a pipe, with its own server."""

import json
import os
import re
import signal
import subprocess
import sys
import termios

import pexpect
import psutil
import pytest
from fake_service import ANSWER, FakeService
from rich.console import Console
from server_thread import ServerThread

from helix_gateway.cli.chat.conversation import Conversation, Leave, obey
from helix_gateway.cli.chat.editor import cleaned
from helix_gateway.cli.chat.own_server import OwnServer
from helix_gateway.cli.chat.rendering import MarkdownRenderer, harmless
from helix_gateway.core.errors import HelixError
from helix_gateway.service.tiny_model import write_tiny_model

CTRL_C, ALT_ENTER = "\x03", "\x1b\r"
BRACKETED_PASTE_ON = "\x1b[?2004h"
"""What a terminal is told whenever a line is about to be typed."""


class Terminal:
    """``helix chat`` in a pseudo-terminal."""

    def __init__(self, server, tmp_path, *arguments):
        environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        command = ["-m", "helix_gateway", "chat", "--base-url", server.url, *arguments]
        self.server = server
        self.child = pexpect.spawn(
            sys.executable, command, env=environment, encoding="utf-8", timeout=60, dimensions=(40, 100)
        )
        self.before = termios.tcgetattr(self.child.child_fd)
        self.expect("Ctrl-D leaves")
        self.expect_prompt()

    def expect(self, text):
        self.child.expect_exact(text)

    def expect_prompt(self):
        self.expect(BRACKETED_PASTE_ON)

    def say(self, text):
        self.child.send(text + "\r")

    def expect_end(self):
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus

    def asked(self, place=-1):
        tokens = self.server.service.calls[place].request.prompt_token_ids
        return bytes(token for token in tokens if token < 256).decode()


@pytest.fixture
def terminal(server, tmp_path):
    started = Terminal(server, tmp_path)
    yield started
    started.child.close(force=True)


def pipe(server, text, *arguments):
    command = [sys.executable, "-m", "helix_gateway", "chat", "--base-url", server.url, *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)


def test_a_conversation_streams_tells_its_speed_and_remembers(terminal):
    terminal.server.service.token_s = 0.01
    terminal.say("Hello there")
    terminal.expect(ANSWER)
    terminal.child.expect(r"\d+ tokens, [\d.]+ tokens/s, first after [\d.]+ s")
    terminal.expect_prompt()
    terminal.say("And again")
    terminal.expect(ANSWER)
    terminal.expect("first after")
    terminal.expect_prompt()
    assert terminal.asked() == f"user: Hello there\nassistant: {ANSWER}\nuser: And again\nassistant: "
    terminal.child.sendeof()
    assert terminal.expect_end() == 0


def test_ctrl_c_stops_the_answer_at_the_server_too_and_the_next_question_works(tmp_path):
    with ServerThread(FakeService(token_s=0.1)) as server:
        terminal = Terminal(server, tmp_path)
        terminal.say("Tell me")
        terminal.expect("Gr")
        terminal.child.send(CTRL_C)
        terminal.expect("stopped")
        server.wait_until(lambda service: service.open == 0)
        server.service.token_s = None
        terminal.expect_prompt()
        terminal.say("Go on")
        terminal.expect(ANSWER)
        terminal.expect("first after")
        terminal.expect_prompt()
        assert re.fullmatch(r"user: Tell me\nassistant: Gr.*\nuser: Go on\nassistant: ", terminal.asked())
        terminal.child.sendeof()
        assert terminal.expect_end() == 0


@pytest.mark.parametrize("leave", ["eof", "ctrl-c", "/quit"])
def test_leaving_ends_with_0_and_leaves_the_terminal_as_it_was(terminal, leave):
    if leave == "eof":
        terminal.child.sendeof()
    elif leave == "ctrl-c":
        terminal.child.send(CTRL_C)
    else:
        terminal.say("/quit")
    terminal.child.expect(pexpect.EOF)
    after = termios.tcgetattr(terminal.child.child_fd)
    terminal.child.close()
    assert terminal.child.exitstatus == 0
    assert after == terminal.before


def test_several_lines_are_typed_with_alt_enter_a_backslash_or_quotes(terminal):
    terminal.say(f"one{ALT_ENTER}two")
    terminal.expect("first after")
    assert terminal.asked().startswith("user: one\ntwo\nassistant")
    terminal.say("/clear")
    terminal.expect("forgotten")
    terminal.child.send("three\\\rfour\r")
    terminal.expect("first after")
    assert terminal.asked() == "user: three\nfour\nassistant: "
    terminal.say("/clear")
    terminal.expect("forgotten")
    terminal.child.send('"""five\rsix"""\r')
    terminal.expect("first after")
    assert terminal.asked() == "user: five\nsix\nassistant: "


def test_commands_change_the_next_request(terminal, tmp_path):
    terminal.say("/system Be brief.")
    terminal.expect("system prompt is set")
    terminal.say("/temperature 0.25")
    terminal.expect("0.25")
    terminal.say("/temperature 9")
    terminal.expect("from 0 to 2")
    terminal.say("/nonsense")
    terminal.expect("/help lists")
    terminal.say("Hi")
    terminal.expect("first after")
    assert terminal.asked().startswith("system: Be brief.\nuser: Hi\n")
    assert terminal.server.service.calls[-1].request.sampling.temperature == 0.25
    terminal.say(f"/save {tmp_path / 'talk.json'}")
    terminal.expect("Saved")
    roles = [message["role"] for message in json.loads((tmp_path / "talk.json").read_text())]
    assert roles == ["system", "user", "assistant"]


def test_what_was_typed_before_comes_back_with_the_arrow_key(server, tmp_path):
    for press in ("first question\r", "\x1b[A\r"):
        terminal = Terminal(server, tmp_path)
        terminal.child.send(press)
        terminal.expect("first after")
        terminal.expect_prompt()
        terminal.child.sendeof()
        assert terminal.expect_end() == 0
    assert terminal.asked() == "user: first question\nassistant: "
    history = tmp_path / "helix" / "chat_history"
    assert history.stat().st_mode & 0o077 == 0, "nobody else's to read"


def test_an_error_is_told_and_the_conversation_goes_on(terminal):
    terminal.say("please refuse me")
    terminal.expect("The template does not like it.")
    terminal.expect_prompt()
    terminal.say("Hi")
    terminal.expect(ANSWER)
    assert "refuse" not in terminal.asked()


def test_a_pipe_gets_one_plain_answer(server):
    done = pipe(server, "Hi\n", "--system", "Be brief.", "--temperature", "0", "--max-tokens", "5")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.rstrip("\n") == ANSWER.encode()[:5].decode(errors="ignore")
    assert server.service.calls[-1].request.sampling.max_tokens == 5


@pytest.mark.parametrize("text,said", [("", "empty"), ("refuse me", "does not like it")])
def test_a_pipe_without_an_answer_is_one_line_and_exit_code_1(server, text, said):
    done = pipe(server, text)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_a_key_that_is_wrong_is_said(tmp_path):
    with ServerThread(FakeService(), api_keys=("right",)) as server:
        assert pipe(server, "Hi", "--api-key", "right").returncode == 0
        refused = pipe(server, "Hi", "--api-key", "wrong")
    assert refused.returncode == 1
    assert "401" in refused.stderr


def test_without_a_server_one_is_started_and_ends_with_the_conversation(tmp_path):
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "HELIX_KV_CACHE_MEMORY": "16MiB"}
    environment |= {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    (tmp_path / "tiny").mkdir()
    model = str(write_tiny_model(tmp_path / "tiny"))
    # Greedy: of tokens that are drawn the first may end the answer, which then has no first.
    command = ["-m", "helix_gateway", "chat", model, "--max-tokens", "8", "--temperature", "0"]
    child = pexpect.spawn(sys.executable, command, env=environment, encoding="utf-8", timeout=120)
    child.expect_exact("tiny: Enter sends")
    servers = psutil.Process(child.pid).children(recursive=True)
    assert len(servers) == 2, "a gateway and its engine"
    child.expect_exact(BRACKETED_PASTE_ON)
    child.send("Hi\r")
    child.expect("first after")
    child.kill(signal.SIGKILL)
    _, alive = psutil.wait_procs(servers, timeout=120)
    assert alive == []
    child.close()


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    command = [sys.executable, "-m", "helix_gateway", "chat", str(tmp_path / "missing.gguf")]
    done = subprocess.run(command, input="Hi", capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "missing.gguf" in done.stderr


def test_a_server_that_does_not_start_says_why(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF, but not really")
    command = [sys.executable, "-m", "helix_gateway", "chat", str(broken)]
    done = subprocess.run(command, input="Hi", capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "broken.gguf" in done.stderr.splitlines()[-1]


def test_a_model_cannot_move_the_cursor_or_rename_the_window():
    assert harmless("a\x1b]0;title\x07b\r\x9b2Jc\n\td") == "a]0;titleb2Jc\n\td"


def test_markdown_is_shown_block_by_block_and_a_fence_is_never_cut():
    with open(os.devnull, "w") as nowhere:
        console = Console(file=nowhere, record=True, width=60, force_terminal=True)
        renderer = MarkdownRenderer(console)
        for piece in ("# Head\n", "\nSome *te", "xt*.\n\n``", "`\ncode\n\nmore\n", "```\n\nEnd"):
            renderer.add(piece)
        early = console.export_text(clear=False)
        renderer.end()
    shown = console.export_text()
    assert "Head" in early
    assert "End" not in early
    assert [word for word in ("text", "code", "more", "End") if word in shown] == ["text", "code", "more", "End"]
    assert "```" not in shown
    assert "*" not in shown


@pytest.mark.parametrize("typed,meant", [("  hi ", "hi"), ('"""a\nb"""', "a\nb"), ("", ""), ('"""', "")])
def test_what_was_typed_is_taken_without_its_wrapping(typed, meant):
    assert cleaned(typed) == meant


def test_commands_without_an_argument_tell_what_holds(tmp_path):
    conversation = Conversation()
    assert "no system prompt" in obey(conversation, "/system")
    assert "server chooses" in obey(conversation, "/temperature")
    obey(conversation, "/system Be kind.")
    assert obey(conversation, "/system") == "Be kind."
    conversation.ask("q")
    conversation.close_turn("a")
    obey(conversation, f"/save {tmp_path / 'talk.md'}")
    assert (tmp_path / "talk.md").read_text() == "**system**\n\nBe kind.\n\n**user**\n\nq\n\n**assistant**\n\na\n"
    with pytest.raises(HelixError, match="Name a file"):
        obey(conversation, "/save")
    with pytest.raises(HelixError, match="Cannot write"):
        obey(conversation, f"/save {tmp_path}")
    with pytest.raises(Leave):
        obey(conversation, "/exit")


def test_a_question_without_an_answer_is_forgotten():
    conversation = Conversation()
    conversation.ask("lost")
    conversation.close_turn("")
    assert conversation.messages == []


@pytest.mark.parametrize("asked, passed", [("bfloat16", ["--dtype", "bfloat16"]), (None, [])])
def test_the_server_of_ones_own_computes_in_the_dtype_that_was_asked_for(asked, passed):
    arguments = OwnServer("/models/m", "m", asked)._arguments
    assert [word for word in arguments if word in ("--dtype", "bfloat16")] == passed
