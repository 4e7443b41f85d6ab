"""The model's own weights at fewer bits draft for it, as settings name that: no answer changes, or it is refused in one line."""

import subprocess
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import filelock
import pytest

from helix_gateway import HelixEngine
from helix_gateway.core.errors import ModelLoadError, OutOfMemoryError
from helix_gateway.engine.block_pool import NoFreeBlocksError
from helix_gateway.runtime import fewer_bits
from helix_gateway.runtime.cpu.compiled import is_compiled
from helix_gateway.runtime.cpu.parts import Parts
from helix_gateway.service import host as host_module
from helix_gateway.service import self_drafting, speculation
from helix_gateway.service.host import EngineHost
from helix_gateway.service.settings import EngineSettings
from helix_gateway.service.tiny_model import write_tiny_model

PROMPTS = ["once upon a time there was", "a b a b a b", "one"]
OPTIONS = {"max_tokens": 20, "ignore_eos": True, "seed": 3}
STORED = [("float32", "auto"), ("bfloat16", "auto"), ("float32", "int8"), ("float32", "bfloat16")]
"""Weights, and keys and values."""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("target")))


@pytest.fixture(autouse=True)
def nobody_compiles_ahead(monkeypatch):
    """A test's own process compiles what it needs."""
    monkeypatch.setattr(self_drafting, "is_compiled", lambda what: True)


def answers(engine, prompts=PROMPTS, **options):
    results = engine.generate(prompts, temperature=0.0, **{**OPTIONS, **options})
    results += engine.generate(prompts, temperature=1.0, presence_penalty=0.5, **{**OPTIONS, **options})
    results += [engine.generate(prompts[0], temperature=0.8, top_p=0.9, **{**OPTIONS, **options})]
    tokens = [result.token_ids for result in results]
    return tokens, sum(r.metrics.draft_tokens for r in results), sum(r.metrics.accepted_tokens for r in results)


def opened(path, dtype="float32", **settings):
    return HelixEngine(path, kv_cache_memory_bytes=4 << 20, dtype=dtype, **settings)


@pytest.mark.parametrize("dtype, stored", STORED)
def test_no_answer_changes(path, dtype, stored):
    with opened(path, dtype, speculation="off", kv_cache_dtype=stored) as engine:
        plain, *_ = answers(engine)
    with opened(path, dtype, speculation="self", kv_cache_dtype=stored, min_depth=3, max_depth=6) as engine:
        tokens, drafted, accepted = answers(engine)
        assert set(engine._service.host.engine.stats().drafts) == {"self"}
        engine._service.host.engine.check()
    assert tokens == plain
    assert drafted > 60
    # A random model's best tokens are near ties, and yet rounding leaves most of them.
    assert accepted > 0.3 * drafted


def test_the_real_model_drafts_by_its_files_own_blocks_and_is_mostly_right(smollm2_path):
    prompts = ["The capital of France is", "def reverse(text):"]
    settings = {"kv_cache_memory_bytes": 64 << 20, "dtype": "float32"}
    with HelixEngine(smollm2_path, speculation="off", **settings) as engine:
        plain, *_ = answers(engine, prompts)
    with HelixEngine(smollm2_path, speculation="self", min_depth=4, max_depth=8, **settings) as engine:
        tokens, drafted, accepted = answers(engine, prompts)
    assert tokens == plain
    assert drafted > 60
    assert accepted > 0.6 * drafted


def test_left_to_itself_the_engine_serves_at_once_and_the_drafter_joins_when_it_is_made(path, monkeypatch):
    make = self_drafting.at_fewer_bits
    allowed = []

    def made_late(*arguments):
        while not allowed:
            time.sleep(0.01)
        return make(*arguments)

    monkeypatch.setattr(self_drafting, "at_fewer_bits", made_late)
    with opened(path, speculation="off") as engine:
        plain, *_ = answers(engine)
        others, *_ = answers(engine, seed=4)
    with opened(path, min_depth=2, max_depth=4) as engine:
        host = engine._service.host
        assert answers(engine)[0] == plain
        assert "self" not in host.engine.stats().drafts
        allowed.append(True)
        until = time.monotonic() + 60
        while host._late is not None and time.monotonic() < until:
            engine.generate("one", max_tokens=2)
        # Others than before: those are known text, which drafts for nothing.
        assert answers(engine, seed=4)[0] == others
        assert "self" in host.engine.stats().drafts
        host.engine.check()


