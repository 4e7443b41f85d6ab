"""`helix serve --reload`: what is edited runs, without anybody starting it again."""

import subprocess
import sys
import textwrap
import time

import pytest
from typer.testing import CliRunner

from helix_gateway.cli import reload
from helix_gateway.cli.main import app
from helix_gateway.core.errors import HelixError


def test_a_changed_file_starts_the_command_again_and_says_which(tmp_path):
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "answer.py").write_text("print('first', flush=True)\nimport time\ntime.sleep(60)\n")
    code = f"""
        import sys
        from pathlib import Path
        from helix_gateway.cli.reload import run_again_on_change
        run_again_on_change(Path({str(folder)!r}), [sys.executable, {str(folder / "answer.py")!r}])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stdout.readline() == "first\n"
        time.sleep(0.3)  # the watcher begins once the command has
        (folder / "answer.py").write_text("print('second', flush=True)\nimport time\ntime.sleep(60)\n")
        assert watching.stdout.readline() == "second\n"
        watching.terminate()
        _, err = watching.communicate(timeout=20)
        assert "helix: answer.py changed; starting again" in err.splitlines()
        assert watching.returncode == 0


def test_the_server_is_started_as_it_was_asked_for(monkeypatch):
    started = []
    monkeypatch.setattr(reload, "run_again_on_change", lambda folder, command: started.append((folder.name, command)))
    monkeypatch.setattr("sys.argv", ["helix", "serve", "--reload", "--port", "9"])
    monkeypatch.setenv("HELIX_DRAIN_TIMEOUT", "1")
    assert CliRunner().invoke(app, ["serve", "--reload", "--port", "9"]).exit_code == 0
    assert started == [("helix_gateway", [sys.executable, "-m", "helix_gateway", "serve", "--port", "9"])]


def test_without_the_library_that_watches_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    with pytest.raises(HelixError, match="pip install watchfiles"):
        reload.run_again_on_change(tmp_path, ["true"])
