"""Models from a Hugging Face hub: which files of a repository are needed, and a clear line for what goes wrong.

Downloading, resuming and caching are huggingface_hub's, with its own cache folder, settings (``HF_ENDPOINT``,
``HF_TOKEN``, ``HF_HOME``, ``HF_HUB_OFFLINE``) and progress bars.  Knows nothing about tensors.
"""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.checkpoints import layout
from helix_gateway.runtime.progress import told_if_long

_HELPERS = (".json", ".txt", ".model", ".jinja")
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class HubModel:
    """What a hub id asks for."""

    repo: str
    """``org/name``"""
    revision: str | None = None
    file: str | None = None
    """A GGUF file in the repository; None: its safetensors."""

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "")


def fetch(model: HubModel) -> Path:
    """Return the local path of a hub model: a folder, or a GGUF file; downloads what is not cached yet.

    Raises:
        ModelLoadError: unknown, not allowed, unreachable and not cached, or without weights that Helix reads.
    """
    with _explained(model), _shown(model):
        return _fetch_file(model, model.file) if model.file else _fetch_repo(model)


@contextmanager
def _shown(model: HubModel) -> Iterator[None]:
    """huggingface_hub's bars on a terminal; elsewhere a line or two, if it takes long."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if sys.stderr.isatty():
        yield
        return
    disable_progress_bars()
    with told_if_long(f"Getting {model}"):
        yield


def _fetch_file(model: HubModel, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model.repo, name, revision=model.revision))


def _fetch_repo(model: HubModel) -> Path:
    names = _list_files(model)
    if names is None:
        return _cached(model)
    wanted = _wanted_files(model, names)
    if isinstance(wanted, str):
        return _fetch_file(model, wanted)
    return _snapshot(model, wanted)


def _list_files(model: HubModel) -> list[str] | None:
    """Names of the repository's files; None where the hub cannot be asked and only the cache can answer."""
    from huggingface_hub import HfApi, errors

    try:
        siblings = HfApi().model_info(model.repo, revision=model.revision).siblings
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except Exception:  # noqa: BLE001  the HTTP library, and so its errors, differ between huggingface_hub's releases
        return None
    return [entry.rfilename for entry in siblings or ()]


def _cached(model: HubModel) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        model.repo, revision=model.revision, local_files_only=True, allow_patterns=[layout.CONFIG]
    )
    root = {path.name for path in Path(folder).iterdir()}
    if layout.CONFIG not in root:
        return Path(folder) / _lone_gguf(model, root)
    layout.weight_files(Path(folder))
    return Path(folder)


def _snapshot(model: HubModel, names: set[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model.repo, revision=model.revision, allow_patterns=sorted(names)))


def _wanted_files(model: HubModel, names: list[str]) -> set[str] | str:
    """The files that serving needs: a set for a Hugging Face layout, one name for a lone GGUF."""
    root = {name for name in names if "/" not in name}
    helpers = {name for name in root if name.endswith(_HELPERS)}
    if layout.CONFIG in root and layout.INDEX in root:
        return helpers | layout.shard_names(_fetch_file(model, layout.INDEX))
    if layout.CONFIG in root and layout.SINGLE in root:
        return helpers | {layout.SINGLE}
    return _lone_gguf(model, root)


def _lone_gguf(model: HubModel, root: set[str]) -> str:
    files = sorted(name for name in root if name.endswith(".gguf"))
    if not files:
        raise ModelLoadError(layout.why_no_weights(str(model), root))
    if len(files) > 1:
        shown = ", ".join(files[:_SHOWN]) + (", ..." if len(files) > _SHOWN else "")
        raise ModelLoadError(f"{model} has several GGUF files; name one, as {model.repo}/{files[0]}: {shown}.")
    return files[0]


@contextmanager
def _explained(model: HubModel) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line."""
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:  # the HTTP library, and so its errors, differ between releases of huggingface_hub
        raise ModelLoadError(_explain(model, error)) from error


def _explain(model: HubModel, error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"{model} is gated: accept its terms at {constants.ENDPOINT}/{model.repo} and set HF_TOKEN."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"There is no model {model.repo} at {constants.ENDPOINT} (if it is private, set HF_TOKEN)."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model.repo} has no revision {model.revision}."
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"{constants.ENDPOINT} cannot be reached, and {model} is not in the local cache."
    if isinstance(error, errors.EntryNotFoundError):
        return f"{model} has no file {model.file}."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"The disk is full: {model} does not fit into {constants.HF_HUB_CACHE}."
    return f"Cannot download {model}: {type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