def test_what_goes_wrong_while_it_is_made_is_told_and_the_engine_serves_on(path, monkeypatch, capsys):
    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(self_drafting, "at_fewer_bits", fail)
    with opened(path, min_depth=2) as engine:
        until = time.monotonic() + 60
        while engine._service.host._late is not None and time.monotonic() < until:
            engine.generate("one", max_tokens=2)
        assert len(engine.generate("one", max_tokens=4, ignore_eos=True).token_ids) == 4
    assert "no_self_drafter" in capsys.readouterr().out


def test_where_there_is_no_room_for_it_it_is_not_made(path, monkeypatch, capsys):
    monkeypatch.setattr(self_drafting, "free_memory_bytes", lambda device: 1 << 16)
    with opened(path, min_depth=2) as engine:
        until = time.monotonic() + 60
        while engine._service.host._late is not None and time.monotonic() < until:
            engine.generate("one", max_tokens=2)
        assert "self" not in engine._service.host.engine.stats().drafts
    assert "are needed, and 0 MiB are free" in capsys.readouterr().out


def test_of_several_processes_one_compiles_and_the_others_wait_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(self_drafting, "is_compiled", is_compiled)
    started = []

    def compiling(kv_dtype):
        started.append(kv_dtype)
        self_drafting.mark_compiled_for(kv_dtype)
        return process_of("import time; time.sleep(0.2)")

    monkeypatch.setattr(self_drafting, "start_compiling", compiling)
    compiled = self_drafting._compile_for
    threads = [threading.Thread(target=compiled, args=("int8", threading.Event())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert started == ["int8"]


def process_of(code):
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)


def wait_until(holds):
    until = time.monotonic() + 60
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)
    assert holds()


