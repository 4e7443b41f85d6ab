"""The quantised weights of a Llama or a relative, and a step's memory, handed to `quantised_step.py` as it wants them.

Which models those are, `structures.py` says.
"""

from collections.abc import Sequence

import numpy as np
import torch

from helix_gateway.core.step import StepBatch
from helix_gateway.runtime.cpu.angle_tables import AngleTables
from helix_gateway.runtime.cpu.attention import CpuPagedAttention
from helix_gateway.runtime.cpu.joined_tiles import join_tiles
from helix_gateway.runtime.cpu.layers import Angles
from helix_gateway.runtime.cpu.linear import PackedEmbedding, PackedLinear
from helix_gateway.runtime.cpu.parts import LayerParts, Parts
from helix_gateway.runtime.cpu.quantised_kernels import FORMATS, GROUP_INPUTS
from helix_gateway.runtime.cpu.quantised_products import tile_kernel
from helix_gateway.runtime.cpu.quantised_rows import num_groups, rows_bytes
from helix_gateway.runtime.cpu.quantised_step import (
    CHANGE_NORMS,
    FIELDS,
    LAYER_STAGES,
    MATRIX_FIELDS,
    NORMS,
    Model,
    Rows,
    Scratch,
    link_work,
    run_step,
)
from helix_gateway.runtime.cpu.quantised_weights import QuantisedWeight
from helix_gateway.runtime.cpu.threads import configure_threads
from helix_gateway.runtime.cpu.weight_memory import WeightMemory, room_for
from helix_gateway.runtime.cpu.work_sharing import new_counts
from helix_gateway.runtime.heap import return_freed_blocks
from helix_gateway.runtime.pages import Int64s


def is_quantised_alike(parts: Parts) -> bool:
    """Whether a Llama-like model's matrices are all quantised, and those that are joined in one format."""
    products = [together for layer in parts.layers for together in layer.products]
    joined = [[part.weight_tiles for part in together] for together in (*products, (parts.head,))]
    alike = all(isinstance(weight, QuantisedWeight) for weights in joined for weight in weights)
    return (
        alike
        and all(len({type(weight) for weight in weights}) == 1 for weights in joined)
        and isinstance(parts.embedding, PackedEmbedding)
    )


