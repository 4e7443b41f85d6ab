"""Float32 mathematics of 16 lanes at once as LLVM vector code: what `math.py` is for scalars, with the same bits.

For kernels that are written out as vectors, where no vectoriser widens a loop.  Knows nothing about what is computed.
"""

from llvmlite import ir

from helix_gateway.runtime.cpu.emitter import F32S, I32S, Emitter, constant
from helix_gateway.runtime.cpu.math import EXP_MAX, EXP_MIN, EXP_TERMS, LN2_HIGH, LN2_LOW, LOG2_E, ROUND


def exponential(emitter: Emitter, x: ir.Value) -> ir.Value:
    """``math.exp_f32`` of every lane."""
    builder, shift, most = emitter.builder, constant(F32S, float(ROUND)), constant(F32S, float(EXP_MAX))
    capped = builder.select(builder.fcmp_ordered(">", x, most), most, x)
    shifted = emitter.fma(capped, constant(F32S, float(LOG2_E)), shift)
    n = builder.fsub(shifted, shift)
    r = emitter.fma(n, constant(F32S, -float(LN2_HIGH)), capped)
    r = emitter.fma(n, constant(F32S, -float(LN2_LOW)), r)
    p = constant(F32S, EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        p = emitter.fma(p, r, constant(F32S, term))
    p = builder.fadd(emitter.fma(p, builder.fmul(r, r), r), constant(F32S, 1.0))
    exponent = builder.shl(builder.bitcast(shifted, I32S), constant(I32S, 23))
    y = builder.bitcast(builder.add(builder.bitcast(p, I32S), exponent), F32S)
    return builder.select(builder.fcmp_ordered("<", x, constant(F32S, float(EXP_MIN))), constant(F32S, 0.0), y)
