"""The vocabulary of our LLVM: loads, loops and vectors, mostly of 16 lanes, that micro-kernels are put together from.

Used by the modules that emit kernels, and by nobody else.  Fused multiply-adds are always written out as
``llvm.fma``, so that rounding never depends on what a compiler chose to contract.  Knows nothing about what is computed.
"""

from collections.abc import Callable, Iterable, Sequence

from llvmlite import ir
from numba.core import cgutils

from helix_gateway.runtime.cpu.instruction_sets import target_features

LANES = 16
"""float32 values of one vector: one AVX-512 register, or two of AVX2."""
F32_BYTES = 4
VECTOR_BYTES = F32_BYTES * LANES

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32, F16 = ir.FloatType(), ir.HalfType()
F32S, I32S, I16S, I8S = (ir.VectorType(element, LANES) for element in (F32, I32, I16, I8))

_HALF_FEATURES = frozenset({"f16c", "fullfp16", "neon"})
"""Any of these converts float16."""
_MASK_FEATURES = frozenset({"avx", "avx2", "avx512f"})
"""Any of these loads and stores some lanes of a vector."""

Body = Callable[[ir.Value, list[ir.Value]], list[ir.Value]]


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    """Call the LLVM intrinsic ``name``."""
    function_type = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def constant(kind: ir.Type, number: float) -> ir.Constant:
    """A number, in every lane where ``kind`` is a vector."""
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def _like(kind: ir.Type, element: ir.Type) -> ir.Type:
    """A scalar of another type, or a vector where ``kind`` is one."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def _spread(builder: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    empty = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    one = builder.insert_element(empty, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, empty, constant(ir.VectorType(I32, lanes), 0))


def _bytes_of(element: ir.Type) -> int:
    return F32_BYTES if element == F32 else element.width // 8


def _either(builder: ir.IRBuilder, choices: list[tuple[ir.Value, ir.Block]]) -> ir.Value:
    """The value that comes with the block which led here."""
    value = builder.phi(choices[0][0].type)
    for choice, block in choices:
        value.add_incoming(choice, block)
    return value


class Emitter:
    """Writes vector code at the place where an IR builder stands; addresses are 64-bit integers, offsets bytes.

    Vectors that it makes itself have ``lanes`` lanes.
    """

    def __init__(self, builder: ir.IRBuilder, lanes: int = LANES) -> None:
        self.builder, self.lanes = builder, lanes

    def vector(self, element: ir.Type) -> ir.VectorType:
        """The type of its vectors of such elements."""
        return ir.VectorType(element, self.lanes)

    def offset(self, address: ir.Value, index: ir.Value | int, stride: ir.Value | int = 1) -> ir.Value:
        """``address + index * stride``."""
        count, step = (ir.Constant(I64, number) if isinstance(number, int) else number for number in (index, stride))
        return self.builder.add(address, self.builder.mul(count, step))

    def load(self, address: ir.Value, kind: ir.Type, align: int = F32_BYTES) -> ir.Value:
        """A scalar or vector from memory."""
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=align)

    def store(self, value: ir.Value, address: ir.Value, align: int = F32_BYTES) -> None:
        """A scalar or vector to memory."""
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=align)

    def store_lanes(self, value: ir.Value, address: ir.Value, count: ir.Value) -> None:
        """Store the first ``count`` lanes of a vector; none where it is not positive."""
        if not target_features() & _MASK_FEATURES:
            self._store_lanes_in_turn(value, address, count)
            return
        lanes = value.type.count
        name = f"llvm.masked.store.v{lanes}{value.type.element.intrinsic_name}.p0"
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        call(self.builder, name, ir.VoidType(), value, pointer, ir.Constant(I32, 2), self._first_lanes(lanes, count))

    def load_lanes(self, kind: ir.Type, address: ir.Value, count: ir.Value, align: int) -> ir.Value:
        """A vector of which only the first ``count`` lanes are read, and the others are zero."""
        if not target_features() & _MASK_FEATURES:
            return self._load_lanes_in_turn(kind, address, count, align)
        lanes = kind.count
        name = f"llvm.masked.load.v{lanes}{kind.element.intrinsic_name}.p0"
        pointer = self.builder.inttoptr(address, kind.as_pointer())
        return call(
            self.builder,
            name,
            kind,
            pointer,
            ir.Constant(I32, align),
            self._first_lanes(lanes, count),
            constant(kind, 0),
        )

    def _first_lanes(self, lanes: int, count: ir.Value) -> ir.Value:
        numbers = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
        return self.builder.icmp_signed("<", numbers, _spread(self.builder, self.builder.trunc(count, I32), lanes))

    def _store_lanes_in_turn(self, value: ir.Value, address: ir.Value, count: ir.Value) -> None:
        """Where LLVM would write a branch for each lane: all at once, or a loop over those that are wanted."""
        builder, step = self.builder, _bytes_of(value.type.element)

        def one_lane(lane: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            self.store(builder.extract_element(value, lane), self.offset(address, lane, step), 2)
            return []

        with builder.if_else(builder.icmp_signed(">=", count, ir.Constant(I64, value.type.count))) as (whole, part):
            with whole:
                self.store(value, address, 2)
            with part, builder.if_then(builder.icmp_signed(">", count, ir.Constant(I64, 0))):
                self.count(count, [], one_lane)

    def _load_lanes_in_turn(self, kind: ir.Type, address: ir.Value, count: ir.Value, align: int) -> ir.Value:
        builder, step, zero = self.builder, _bytes_of(kind.element), constant(kind, 0)

        def one_lane(lane: ir.Value, loaded: list[ir.Value]) -> list[ir.Value]:
            element = self.load(self.offset(address, lane, step), kind.element, align)
            return [builder.insert_element(loaded[0], element, lane)]

        with builder.if_else(builder.icmp_signed(">=", count, ir.Constant(I64, kind.count))) as (whole, part):
            with whole:
                choices = [(self.load(address, kind, align), builder.block)]
            with part:
                before = builder.block
                with builder.if_then(builder.icmp_signed(">", count, ir.Constant(I64, 0))):
                    (some,) = self.count(count, [zero], one_lane)
                    loop = builder.block
                choices.append((_either(builder, [(zero, before), (some, loop)]), builder.block))
        return _either(builder, choices)

    def splat(self, scalar: ir.Value) -> ir.Value:
        """A vector of one scalar."""
        return _spread(self.builder, scalar, self.lanes)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """``a * b + c`` of vectors, rounded once."""
        return call(self.builder, f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)

    def folded(self, vector: ir.Value, join: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        """The 16 lanes of a float32 vector joined pairwise, the upper half onto the lower, down to one."""
        half = LANES // 2
        while half:
            picks = ir.Constant(I32S, [(lane + half) % LANES for lane in range(LANES)])
            vector = join(vector, self.builder.shuffle_vector(vector, ir.Constant(F32S, ir.Undefined), picks))
            half //= 2
        return self.builder.extract_element(vector, ir.Constant(I32, 0))

    def prefetch(self, address: ir.Value) -> None:
        """Ask for a cache line that will be read soon, in the second-level cache; any address may be asked for."""
        read, second, data = ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)
        pointer = self.builder.inttoptr(address, I8.as_pointer())
        call(self.builder, "llvm.prefetch.p0", ir.VoidType(), pointer, read, second, data)

    def widened(self, bits: ir.Value) -> ir.Value:
        """bfloat16 bits as float32, scalar or vector of 16."""
        wide, result = (I32S, F32S) if isinstance(bits.type, ir.VectorType) else (I32, F32)
        return self.builder.bitcast(self.builder.shl(self.builder.zext(bits, wide), constant(wide, 16)), result)

    def from_half(self, bits: ir.Value) -> ir.Value:
        """Bits of finite float16 (int16, scalar or vector) as float32; exact."""
        wide, half, single = (_like(bits.type, element) for element in (I32, F16, F32))
        if target_features() & _HALF_FEATURES:
            return self.builder.fpext(self.builder.bitcast(bits, half), single)
        # Without such an instruction LLVM calls a library that may not be there.  Exponents differ by 112.
        bits = self.builder.zext(bits, wide)
        sign = self.builder.shl(self.builder.and_(bits, constant(wide, 0x8000)), constant(wide, 16))
        size = self.builder.shl(self.builder.and_(bits, constant(wide, 0x7FFF)), constant(wide, 13))
        scaled = self.builder.fmul(self.builder.bitcast(size, single), constant(single, 2.0**112))
        return self.builder.bitcast(self.builder.or_(self.builder.bitcast(scaled, wide), sign), single)

    def rounded(self, value: ir.Value) -> ir.Value:
        """Bits of the nearest bfloat16, ties to even, scalar or vector of 16; NaN stays NaN.  The same as `math.store_bf16`."""
        builder = self.builder
        wide, narrow = (I32S, I16S) if isinstance(value.type, ir.VectorType) else (I32, I16)
        bits, half = builder.bitcast(value, wide), constant(wide, 16)
        high = builder.lshr(bits, half)
        tie = builder.add(builder.and_(high, constant(wide, 1)), constant(wide, 0x7FFF))
        nearest = builder.lshr(builder.add(bits, tie), half)
        is_nan = builder.fcmp_unordered("uno", value, value)
        return builder.trunc(builder.select(is_nan, builder.or_(high, constant(wide, 0x40)), nearest), narrow)

    def for_each_number(self, number: ir.Value, values: Iterable[int], body: Callable[[int], None]) -> None:
        """Code of its own for each of some values that ``number`` may have; nothing is done for any other."""
        done = self.builder.append_basic_block("done")
        choice = self.builder.switch(number, done)
        for n in values:
            block = self.builder.append_basic_block(f"rows{n}")
            choice.add_case(ir.Constant(I64, n), block)
            self.builder.position_at_end(block)
            body(n)
            self.builder.branch(done)
        self.builder.position_at_end(done)

    def count(self, stop: ir.Value, start: Sequence[ir.Value], body: Body) -> list[ir.Value]:
        """A loop ``i = 0 .. stop - 1`` (at least once) that carries values; returns the last ones."""
        builder = self.builder
        before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        index = builder.phi(I64)
        carried = [builder.phi(value.type) for value in start]
        following = body(index, list(carried))
        next_index = builder.add(index, ir.Constant(I64, 1))
        for phi, first, next_ in zip([index, *carried], [ir.Constant(I64, 0), *start], [next_index, *following]):
            phi.add_incoming(first, before)
            phi.add_incoming(next_, builder.block)
        builder.cbranch(builder.icmp_signed("<", next_index, stop), loop, after)
        builder.position_at_end(after)
        return following
