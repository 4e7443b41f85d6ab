"""Finds out by trying what a model's attention does: which layers there are, what they store and what they may see.

The model runs a few tokens with an attention that lets every token see itself alone.  What reaches that attention (the
shapes, the mask that transformers would have built, further arguments) describes the layer; what a row shows of other
rows, with attention cut out, is state that pages of keys and values do not hold.  So models that Helix cannot serve are
refused by what they do, not by a list of names.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.groups import LayerShape, LayerUse
from helix_gateway.runtime.remembered import Remembered

_NAME = "helix_probe"
_REMEMBERED_AS = "attention_layers"
# Arguments of an attention function that change nothing here: no training, no cache, positions already applied.
_HARMLESS = frozenset({"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions"})
_HONOURED = frozenset({"scaling", "softcap", "sliding_window"})
# How far beyond its row's own numbers a probe may see rounding (a product of another blocking), relative.
_SAME = 1e-3

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | bool]


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention module of a model, and what it stores and sees."""

    module: nn.Module
    use: LayerUse


class ModelProbe(NamedTuple):
    """What trying a model out has shown."""

    layers: tuple[AttentionLayer, ...]
    """In the order in which the model calls them."""
    vocab_size: int
    """How many logits a row has."""


@dataclass(slots=True)
class _Call:
    """What one layer handed to its attention."""

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: MaskFunction | None
    arguments: dict[str, Any]


@dataclass(slots=True)
class _Recorder:
    calls: list[_Call] = field(default_factory=list)


def find_attention_layers(model: PreTrainedModel) -> ModelProbe:
    """The attention layers of a model in evaluation mode.

    Raises:
        ModelLoadError: something in the model goes past attention over keys and values, or asks of it what the paged
            attention does not do.
    """
    name = type(model).__name__
    if getattr(model, "_is_stateful", False):
        raise ModelLoadError(
            f"{name} is not served: it keeps a recurrent state, which pages of keys and values do not hold."
        )
    calls, logits = _probe(name, model, [1, 2, 3])
    _check_layers(name, model, calls)
    others, _ = _probe(name, model, [4, 2, 5])
    _check_rows_alone(name, calls, others)
    layers = tuple(AttentionLayer(call.module, LayerUse(_shape_of(name, call), call.query.shape[1])) for call in calls)
    return ModelProbe(layers, int(logits.shape[-1]))


def known_attention_layers(model: PreTrainedModel, remembered: Remembered) -> ModelProbe:
    """As `find_attention_layers`, without trying where it is known already."""
    known = _named_layers(model, remembered.get(_REMEMBERED_AS))
    if known is not None:
        return known
    probe = find_attention_layers(model)
    names = {module: name for name, module in model.named_modules()}
    layers = [[names[layer.module], layer.use.heads, asdict(layer.use.shape)] for layer in probe.layers]
    remembered.put(_REMEMBERED_AS, {"layers": layers, "vocab_size": probe.vocab_size})
    return probe


def _named_layers(model: PreTrainedModel, known: Any) -> ModelProbe | None:
    modules = dict(model.named_modules())
    if known is None or not all(name in modules for name, *_ in known["layers"]):
        return None
    layers = [
        AttentionLayer(modules[name], LayerUse(LayerShape(**shape), heads)) for name, heads, shape in known["layers"]
    ]
    return ModelProbe(tuple(layers), known["vocab_size"])


def _probe(name: str, model: PreTrainedModel, token_ids: list[int]) -> tuple[list[_Call], torch.Tensor]:
    """Run the model with self-only attention; a 2-D mask keeps transformers from looking for packed sequences."""
    device = next(model.parameters()).device
    ids = torch.tensor([token_ids], device=device)
    positions = torch.arange(len(token_ids), device=device)[None]
    recorder = _Recorder()
    try:
        with _recording(model, recorder), torch.inference_mode():
            output = model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception as error:
        said = str(error).partition("\n")[0]
        raise ModelLoadError(f"{name} is not served: a trial run fails with {type(error).__name__}: {said}") from error
    return recorder.calls, output.logits


