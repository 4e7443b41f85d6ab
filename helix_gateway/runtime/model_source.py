"""From what a user calls a model to a path on this machine: the default model, a file, a folder, or a hub id.

Knows nothing about what a model holds, and imports neither torch nor transformers, so that a command can get its
model (or say why not) before it pays for those.
"""

import re
from pathlib import Path

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.checkpoints.layout import weight_files
from helix_gateway.runtime.progress import Progress, terminal_bar
from helix_gateway.runtime.sources.default_model import DEFAULT_MODEL, fetch_default_model

_DEFAULT_NAMES = {"smollm2", DEFAULT_MODEL.lower()}
_PART = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[\w./-]+)|/(?P<file>[\w./-]+\.gguf))?")


def resolve(name: str | None, *, progress: Progress = terminal_bar) -> str:
    """Return the local path of a GGUF file, or of a folder in Hugging Face layout.

    Args:
        name: None or ``"smollm2"``: the default model.  A ``.gguf`` file or a folder: itself.  Otherwise a hub id,
            ``org/name``, ``org/name@revision`` or ``org/name/file.gguf``.
        progress: shown while the default model is downloaded; for the hub, huggingface_hub draws its own bars.

    Raises:
        ModelLoadError: there is no such model, or it cannot be fetched; the message is one line.
    """
    if name is None or name.lower() in _DEFAULT_NAMES:
        return str(fetch_default_model(progress))
    path = Path(name).expanduser()
    if path.exists():
        return str(_checked(path))
    return str(_fetch_from_hub(name))


def served_name(name: str | None) -> str:
    """Return what clients call a model that was named so: a hub id without revision, or the file's or folder's name."""
    if name is None or name.lower() in _DEFAULT_NAMES:
        return DEFAULT_MODEL
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve().name
    if path.suffix.lower() == ".gguf":
        return path.stem
    hub_id = _HUB_ID.fullmatch(name)
    return hub_id["repo"] if hub_id else path.name


def _checked(path: Path) -> Path:
    if path.is_dir():
        weight_files(path)
    elif path.suffix.lower() != ".gguf":
        raise ModelLoadError(f"{path} is neither a .gguf file nor a model folder.")
    return path.absolute()


def _fetch_from_hub(name: str) -> Path:
    hub_id = _HUB_ID.fullmatch(name)
    looks_local = name.startswith((".", "~")) or Path(name).is_absolute()
    if looks_local or hub_id is None:
        raise ModelLoadError(
            f"There is no file or folder {name!r}, and it is not a hub id (org/name, org/name@revision or "
            f"org/name/file.gguf). The default model is called smollm2."
        )
    from helix_gateway.runtime.sources.hub import HubModel, fetch

    return fetch(HubModel(hub_id["repo"], hub_id["revision"], hub_id["file"]))
