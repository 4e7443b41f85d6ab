"""The `helix` command: what it takes, what it says where something is wrong, and that its help imports little."""

import asyncio
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from helix_gateway import __version__
from helix_gateway.cli import first_start
from helix_gateway.cli import serve as serve_module
from helix_gateway.cli.main import app, main
from helix_gateway.cli.sizes import parse_size, size_text
from helix_gateway.core.errors import EngineUnavailableError
from helix_gateway.gateway import addresses
from helix_gateway.runtime.cpu.compiled import USUAL_FUNCTIONS
from helix_gateway.service import launch
from helix_gateway.service.settings import EngineSettings


def helix(*arguments):
    command = [sys.executable, "-m", "helix_gateway", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


class Unstarted:
    """An engine's process that is none."""

    def end(self):
        self.has_ended = True


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What ``helix serve`` would start, for the arguments given."""
    runs = []
    monkeypatch.setattr(serve_module, "_run", lambda engine, gateway, *others: runs.append((engine, gateway)))
    monkeypatch.setattr(launch, "EngineProcess", Unstarted)
    monkeypatch.setattr(addresses, "bind", lambda gateway: [])
    monkeypatch.delenv("HELIX_API_KEY", raising=False)
    model = tmp_path / "tiny.gguf"
    model.touch()

    def start(flags=""):
        result = CliRunner().invoke(app, ["serve", str(model), *flags.split()])
        assert result.exit_code == 0, result.output
        start.output.append(result.output)
        return runs[-1]

    start.output = []
    return start


# What reads flags, and what they are checked with; whatever else a command needs it imports when it runs.
OF_HELP = {"annotated_doc", "annotated_types", "click", "helix_gateway", "msgspec", "pydantic", "pydantic_core"}
OF_HELP |= {"shellingham", "typer", "typing_extensions", "typing_inspection"}
OF_HELP |= {f"helix_gateway.{room}" for room in ("cli", "core", "gateway", "service", "telemetry")}


@pytest.mark.parametrize("command", ["", "serve", "chat", "bench", "doctor", "models", "models pull"])
def test_help_imports_nothing_that_takes_long(command):
    code = (
        "import sys\nbefore = set(sys.modules)\nfrom helix_gateway.cli.main import app\n"
        f"try:\n    app({[*command.split(), '--help']})\nexcept SystemExit: pass\n"
        "new = [name.split('.') for name in set(sys.modules) - before if not name.startswith('_sysconfigdata')]\n"
        "new = {'.'.join(name[: 2 if name[0] == 'helix_gateway' else 1]) for name in new}\n"
        "print(*new - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.splitlines()[-1].split()) <= OF_HELP


@pytest.mark.parametrize(
    "line, said",
    [
        ("serve --prot 1", "helix serve: there is no option --prot; did you mean --port?"),
        (
            "serve --max-model-length 1",
            "helix serve: there is no option --max-model-length; did you mean --max-model-len?",
        ),
        ("bench --zzz", "helix bench: there is no option --zzz; `helix bench --help` names them."),
        ("--verson", "helix: there is no option --verson; did you mean --version?"),
        ("serve --port", "helix: Option '--port' requires an argument."),
        ("bench --concurrency 0", "helix bench: Invalid value: --concurrency takes numbers above 0"),
        ("chat --temperature 9", "helix chat: Invalid value for '--temperature': "),
        ("models show", "helix models show: Missing argument 'NAME'."),
        ("srve", "helix: No such command 'srve'"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_answered_in_one_line(line, said):
    done = helix(*line.split())
    assert (done.returncode, done.stdout) == (2, "")
    (told,) = done.stderr.splitlines()
    assert told.startswith(said)


def test_a_draft_model_that_is_not_there_is_named_by_its_option(smollm2_path, tmp_path):
    done = helix("serve", str(smollm2_path), "--port", "0", "--draft-model", str(tmp_path / "none.gguf"))
    assert done.returncode == 1
    (told,) = done.stderr.splitlines()
    assert told.startswith("helix: --draft-model: There is no file or folder ")


def test_no_command_at_all_shows_the_help():
    assert "serve" in CliRunner().invoke(app, []).output


def test_serve_hands_every_flag_on(started):
    engine, gateway = started(
        "--host 0.0.0.0 --port 9 --api-key k --served-model-name a --served-model-name b "
        "--dtype bfloat16 --device cpu --max-model-len 512 --max-num-seqs 3 --max-num-batched-tokens 77 "
        "--block-size 8 --kv-cache-memory 2GiB --kv-cache-dtype int8 --no-enable-prefix-caching --seed 18446744073709551615 "
        "--batch-window-ms 2.5 --default-max-tokens 9 --allowed-origins https://a.example"
    )
    assert (engine.dtype, engine.device, engine.max_model_len, engine.max_num_seqs) == ("bfloat16", "cpu", 512, 3)
    assert (engine.max_num_batched_tokens, engine.block_size, engine.kv_cache_memory_bytes) == (77, 8, 2**31)
    assert engine.kv_cache_dtype == "int8"
    assert (engine.enable_prefix_caching, engine.seed, engine.batch_window_ms) == (False, 2**64 - 1, 2.5)
    assert (gateway.host, gateway.port, gateway.api_keys, gateway.default_max_tokens) == ("0.0.0.0", 9, ("k",), 9)
    assert (gateway.served_model_names, gateway.allowed_origins) == (("a", "b"), ("https://a.example",))


@pytest.mark.parametrize(
    "flags,warns", [("--host 0.0.0.0", True), ("--host 0.0.0.0 --api-key k", False), ("--host ::1", False)]
)
def test_a_server_that_everybody_can_reach_without_a_key_says_so(started, flags, warns):
    started(flags)
    assert ("whoever reaches 0.0.0.0 is served" in started.output[-1]) == warns


def test_a_port_in_use_is_known_before_a_model_is_looked_for():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = helix("serve", "/no/such/model.gguf", "--port", str(port))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"helix: Port {port} on 127.0.0.1 is in use; choose another with --port.\n"


def test_serve_without_flags_uses_the_settings_own_defaults(started):
    engine, gateway = started()
    assert engine == type(engine)(model_path=engine.model_path)
    assert gateway == type(gateway)(served_model_names=("tiny",))


def test_an_empty_api_key_in_the_environment_is_no_key(started, monkeypatch):
    monkeypatch.setenv("HELIX_API_KEY", "")
    assert started()[1].api_keys == ()


@pytest.mark.parametrize(
    "flag,value,said",
    [
        ("--port", "70000", "65535"),
        ("--port", "x", "--port"),
        ("--dtype", "float8", "bfloat16"),
        ("--device", "toaster", "directml"),
        ("--max-model-len", "1", "2"),
        ("--max-num-seqs", "0", "1"),
        ("--max-num-batched-tokens", "-3", "1"),
        ("--block-size", "0", "1"),
        ("--kv-cache-memory", "lots", "2GiB"),
        ("--kv-cache-memory", "0", "above zero"),
        ("--seed", "-1", "0"),
        ("--seed", "18446744073709551616", "18446744073709551615"),
        ("--batch-window-ms", "-1", "0"),
        ("--batch-window-ms", "nan", "batch-window-ms"),
        ("--default-max-tokens", "0", "1"),
        ("--colour", "red", "--colour"),
    ],
)
def test_a_wrong_flag_names_itself_and_its_bound(flag, value, said):
    result = CliRunner().invoke(app, ["serve", flag, value])
    assert result.exit_code == 2
    assert flag in result.output
    assert said in result.output


@pytest.mark.parametrize("flags", [["--api-key", ""], ["--port", "70000"], ["--batch-window-ms", "-1"]])
def test_a_wrong_flag_is_one_line(flags):
    result = CliRunner().invoke(app, ["serve", *flags])
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    "flags,variables,said",
    [
        (["--port", "70000"], {}, "--port: must be at most 65535, not 70000."),
        (["--max-num-seqs", "-4"], {}, "--max-num-seqs: must be at least 1, not -4."),
        (["--config", "{tmp}"], {}, "is a folder, not a TOML file."),
        (["--config", "{tmp}/wrong.toml"], {}, "`prot` is no setting of Helix; did you mean `port`?"),
        (["--api-key-file", "{tmp}"], {}, "cannot be read: Is a directory."),
        ([], {"HELIX_REQUEST_TIMEOUT": "soon"}, "HELIX_REQUEST_TIMEOUT: must be a number, not 'soon'."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_one_line_and_exit_code_2(flags, variables, said, tmp_path, monkeypatch):
    (tmp_path / "wrong.toml").write_text("prot = 1\n")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = helix("serve", *(flag.format(tmp=tmp_path) for flag in flags))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("helix: ")
    assert line.endswith(said)


def test_a_model_that_is_not_there_is_one_line_and_exit_code_1(tmp_path):
    done = helix("serve", str(tmp_path / "missing.gguf"), "--port", "0")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "missing.gguf" in done.stderr


async def test_a_start_that_compiles_says_so_and_one_that_does_not_is_silent(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(first_start, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(first_start, "_TOLD_EVERY_S", 0.01)
    (tmp_path / "old.nbc").touch()
    async with first_start.telling_of_compilation():
        await asyncio.sleep(0.1)
    assert capsys.readouterr().err == ""
    async with first_start.telling_of_compilation():
        await asyncio.sleep(0.1)
        (tmp_path / "new.nbc").touch()
        await asyncio.sleep(0.3)
    said = capsys.readouterr().err.splitlines()
    assert "for this processor" in said[0]
    assert said[1] == "Compiling kernels: 1, 0 s"


async def test_how_much_is_to_be_compiled_is_told_only_where_that_is_known(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(first_start, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(first_start, "_TOLD_EVERY_S", 0.01)
    async with first_start.telling_of_compilation():
        await asyncio.sleep(0.1)
        for function in range(120):
            await asyncio.sleep(0.005)
            (tmp_path / f"{function}.nbc").touch()
        await asyncio.sleep(0.1)
    said = capsys.readouterr().err.splitlines()
    totals = {int(found[1]) for line in said if (found := re.search(r"of about (\d+)", line))}
    assert totals == {USUAL_FUNCTIONS}
    assert said[-1].startswith("Compiling kernels: 120, ")
    # What a terminal of 80 columns shows, behind a turning sign.
    assert len(f"{first_start._WHY_ON_TERMINAL}: 90 of about {USUAL_FUNCTIONS}, 999 s") < 78


@pytest.mark.parametrize(
    "trouble", [OSError(28, "No space left on device"), EngineUnavailableError("The engine did not start.")]
)
def test_trouble_at_the_start_is_one_line_and_exit_code_1(trouble, monkeypatch, tmp_path):
    def fail(*arguments):
        raise trouble

    model = tmp_path / "tiny.gguf"
    model.touch()
    monkeypatch.setattr(serve_module, "_run", fail)
    monkeypatch.setattr(launch, "EngineProcess", Unstarted)
    monkeypatch.setattr("sys.argv", ["helix", "serve", str(model), "--port", "0"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == f"helix: {trouble}"


def test_the_version_flag_prints_one_line():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"helix {__version__}\n")


def test_version_names_what_decides_what_helix_can_do():
    output = CliRunner().invoke(app, ["version"]).output
    assert [line.split()[0] for line in output.splitlines()] == ["helix", "python", "torch", "transformers", "numba"]


@pytest.mark.parametrize(
    "text,size_bytes",
    [
        ("1048576", 2**20),
        ("1B", 1),
        ("512MB", 512 * 10**6),
        ("2GiB", 2**31),
        ("1.5 gib", 3 * 2**29),
        ("2g", 2**31),
        (" 3kb ", 3000),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size_bytes):
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "2 gigs", "nan", "inf", "0", "0.1", "1,5GB", "1..5GB"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="2GiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["1023", "1KiB", "1025", "32MiB", "3GiB", "1536MiB", "2TiB"])
def test_sizes_are_written_as_they_are_read(text):
    assert size_text(parse_size(text)) == text


@pytest.mark.parametrize(
    "where", ["helix_gateway.text.tokenizer.Tokenizer.load", "helix_gateway.gateway.app.create_app"]
)
def test_what_compiles_ahead_is_ended_where_a_start_fails_before_anything_listens(where, monkeypatch):
    closed = []

    def fail(*arguments):
        assert closed == []
        raise OSError("no room")

    monkeypatch.setattr("helix_gateway.telemetry.logging.configure_logging", lambda settings: None)
    monkeypatch.setattr(launch, "CompilingAhead", lambda: SimpleNamespace(close=lambda: closed.append(True)))
    monkeypatch.setattr("helix_gateway.text.tokenizer.Tokenizer.load", lambda path: None)
    monkeypatch.setattr(where, fail)
    gateway = SimpleNamespace(served_model_names=("tiny",), otlp_endpoint=None)
    with pytest.raises(OSError, match="no room"):
        serve_module._run(EngineSettings(model_path="tiny"), gateway, [], "tiny", object())
    assert closed == [True]
