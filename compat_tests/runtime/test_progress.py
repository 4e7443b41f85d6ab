"""What is told of long work where stderr is no terminal: nothing of what is quick, lines of what is not."""

import time

import pytest

from helix_gateway.runtime import progress


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(progress, "QUIET_S", 0.0)


def test_what_is_quick_is_not_worth_a_line(capsys):
    with progress.terminal_bar("Downloading it", 100) as report:
        report(50)
        report(100)
    assert capsys.readouterr().err == ""


def test_what_fails_is_not_said_to_be_done(impatient, capsys):
    with pytest.raises(OSError, match="full"), progress.told_if_long("Getting it"):
        time.sleep(0.05)
        raise OSError("full")
    assert capsys.readouterr().err == "Getting it …\n"


def test_what_takes_long_is_told_at_its_start_each_tenth_and_its_end(impatient, capsys):
    with progress.terminal_bar("Downloading it", 1_000_000) as report:
        time.sleep(0.05)
        for done in range(0, 1_000_001, 1000):
            report(done)
    first, *tenths, last = capsys.readouterr().err.splitlines()
    assert (first, last) == ("Downloading it …", "Downloading it: done in 0 s")
    assert tenths == [f"Downloading it: {percent} % of 1 MB" for percent in range(10, 101, 10)]
