"""The models that lie on this machine: the default model and the hub's snapshots; what each takes, and its removal.

The hub's cache is huggingface_hub's, shared with every other program that uses it.  Imports neither torch nor
transformers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.runtime.checkpoints import layout
from helix_gateway.runtime.sources.default_model import DEFAULT_MODEL, default_model_path
from helix_gateway.runtime.sources.model_facts import ModelFacts, read_facts

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, CachedRevisionInfo, HFCacheInfo

_MAIN = "main"


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One model that `resolve` would find without asking anybody."""

    name: str
    """By which a command may name it."""
    path: Path
    """A GGUF file, or a folder."""
    size_bytes: int
    """On the disk; snapshots of one repository may share files."""
    repo: str | None
    """Of the hub; None: the default model."""
    revision: str | None
    """The commit of the hub; None: the default model."""

    def facts(self) -> ModelFacts:
        """What its files tell.

        Raises:
            ModelLoadError: they are damaged or not all there.
        """
        return read_facts(self.path)


@dataclass(frozen=True, slots=True)
class Removal:
    """What a removal would take away."""

    names: list[str]
    size_bytes: int
    """That the disk gets back."""
    remove: Callable[[], object]


def cached_models() -> list[CachedModel]:
    """Every model of the cache that has weights in a format that Helix reads, by name."""
    return sorted([*_default(), *_of_hub()], key=lambda model: model.name.lower())


def find(name: str) -> list[CachedModel]:
    """The cached models that a name means: one, or for ``org/name`` all of that repository.

    Raises:
        ModelLoadError: there is none; the message names those there are.
    """
    models = cached_models()
    wanted = name.lower()
    found = [model for model in models if wanted in {model.name.lower(), (model.repo or "").lower()}]
    if not found:
        names = ", ".join(model.name for model in models) or "nothing"
        raise ModelLoadError(f"{name} is not in the cache, which holds: {names}.")
    return found


def local_model(path: Path) -> CachedModel:
    """A file or folder that lies elsewhere, as if it were in the cache."""
    files = [path] if path.is_file() else [entry for entry in path.iterdir() if entry.is_file()]
    return CachedModel(path.name, path.absolute(), sum(file.stat().st_size for file in files), None, None)


def plan_removal(models: list[CachedModel]) -> Removal:
    """What removing these takes: for the hub whole snapshots, with whatever else lies in them."""
    if models[0].repo is None:
        (model,) = models
        return Removal([model.name], model.size_bytes, model.path.unlink)
    cache = _scan()
    assert cache is not None
    revisions = {model.revision for model in models if model.revision is not None}
    strategy = cache.delete_revisions(*revisions)
    names = [model.name for model in _of_hub() if model.revision in revisions]
    return Removal(names, strategy.expected_freed_size, strategy.execute)


def _default() -> Iterator[CachedModel]:
    path = default_model_path()
    if path.is_file():
        yield CachedModel(DEFAULT_MODEL, path, path.stat().st_size, None, None)


def _of_hub() -> Iterator[CachedModel]:
    cache = _scan()
    for repo in cache.repos if cache is not None else ():
        if repo.repo_type == "model":
            for revision in repo.revisions:
                yield from _of_snapshot(repo, revision)


def _scan() -> "HFCacheInfo | None":
    """None where there is no cache of the hub at all."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return scan_cache_dir()
    except CacheNotFound:
        return None


def _of_snapshot(repo: "CachedRepoInfo", revision: "CachedRevisionInfo") -> Iterator[CachedModel]:
    """The folder as one model where it has a configuration, and otherwise each GGUF file of its own."""
    suffix = "" if _MAIN in revision.refs else f"@{next(iter(sorted(revision.refs)), revision.commit_hash)}"
    root = revision.snapshot_path
    names = {entry.name for entry in root.iterdir()}
    if layout.CONFIG in names and names & {layout.SINGLE, layout.INDEX}:
        yield CachedModel(repo.repo_id + suffix, root, revision.size_on_disk, repo.repo_id, revision.commit_hash)
    for file in revision.files:
        if file.file_name.endswith(".gguf"):
            inside = file.file_path.relative_to(root).as_posix()
            name = f"{repo.repo_id}/{inside}{suffix}"
            yield CachedModel(name, file.file_path, file.size_on_disk, repo.repo_id, revision.commit_hash)
