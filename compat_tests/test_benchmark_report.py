"""What benchmarks share: progress where somebody looks, and not a byte where nobody does."""

import io
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import report


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_is_shown_how_far_it_is(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = []
    for item in report.tracked(iter("abcd"), "Letters"):
        shown.append(terminal.getvalue())
        assert item in "abcd"
    assert "Letters" in terminal.getvalue()
    assert [" 50%" in text for text in (*shown, terminal.getvalue())] == [False, False, True, True, True]
    assert "100%" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_a_file_is_not(capsys):
    with report.progress("Requests", 3) as advance:
        advance(2)
    assert list(report.tracked([1, 2], "Numbers")) == [1, 2]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("stop", [1, 2])
def test_who_stops_half_way_leaves_no_bar_behind(stop, monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    items = report.tracked(range(3), "Numbers")
    for _ in range(stop):
        next(items)
    items.close()
    assert terminal.getvalue().endswith("\x1b[?25h"), "the cursor is shown again"
