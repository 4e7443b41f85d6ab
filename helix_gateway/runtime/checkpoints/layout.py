"""Which files of a Hugging Face folder hold a model's weights, and whether they are all there.

Knows the layout's file names only: not what a tensor is, nor where a folder came from.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from helix_gateway.core.errors import ModelLoadError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder.

    Raises:
        ModelLoadError: there is no config, no safetensors, or a shard is missing.
    """
    if not (folder / CONFIG).is_file():
        raise ModelLoadError(f"{folder} is not a model folder: it has no {CONFIG}.")
    if (folder / INDEX).is_file():
        return _shards(folder)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise ModelLoadError(why_no_weights(str(folder), {entry.name for entry in folder.iterdir()}))


def shard_names(index: Path) -> set[str]:
    """Return the names of the files that an index spreads the weights over."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index} names no weights.")
    return {str(name) for name in weight_map.values()}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        ModelLoadError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"Cannot read {path}: {error}.") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} does not hold a JSON object.")
    return content


def why_no_weights(where: str, names: Collection[str]) -> str:
    """One line on why a model without the safetensors files of this layout is not loaded."""
    if any(name.endswith(_PICKLES) for name in names):
        return (
            f"{where} has its weights as pickle files only, which can run any code when they are opened: "
            f"Helix reads safetensors. Convert the model, or use one that ships {SINGLE}."
        )
    return f"{where} has no weights: neither {SINGLE} nor {INDEX}."


def _shards(folder: Path) -> list[Path]:
    names = sorted(shard_names(folder / INDEX))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelLoadError(f"{folder} lacks {len(missing)} of its {len(names)} weight files, such as {missing[0]}.")
    return [folder / name for name in names]