class QuantisedLlamaStep:
    """The forward of a quantised Llama-like model over the pages of its attention.

    Args:
        parts: the model, quantised alike; its layers' weights are joined in place.
        attention: the runner's.
    """

    def __init__(self, parts: Parts, attention: CpuPagedAttention) -> None:
        structure, head, embedding = parts.structure, parts.head, parts.embedding
        assert isinstance(embedding, PackedEmbedding)
        self._attention, self._structure = attention, structure
        self._tables = AngleTables(parts.rotary, structure.rotary_kinds)
        self._kept: list[torch.Tensor] = []
        """Memory that the compiled step knows by address only."""
        matrices = [together for layer in parts.layers for together in layer.products]
        # No list of what is moved: each is let go as soon as it lies in its new place.
        self._weights = WeightMemory(
            sum(room_for(part.weight_tiles.tiles) for together in (*matrices, (head,)) for part in together)
        )
        layers = np.array([self._describe(parts.layers, number) for number in range(len(parts.layers))], np.int64)
        last = self._describe_head(parts)
        return_freed_blocks()
        self._model = Model(
            layers,
            # After the head has been moved, which may be the same matrix.
            np.array([*_quantised(embedding).operand, 0], np.int64),
            last,
            self._kernels(layers, last),
            structure.activation,
            structure.scaling,
            np.float32(structure.softcap),
            np.float32(structure.eps),
            np.float32(structure.residual),
            np.float32(structure.embedding),
            np.float32(structure.logits_softcap),
        )
        self._memory = _Memory(parts.layers[0], head)
        self._is_linked = False
        """Once is enough: whatever a batch holds, all that a step is handed has the same types as at the first."""

    def _describe(self, layers: Sequence[LayerParts], number: int) -> list[int]:
        norms = layers[number].norms
        before = None if number == 0 else layers[number - 1].norms.after_mlp
        fields = [field for together in layers[number].products for field in self._matrix(together)]
        fields += [self._norm(norm, self._structure.residual) for norm in (before, norms.after_attention)]
        fields += [self._norm(norm) for norm in (norms.before_attention, norms.before_mlp)]
        for norm in (norms.query, norms.key):
            fields += [self._norm(norm), 0 if norm is None else norm.numel()]
        fields += [self._attention.plan_of[number], self._tables.kind_of[number]]
        assert len(fields) == FIELDS
        return fields

    def _describe_head(self, parts: Parts) -> Int64s:
        fields = np.zeros(FIELDS, np.int64)
        fields[:MATRIX_FIELDS] = self._matrix((parts.head,))
        fields[CHANGE_NORMS] = self._norm(parts.layers[-1].norms.after_mlp, self._structure.residual)
        fields[NORMS] = self._norm(parts.norm, self._structure.logits)
        return fields

    @staticmethod
    def _kernels(layers: Int64s, last: Int64s) -> Int64s:
        """By format, compiled for those that there are."""
        used = {*layers[:, : 4 * MATRIX_FIELDS : MATRIX_FIELDS].ravel().tolist(), int(last[0])}
        return np.array([tile_kernel(kind) if kind in used else 0 for kind in FORMATS], np.int64)

    def _norm(self, norm: torch.Tensor | None, factor: float = 1.0) -> int:
        """The address of a norm's weights, each times a factor that follows it; 0 where there is no norm."""
        return 0 if norm is None else self._keep((norm * factor).contiguous())

    def _matrix(self, parts: tuple[PackedLinear, ...]) -> list[int]:
        """The fields of a matrix, that of some linear layers joined."""
        tiles = self._kept_tensor(join_tiles(parts, self._weights))
        kind, _, tile_bytes, groups, _ = _quantised(parts[0]).operand
        # Rows are quantised by their width, with no room for groups that only pad (`reading.py` refuses such widths).
        assert groups * GROUP_INPUTS == parts[0].in_features
        bias = self._keep(torch.cat([part.bias_values for part in parts]))
        return [kind, tiles.data_ptr(), tile_bytes, groups, sum(part.out_features for part in parts), bias]

    def _keep(self, tensor: torch.Tensor) -> int:
        return self._kept_tensor(tensor).data_ptr()

    def _kept_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        self._kept.append(tensor)
        return tensor

    def __call__(self, batch: StepBatch) -> torch.Tensor:
        """Logits [num_rows, vocab_size] of ``batch.logits_rows``, float32."""
        plans, pages = self._attention.all_steps()
        threads = configure_threads()
        # Any other array, one that may not be written to too, is another type to numba, for which nothing is linked.
        rows = Rows(*(np.require(ids, np.int32, ["C", "W"]) for ids in (batch.token_ids, batch.logits_rows)))
        logits = torch.empty(len(rows.wanted), self._memory.vocab_size)
        most = max(len(rows.tokens), len(rows.wanted))
        scratch = self._memory.scratch(most, len(self._model.layers), threads, logits)
        angles = self._angles(int(batch.context_lens.max()))
        step = (self._model, plans, pages, rows, scratch, angles)
        if not self._is_linked:
            link_work(*step)
            self._is_linked = True
        run_step(threads, *step)
        return logits

    def _angles(self, longest: int) -> Angles:
        return self._tables.reaching(longest)


def _quantised(part: PackedLinear | PackedEmbedding) -> QuantisedWeight:
    weight = part.weight_tiles
    assert isinstance(weight, QuantisedWeight)
    return weight


class _Memory:
    """The scratch of a model's steps, kept from step to step and made anew only for more rows than ever before."""

    def __init__(self, layer: LayerParts, head: PackedLinear) -> None:
        qkv, out, gate_up, down = layer.products
        self._width = out[0].out_features
        self._attended = out[0].in_features
        self._most = max(sum(part.out_features for part in parts) for parts in (qkv, gate_up))
        self._most_groups = num_groups(max(self._width, self._attended, down[0].in_features))
        self.vocab_size = head.out_features
        self._rows = 0
        self._kept: list[torch.Tensor] = []
        """Of the first fields of `Scratch`, each at the start of a cache line, as torch gives it."""
        self._counts: Int64s = np.zeros((0, 0, 0), np.int64)

    def scratch(self, rows: int, num_layers: int, threads: int, logits: torch.Tensor) -> Scratch:
        """Memory for so many rows, its counts zero."""
        if rows > self._rows:
            # Whatever is refused below, what there was is gone, and nothing may be taken for larger than it is.
            self._rows, self._kept = 0, []
            widths = (self._width, self._width, self._width, self._most, self._attended)
            numbers = [torch.empty(rows, width) for width in widths]
            self._kept = [*numbers, torch.empty(rows_bytes(rows, self._most_groups), dtype=torch.uint8)]
            self._rows = rows
        if self._counts.shape[1] != threads + 1:
            self._counts = new_counts(num_layers * LAYER_STAGES + 2, threads)
        self._counts[:] = 0
        hidden, chosen, change, product, attended, quantised = (tensor.data_ptr() for tensor in self._kept)
        return Scratch(
            hidden=hidden,
            chosen=chosen,
            change=change,
            product=product,
            attended=attended,
            quantised=quantised,
            logits=logits.data_ptr(),
            width=self._width,
            attended_width=self._attended,
            counts=self._counts,
        )
