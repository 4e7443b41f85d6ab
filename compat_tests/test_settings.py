"""Settings from flags, variables and a file: which wins, what a wrong one is told, and what --show-config shows."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helix_gateway.cli.main import app
from helix_gateway.cli.options import flag_of, metavar
from helix_gateway.cli.settings import ServeSettings
from helix_gateway.cli.sources import SettingsError, effective
from helix_gateway.gateway.settings import GatewaySettings
from helix_gateway.service.settings import EngineSettings
from helix_gateway.telemetry.settings import LogSettings

ROOT = Path(__file__).parent.parent


@pytest.fixture
def toml(tmp_path, monkeypatch):
    """Writes the file that HELIX_CONFIG names."""
    path = tmp_path / "helix.toml"
    monkeypatch.setenv("HELIX_CONFIG", str(path))

    def write(text):
        path.write_text(text)
        return path

    return write


def wrong(flags=None, config=None):
    with pytest.raises(SettingsError) as caught:
        effective(flags or {}, config)
    (line,) = str(caught.value).splitlines()
    return line


def test_flags_win_over_variables_and_variables_over_the_file(toml, monkeypatch):
    path = toml("port = 1\nmax-num-seqs = 2\nblock_size = 3\n")
    monkeypatch.setenv("HELIX_PORT", "10")
    monkeypatch.setenv("HELIX_MAX_NUM_SEQS", "20")
    found = effective({"port": "100", "host": None}, None)
    settings = found.settings
    assert (settings.port, settings.max_num_seqs, settings.block_size, settings.host) == (100, 20, 3, "127.0.0.1")
    assert found.origins["port"] == "--port"
    assert found.origins["max_num_seqs"] == "HELIX_MAX_NUM_SEQS"
    assert found.origins["block_size"] == f"{path}: `block_size`"
    assert found.origins["host"] == "default"


def test_a_file_may_hold_every_kind_of_value(toml):
    toml(
        'model = "org/name"\nserved_model_name = ["a", "b"]\napi_key = "k,1"\nkv_cache_memory = "2GiB"\n'
        'enable_prefix_caching = false\nbatch_window_ms = 2.5\nallowed_hosts = "x, y"\n'
    )
    settings = effective({}, None).settings
    assert (settings.model, settings.served_model_name, settings.api_key) == ("org/name", ["a", "b"], ["k,1"])
    assert (settings.kv_cache_memory, settings.enable_prefix_caching, settings.batch_window_ms) == (2**31, False, 2.5)
    assert settings.allowed_hosts == ["x", "y"]


def test_lists_in_variables_are_parted_by_commas(monkeypatch):
    monkeypatch.setenv("HELIX_ALLOWED_ORIGINS", "https://a.example, https://b.example")
    monkeypatch.setenv("HELIX_API_KEYS", "one, two")
    settings = effective({}, None).settings
    assert settings.allowed_origins == ["https://a.example", "https://b.example"]
    assert settings.api_key == ["one", "two"]


def test_the_file_at_the_usual_place_is_read_and_can_be_turned_off(tmp_path, monkeypatch):
    folder = tmp_path / "helix"
    folder.mkdir()
    (folder / "helix.toml").write_text("port = 7\n")
    monkeypatch.setattr("platformdirs.user_config_path", lambda *names, **options: folder)
    monkeypatch.delenv("HELIX_CONFIG")
    assert effective({}, None).settings.port == 7
    monkeypatch.setenv("HELIX_CONFIG", "")
    assert effective({}, None).settings.port == 8000


@pytest.mark.parametrize("key,nearest", [("prot", "port"), ("max_model_length", "max_model_len"), ("dtpye", "dtype")])
def test_a_wrong_key_in_the_file_is_named_with_the_nearest_right_one(toml, key, nearest):
    path = toml(f"{key} = 1\n")
    assert wrong() == f"{path}: `{key}` is no setting of Helix; did you mean `{nearest}`?"


@pytest.mark.parametrize(
    "text,said",
    [
        ("port = true", "`port`: must not be true or false"),
        ("port = 70000", "`port`: must be at most 65535, not 70000"),
        ("port = 80.5", "`port`: must be an integer"),
        ("port = [1]", "`port`: must be an integer"),
        ("host = 5", "`host`: must be a string, not an integer"),
        ("api_key = [5]", "`api_key`: must be a string"),
        ('dtype = "float8"', "'bfloat16'"),
        ('kv_cache_memory = "lots"', "2GiB"),
        ("batch_window_ms = nan", "a finite number"),
        ("enable_prefix_caching = 7", "true or false"),
        ("[port]\nx = 1", "`port`: must be an integer"),
        ('otlp_endpoint = "collector:4317"', "must begin with http:// or https://"),
        ("port = ", "not valid TOML"),
        ("port = 1\nport = 2", "not valid TOML"),
        ("port = '\x00'", "not valid TOML"),
    ],
)
def test_a_wrong_value_in_the_file_names_file_key_and_bound(toml, text, said):
    path = toml(text)
    line = wrong()
    assert line.startswith(str(path))
    assert said in line


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    assert "is a folder" in wrong(config=str(tmp_path))
    assert "no such file" in wrong(config=str(tmp_path / "missing.toml"))
    (tmp_path / "latin.toml").write_bytes(b'host = "\xff"')
    assert "not valid TOML" in wrong(config=str(tmp_path / "latin.toml"))


@pytest.mark.parametrize(
    "variable,value,said",
    [
        ("HELIX_PORT", "70000", "HELIX_PORT: must be at most 65535, not 70000."),
        ("HELIX_PORT", "tcp://10.0.0.1:8000", "enableServiceLinks"),
        ("HELIX_MAX_NUM_SEQS", "-1", "HELIX_MAX_NUM_SEQS: must be at least 1, not -1."),
        ("HELIX_ENABLE_PREFIX_CACHING", "maybe", "HELIX_ENABLE_PREFIX_CACHING: must be true or false, not 'maybe'."),
        ("HELIX_DEVICE", "toaster", "directml"),
    ],
)
def test_a_wrong_variable_names_itself_and_its_bound(monkeypatch, variable, value, said):
    monkeypatch.setenv(variable, value)
    assert said in wrong()


def test_a_variable_that_looks_misspelt_is_doubted_and_others_are_left_alone(monkeypatch):
    monkeypatch.setenv("HELIX_PROT", "9")
    monkeypatch.setenv("HELIX_CACHE", "/somewhere")
    monkeypatch.setenv("HELIX_SERVICE_HOST", "10.0.0.1")  # as Kubernetes does
    monkeypatch.setenv("HELIX_PORT_8000_TCP", "tcp://10.0.0.1:8000")
    assert effective({}, None).doubts == ["HELIX_PROT is no variable of Helix; did you mean HELIX_PORT?"]


@pytest.mark.parametrize("name", ServeSettings.model_fields)
def test_every_setting_that_is_a_number_refuses_one_out_of_range(name):
    field = ServeSettings.model_fields[name]
    bounded = any(hasattr(bound, side) for bound in field.metadata for side in ("ge", "gt"))
    is_number = "int" in str(field.annotation) or "float" in str(field.annotation)
    assert bounded == (is_number and "Literal" not in str(field.annotation))
    if bounded:
        assert wrong({name: "-1"}).startswith(f"{flag_of(name)}: ")


def test_every_setting_has_a_flag_and_reaches_what_it_is_for():
    text = CliRunner().invoke(app, ["serve", "--help"]).output
    taken = {field.name for field in fields(GatewaySettings)} | set(EngineSettings.__struct_fields__)
    taken |= {f"log_{name}" for name in LogSettings.__struct_fields__}
    renamed = {
        "model",
        "draft_model",
        "speculative_config",
        "api_key",
        "served_model_name",
        "kv_cache_memory",
        "max_body_size",
        "request_timeout",
        "drain_timeout",
    }
    for name in ServeSettings.model_fields:
        assert flag_of(name) in text
        assert name in taken | renamed


def test_where_to_log_reaches_the_engine_too():
    settings = effective({"log_level": "debug", "log_format": "json", "log_file": "/tmp/x"}, None).settings
    assert settings.engine("m").log == LogSettings(level="debug", format="json", file="/tmp/x")


def test_the_readme_tells_every_option_and_the_operating_guide_a_file_that_works(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ServeSettings.model_fields:
        assert name == "model" or f"| `{flag_of(name)}`" in readme, name
    guide = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "keys").write_text("alice: sk-1\n")
    (tmp_path / "helix.toml").write_text(example.replace("/etc/helix/keys", str(tmp_path / "keys")))
    assert effective({}, str(tmp_path / "helix.toml")).settings.drain_timeout == 60


def test_show_config_is_a_file_that_sets_the_same_and_hides_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("HELIX_API_KEY", "very-secret")
    output = (
        CliRunner().invoke(app, ["serve", "org/name", "--show-config", "--port", "9", "--kv-cache-memory", "1k"]).output
    )
    assert "very-secret" not in output
    assert "HELIX_API_KEY" in output
    (tmp_path / "shown.toml").write_text(output)
    shown = effective({}, str(tmp_path / "shown.toml")).settings
    assert (shown.model, shown.port, shown.kv_cache_memory) == ("org/name", 9, 1024)


def test_a_key_that_is_wrong_is_not_shown(toml):
    toml('api_key = ["very-secret", 5]')
    assert "very-secret" not in wrong()


def test_of_a_key_of_another_type_the_type_is_told(toml):
    toml("api_key = 5")
    assert wrong().endswith("`api_key`: must be an array, not an integer.")


@pytest.mark.parametrize(
    "name",
    [name for name, field in ServeSettings.model_fields.items() if metavar(name) in {"INTEGER", "SIZE", "NUMBER"}],
)
def test_every_number_has_bounds_on_both_sides(name):
    for beyond in ("-1", "-7.5", "1" + "0" * 30, "1" + "0" * 400):
        line = wrong({name: beyond})
        assert line.startswith(f"{flag_of(name)}: ")
        assert len(line) < 500


def test_the_least_depth_is_not_beyond_the_most():
    assert wrong({"min_depth": "9", "max_depth": "3"}) == "--min-depth: must be at most max_depth, which is 3; it is 9."
    assert effective({"min_depth": "3", "max_depth": "3"}, None).settings.min_depth == 3


# ---- speculation as other servers are told of it


@pytest.mark.parametrize(
    "text",
    [
        'speculative_config = \'{"method": "ngram", "num_speculative_tokens": 7}\'',
        """
[speculative_config]
method = "ngram"
num_speculative_tokens = 7""",
    ],
)
def test_a_speculative_configuration_reaches_the_engine(toml, text):
    toml(text)
    settings = effective({}, None).settings
    engine = settings.engine("m")
    assert (engine.speculation, engine.max_depth) == ("suffix", 7)


def test_a_speculative_configuration_names_the_draft_model():
    flags = {"speculative_config": '{"model": "a/b", "num_speculative_tokens": 5}'}
    settings = effective(flags, None).settings
    assert settings.spoken().draft_model == "a/b"
    assert settings.engine("m", "/draft") == EngineSettings(
        model_path="m", draft_model_path="/draft", speculation="model", max_depth=5, log=settings.engine("m").log
    )


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"speculative_config": '{"method": "eagle"}'}, "method must be"),
        (
            {"speculative_config": '{"method": "suffix"}', "speculation": "off"},
            "speculation 'suffix' where speculation is",
        ),
        ({"speculative_config": "nonsense"}, "is no JSON"),
    ],
)
def test_a_wrong_speculative_configuration_is_one_line(flags, said):
    line = wrong(flags)
    assert line.startswith("--speculative-config: ")
    assert said in line
