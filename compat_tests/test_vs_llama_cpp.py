"""The comparison with llama.cpp: to whom a ratio is, how sure it is, and that a run in parts is the same as one."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import servers
import vs_llama_cpp
from ratios import interval
from server_loads import PARTS, shares, spec_bench, story

MINE, FAST, SLOW = "helix Q4_1, KV int8 off", "llama.cpp Q4_0", "llama.cpp Q8_0"


def level(tokens_per_s, ttft_ms):
    return {"tokens_per_s": tokens_per_s, "ttft_ms": ttft_ms, "gap_ms": 1.0}


def rounds(*figures):
    return [{"levels": {"1": {"cold": level(*each)}}} for each in figures]


def test_a_ratio_is_to_the_best_of_its_row_and_above_one_where_helix_is_better():
    results = {MINE: rounds((100.0, 20.0)), FAST: rounds((50.0, 400.0)), SLOW: rounds((40.0, 100.0))}
    table = vs_llama_cpp.compare(results)
    speed, first = table["tokens_per_s, cold, 1"][MINE], table["ttft_ms, cold, 1"][MINE]
    assert (speed["best"], speed["ratio"], speed["interval"]) == (FAST, 2.0, None)
    assert (first["best"], first["ratio"]) == (SLOW, 5.0)


def test_from_three_rounds_a_ratio_has_the_interval_of_its_rounds_own_ratios():
    mine, theirs = rounds((100.0, 1.0), (80.0, 1.0), (90.0, 1.0)), rounds((50.0, 1.0), (40.0, 1.0), (30.0, 1.0))
    cell = vs_llama_cpp.compare({MINE: mine, FAST: theirs})["tokens_per_s, cold, 1"][MINE]
    assert cell["ratio"] == 90 / 40
    assert cell["interval"] == interval([2.0, 2.0, 3.0])
    assert cell["interval"][0] < math.exp((2 * math.log(2) + math.log(3)) / 3) < cell["interval"][1]
    fewer = vs_llama_cpp.compare({MINE: mine, FAST: theirs[:2]})["tokens_per_s, cold, 1"][MINE]
    assert fewer["interval"] is None


def test_predicted_edits_stand_beside_the_peers_first_sight_of_them():
    mine = [{"edits": {"1": {"cold": level(90.0, 1.0), "hot": level(95.0, 1.0), "predicted": level(300.0, 1.0)}}}]
    theirs = [{"edits": {"1": {"cold": level(50.0, 1.0), "hot": level(60.0, 1.0)}}}]
    table = vs_llama_cpp.compare({MINE: mine, FAST: theirs})
    assert table["edits tokens_per_s, predicted, 1"][MINE]["ratio"] == 6.0
    assert table["edits tokens_per_s, hot, 1"][MINE]["ratio"] == 95 / 60
    assert "edits tokens_per_s, predicted, 1" not in vs_llama_cpp.compare({FAST: theirs})


def test_runs_of_different_parts_are_joined_into_one_table(tmp_path, capsys):
    parts = {
        "levels": {MINE: rounds((100.0, 20.0)), FAST: rounds((50.0, 40.0))},
        "long": {MINE: [{"long": {"6000": level(8.0, 2.0)}}], FAST: [{"long": {"6000": level(2.0, 4.0)}}]},
        "prefix": {MINE: [{"prefix": {"hot": level(9.0, 2.0)}}], FAST: [{"prefix": {"hot": level(3.0, 4.0)}}]},
    }
    for name, results in parts.items():
        vs_llama_cpp.keep(results, 96, tmp_path / name)
    results, tokens = vs_llama_cpp.joined([tmp_path / name / "vs_llama_cpp.json" for name in parts])
    table = vs_llama_cpp.keep(results, tokens, tmp_path)
    assert table["tokens_per_s, cold, 1"][MINE]["ratio"] == 2.0
    assert table["long tokens_per_s, 6000"][MINE]["ratio"] == 4.0
    assert table["shared prefix tokens_per_s, hot"][MINE]["ratio"] == 3.0
    assert json.loads((tmp_path / "vs_llama_cpp.json").read_text())["compared"] == table
    assert (tmp_path / "vs_llama_cpp.png").exists()
    assert not (tmp_path / "long" / "vs_llama_cpp.png").exists()
    vs_llama_cpp.print_compared(table)
    assert "4.00" in capsys.readouterr().out


def test_edits_of_another_length_are_not_joined(tmp_path):
    edits = [{"edits": {"1": {"cold": level(90.0, 1.0), "hot": level(95.0, 1.0)}}}]
    vs_llama_cpp.keep({MINE: edits}, 96, tmp_path)
    file = tmp_path / "vs_llama_cpp.json"
    assert vs_llama_cpp.joined([file])[0] == {MINE: edits}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"edit_tokens": 96}))
    with pytest.raises(SystemExit, match="edits whose answers"):
        vs_llama_cpp.joined([file])


def test_no_level_is_asked_what_another_was():
    class Options:
        streams, requests = vs_llama_cpp.STREAMS, 8

    asked = [prompt.text for _, prompts in shares(spec_bench(1), Options) for prompt in prompts]
    assert len(asked) == len(set(asked)) == 136
    assert len(story(7, 6000).split()) == 6000
    assert story(7, 50)[:2] != story(8, 50)[:2]


def test_settings_without_avx512_are_the_same_servers_in_another_environment(tmp_path):
    settings = {setting.name: setting for setting in servers.helix_settings(tmp_path)}
    lesser = servers.on_avx2(settings[MINE], tmp_path)
    assert lesser.command == settings[MINE].command
    assert lesser.name == f"{MINE}, AVX2"
    assert not settings[MINE].environment
    assert "avx512" not in lesser.environment["NUMBA_CPU_FEATURES"]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_told_apart_in_the_results(part):
    assert sum(other.key == PARTS[part].key for other in PARTS.values()) == 1