@contextmanager
def _recording(model: PreTrainedModel, recorder: _Recorder) -> Iterator[None]:
    """Route the model's attention into the recorder."""

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **arguments: Any,
    ) -> tuple[torch.Tensor, None]:
        recorder.calls.append(_Call(module, query, key, value, attention_mask, arguments))
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, _keep_mask_function)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _keep_mask_function(*, mask_function: MaskFunction, **_: Any) -> MaskFunction:
    """Stand-in for a mask: the rule that it would have been made from."""
    return mask_function


def _check_layers(name: str, model: PreTrainedModel, calls: list[_Call]) -> None:
    layers = model.config.get_text_config().num_hidden_layers
    modules = {id(call.module) for call in calls}
    if len(calls) != layers or len(modules) != layers:
        raise ModelLoadError(
            f"{name} is not served: {len(modules)} of its {layers} layers run their attention through transformers' "
            "AttentionInterface, once each; layers with a recurrent state or an attention of their own need an adapter "
            "that Helix does not have."
        )


def _check_rows_alone(name: str, calls: list[_Call], others: list[_Call]) -> None:
    """Two probes differ in all rows but one; that row must not notice."""
    for call, other in zip(calls, others, strict=True):
        for here, there in ((call.query, other.query), (call.key, other.key), (call.value, other.value)):
            a, b = here[:, :, 1].float(), there[:, :, 1].float()
            if not bool((a - b).abs().max() <= _SAME * a.abs().max()):
                raise ModelLoadError(
                    f"{name} is not served: its tokens see one another outside of attention (a recurrent state, or a "
                    "convolution), which pages of keys and values do not hold."
                )


def _shape_of(name: str, call: _Call) -> LayerShape:
    unknown = sorted(
        key
        for key, value in call.arguments.items()
        if key not in _HARMLESS | _HONOURED and value is not None and value is not False
    )
    if unknown:
        raise ModelLoadError(f"{name} is not served: its attention asks for {', '.join(unknown)}.")
    window = _window_of(name, call.mask)
    told = call.arguments.get("sliding_window")
    if told is not None and told != window:
        spans = "all tokens" if window is None else f"{window} tokens"
        raise ModelLoadError(f"{name} is not served: a layer's mask spans {spans}, its attention asks for {told}.")
    return LayerShape(call.key.shape[1], call.key.shape[3], call.value.shape[3], window)


def _window_of(name: str, mask: MaskFunction | None) -> int | None:
    """The window of a layer's mask rule.

    Raises:
        ModelLoadError: the rule is neither causal nor causal with a window (chunks, both directions).
    """
    if mask is None:
        return None
    if not callable(mask):
        raise ModelLoadError(f"{name} is not served: it builds attention masks of its own.")
    far = 1 << 30
    if _sees(mask, far, far + 1) or not _sees(mask, far, far):
        raise ModelLoadError(f"{name} is not served: its attention is not causal.")
    if _sees(mask, far, 0):
        return None
    window = _first_unseen(mask, far)
    for query in (far + 1, far + window // 2, far + window, 2 * window + 1):
        if not _sees(mask, query, query - window + 1) or _sees(mask, query, query - window):
            raise ModelLoadError(f"{name} is not served: its attention sees chunks, not a window.")
    return window


def _first_unseen(mask: MaskFunction, query: int) -> int:
    """The least distance at which ``query`` no longer sees, by bisection."""
    seen, unseen = 0, query
    while unseen - seen > 1:
        middle = (seen + unseen) // 2
        seen, unseen = (middle, unseen) if _sees(mask, query, query - middle) else (seen, middle)
    return unseen


def _sees(mask: MaskFunction, query: int, key: int) -> bool:
    zero = torch.tensor(0)
    return bool(mask(zero, zero, torch.tensor(query), torch.tensor(key)))
