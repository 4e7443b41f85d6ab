"""Kernels for Arm on a machine that is none: LLVM makes Arm's code of what they emit, with the instructions meant.

That the code is right is for an emulator to show: ``scripts/arm_check.py``.
"""

import re
from types import SimpleNamespace

import pytest
from llvmlite import binding, ir
from numba import types

from helix_gateway.runtime.cpu import arm, emitter, work_sharing
from helix_gateway.runtime.cpu.dot_products import DOT_PRODUCTS
from helix_gateway.runtime.cpu.emitter import I64
from helix_gateway.runtime.cpu.quantised_kernels import (
    INT4,
    INT8,
    INT8_CHANNELS,
    groups_together,
    multiply_quantised_tile,
)

FEATURES = {"ArmI8mm": "+neon,+dotprod,+i8mm", "ArmDotProduct": "+neon,+dotprod", "Portable": "+neon"}
PLACES = {type(each).__name__: place for place, each in enumerate(DOT_PRODUCTS)}
CALLS = {"usdot", "sdot"}


@pytest.fixture(scope="module")
def arm_target():
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    try:
        return binding.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError:
        pytest.skip("this LLVM makes no code for Arm")


@pytest.fixture
def on_arm(monkeypatch):
    """Whatever is emitted is for a processor with NEON."""
    monkeypatch.setattr(emitter, "target_features", lambda: frozenset({"neon"}))
    monkeypatch.setattr(work_sharing, "is_x86", lambda: False)
    monkeypatch.setattr(work_sharing, "is_arm", lambda: True)


def assembly(target, intrinsic, argument_types, features):
    """Arm's code of a numba intrinsic, as LLVM optimises it; literals among its arguments are numba's types."""
    result, emit = intrinsic._defn(None, *argument_types)
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * len(argument_types)), "kernel")
    builder = ir.IRBuilder(function.append_basic_block())
    emit(SimpleNamespace(get_dummy_value=lambda: None), builder, result, function.args)
    builder.ret_void()
    parsed = binding.parse_assembly(str(module))
    machine = target.create_target_machine(features=features, opt=3)
    options = binding.create_pipeline_tuning_options(speed_level=3)
    binding.create_pass_builder(machine, options).getModulePassManager().run(
        parsed, binding.create_pass_builder(machine, options)
    )
    return machine.emit_assembly(parsed)


def mnemonics(code):
    return re.findall(r"^\t([a-z][a-z0-9.]*)\s", code, re.MULTILINE)


def tile_code(target, kind, format_, rows):
    literals = [types.IntegerLiteral(number) for number in (format_, PLACES[kind], rows, rows)]
    return assembly(target, multiply_quantised_tile, [*literals, *[types.intp] * 12], FEATURES[kind])


@pytest.mark.parametrize("format_", [INT8, INT4, INT8_CHANNELS])
@pytest.mark.parametrize("kind", FEATURES)
def test_a_tile_is_multiplied_by_the_processors_own_dot_products(kind, format_, arm_target, on_arm):
    found = mnemonics(tile_code(arm_target, kind, format_, 1))
    dots = [name for name in found if name in CALLS]
    wanted = {"ArmI8mm": "usdot", "ArmDotProduct": "sdot"}.get(kind)
    # A group is 32 inputs of 32 channels, 16 products an instruction; one row takes both vectors of the tile.
    assert dots == ([wanted] * 64 * groups_together(format_) if wanted else [])
    assert "bl" not in found  # no library is called for what an instruction does


def test_a_thread_that_waits_lets_time_pass(arm_target, on_arm):
    code = assembly(arm_target, work_sharing._wait_until, [types.int64] * 2, "+neon")
    assert "isb" in mnemonics(code)


@pytest.mark.parametrize(
    "features, told, wanted",
    [
        ("", (), ""),
        ("+aes,-sve", ("neon", "asimddp", "i8mm", "bf16"), "+aes,-sve,+neon,+dotprod,+i8mm"),
        ("+neon,-dotprod", ("neon", "asimddp"), "+neon,+dotprod"),
        ("+neon,+crc", (), "+neon,+crc"),
    ],
)
def test_what_the_system_tells_completes_what_llvm_knows(features, told, wanted):
    assert arm.complete(features, told) == wanted


@pytest.mark.parametrize(
    "machine, told, wanted",
    [
        ("aarch64", {}, "+crc,+neon,+dotprod"),
        ("arm64", {}, "+crc,+neon,+dotprod"),
        ("x86_64", {}, None),
        ("aarch64", {"NUMBA_CPU_FEATURES": "+neon"}, "+neon"),
        ("aarch64", {"NUMBA_CPU_NAME": "generic"}, None),
    ],
)
def test_numba_is_told_on_arm_alone_and_only_what_nobody_has_said(machine, told, wanted, monkeypatch):
    monkeypatch.setattr(arm, "platform", SimpleNamespace(machine=lambda: machine))
    monkeypatch.setattr(arm, "os", SimpleNamespace(environ=told))
    monkeypatch.setattr(arm, "sys", SimpleNamespace(modules={}))
    monkeypatch.setattr(arm, "_known_to_llvm", lambda: "+crc")
    monkeypatch.setattr(arm, "instruction_sets", lambda: ("neon", "asimddp"))
    arm.tell_numba()
    assert told.get("NUMBA_CPU_FEATURES") == wanted