def test_where_the_process_that_compiles_fails_nothing_is_compiled_beside_those_who_are_served(
    path, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(self_drafting, "is_compiled", lambda what: False)
    monkeypatch.setattr(self_drafting, "start_compiling", lambda _: process_of("import sys; sys.exit(7)"))
    monkeypatch.setattr(self_drafting, "at_fewer_bits", lambda *_: pytest.fail("it was made"))
    with opened(path, min_depth=2) as engine:
        host = engine._service.host
        wait_until(lambda: engine.generate("one", max_tokens=2) and host._late is None)
        assert "self" not in host.engine.stats().drafts
    assert capsys.readouterr().out.count("the process that does so ended with 7") == 1


def test_nothing_of_it_begins_before_the_engine_is_turned(path):
    host = EngineHost(settings_of(path))
    late = host._late
    assert late._thread.ident is None
    host.join_drafter()
    assert late._thread.ident is not None
    late._thread.join()
    host.join_drafter()
    assert host._late is None


def test_an_engine_that_closes_ends_what_is_made_for_it(path, monkeypatch):
    started = []

    def compiling(_):
        started.append(process_of("import time; time.sleep(60)"))
        return started[0]

    monkeypatch.setattr(self_drafting, "is_compiled", lambda what: False)
    monkeypatch.setattr(self_drafting, "start_compiling", compiling)
    monkeypatch.setattr(self_drafting, "at_fewer_bits", lambda *_: pytest.fail("it was made"))
    with opened(path, min_depth=2) as engine:
        late = engine._service.host._late
        wait_until(lambda: engine.generate("one", max_tokens=2) and started)
    late._thread.join(20)
    assert not late._thread.is_alive()
    assert started[0].returncode not in {None, 0}
    with pytest.raises(self_drafting.NotMadeError, match="closed"):
        late._made.result(0)


def test_an_engine_that_closes_waits_no_longer_for_another_process_that_compiles(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(self_drafting, "is_compiled", is_compiled)
    monkeypatch.setattr(self_drafting, "start_compiling", lambda _: pytest.fail("it was begun"))
    closed, refused = threading.Event(), []

    def wait_for_it():
        try:
            self_drafting._compile_for("float16", closed)
        except self_drafting.NotMadeError as error:
            refused.append(error)

    waiting = threading.Thread(target=wait_for_it)
    with filelock.FileLock(tmp_path / ".compiling-fewer-bits-float16"):
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        closed.set()
        waiting.join(5)
        assert not waiting.is_alive()
    assert "closed" in str(refused[0])


def settings_of(path, speculation="auto"):
    return EngineSettings(
        model_path=path, dtype="float32", kv_cache_memory_bytes=4 << 20, speculation=speculation, min_depth=2
    )


@pytest.mark.parametrize(
    "error", [NoFreeBlocksError("none"), OutOfMemoryError("no room"), KeyError("lm_head"), ModelLoadError("not so")]
)
def test_asked_for_by_name_it_is_refused_in_one_line_whatever_it_fails_by(error, path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(host_module, "at_fewer_bits", fail)
    with pytest.raises(ModelLoadError, match=r"--speculation self cannot be had: .*Leave it out") as refusal:
        EngineHost(settings_of(path, "self"))
    assert "\n" not in str(refusal.value)


def test_asked_for_by_name_it_is_refused_where_there_is_no_memory_to_measure_drafts(path, monkeypatch):
    monkeypatch.setattr(speculation, "_costs", lambda *_, whose: None)
    with pytest.raises(ModelLoadError, match="--speculation self cannot be had: there is no memory"):
        EngineHost(settings_of(path, "self"))
    assert EngineHost(settings_of(path))._late is None


@pytest.mark.parametrize("is_tied, needed", [(True, 1), (False, 2)])
def test_an_embedding_of_its_own_needs_room_too(is_tied, needed, monkeypatch):
    table = SimpleNamespace(weight_tiles=object(), in_features=1 << 10, out_features=1 << 10)
    embedding = table if is_tied else SimpleNamespace()
    runner = SimpleNamespace(parts=Parts(None, embedding, [], None, table, None))
    monkeypatch.setattr(self_drafting, "free_memory_bytes", lambda device: needed << 21)
    self_drafting._check_room(runner)
    monkeypatch.setattr(self_drafting, "free_memory_bytes", lambda device: (needed << 21) - 2)
    with pytest.raises(OutOfMemoryError, match=f"{needed} MiB are needed"):
        self_drafting._check_room(runner)


def test_what_is_read_in_vain_is_gone_before_it_is_read_in_int8(path, monkeypatch):
    runner = EngineHost(settings_of(path, "off")).engine._decoder._runner
    read, heads = fewer_bits._read, []

    def watched(*arguments):
        assert all(head() is None for head in heads)
        parts = read(*arguments)
        heads.append(weakref.ref(parts.head))
        return parts

    # The folder stands in for a GGUF that stores its matrices in several ways.
    monkeypatch.setattr(fewer_bits, "_read", watched)
    monkeypatch.setattr(fewer_bits, "is_quantised_alike", lambda parts: False)
    assert fewer_bits.at_fewer_bits(path, runner).is_quantised
    assert len(heads) == 2


def test_weights_that_are_quantised_already_are_not_drafted_for(path):
    with HelixEngine(path, kv_cache_memory_bytes=4 << 20) as engine:
        assert engine._service.host._late is None
    with pytest.raises(ModelLoadError, match="quantised already: add --dtype float32 or bfloat16"):
        HelixEngine(path, kv_cache_memory_bytes=4 << 20, speculation="self")


def test_a_draft_model_beside_it_is_refused(path):
    with pytest.raises(ModelLoadError, match="leave --draft-model out"):
        opened(path, speculation="self", draft_model=path)


def test_with_a_draft_model_nothing_else_is_made(path):
    with opened(path, draft_model=path) as engine:
        assert engine._service.host._late is None


def test_it_is_known_what_was_compiled_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert not is_compiled("fewer-bits-int8")
    self_drafting.mark_compiled_for("int8")
    assert is_compiled("fewer-bits-int8")
    assert not is_compiled("fewer-bits-float32")
