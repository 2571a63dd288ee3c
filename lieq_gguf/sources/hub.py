"""Downloads models from the Hugging Face hub by name, with its own client: its cache, its token, its settings."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from lieq_gguf import __version__
from lieq_gguf.errors import SourceError
from lieq_gguf.progress import Progress
from lieq_gguf.sources.model_directory import read_supported_config
from lieq_gguf.sources.weight_files import INDEX_FILE, WEIGHTS_FILE, read_index

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_CONFIG = "config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json")
_SMALL_FILES = (
    _CONFIG, *_TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "processor_config.json",
    "generation_config.json", "README.md",
)  # fmt: skip
_PART = r"\w(?:[\w.-]*\w)?"
_NAME = re.compile(rf"(?!.*(?:--|\.\.)){_PART}/{_PART}", re.ASCII)
_NO_NAMES = (".gguf", ".safetensors", ".json", ".git")
_UNAUTHORIZED, _FORBIDDEN, _TOO_MANY_REQUESTS, _SERVER_ERRORS = 401, 403, 429, 500
_N_SHOWN = 6  # file names in a message


def is_hub_name(source: str) -> bool:
    """Whether a source is the name of a model on the hub, ``owner/name``, and not an existing path.

    Names without an owner do not count: the few such models are of no supported family, and a mistyped directory should
    not cause a network request.
    """
    return _NAME.fullmatch(source) is not None and not source.endswith(_NO_NAMES) and not Path(source).exists()


def fetch(name: str, revision: str | None, progress: Progress) -> Path:
    """Download what a conversion needs from a model, unless the hub's cache has it.

    File list, configuration and tokenizer come first, so that no weights are downloaded for a model that cannot be
    converted. Without a network, or with ``HF_HUB_OFFLINE`` set, only the cache is used.

    Args:
        name: ``owner/name``.
        revision: Branch, tag or commit; None for the main branch.
        progress: Where the stage ``download`` is timed.

    Returns:
        The directory of the snapshot in the cache.

    Raises:
        SourceError: if the model or one of its files cannot be downloaded; finished files stay in the cache.
        ArchitectureError: if the architecture is not supported.
    """
    from huggingface_hub import HfApi

    # One file after the other in this thread: the client's own pool would finish all files before it reacts to Ctrl-C.
    model = _HubModel(HfApi(library_name="lieq-gguf", library_version=__version__), name, revision)
    with progress.stage("download", "Downloading"):
        try:
            commit, files = model.list_files()
        except _UnreachableError as error:
            folder = model.cached()
            if folder is None:
                raise
            if not error.is_intended:
                progress.note(f"{error.reason}; using the copy in its cache")
            return folder
        _require_model(name, files)
        with _bars(shown=False):
            # by branch or tag first, so that the cache knows its commit when the hub cannot be reached
            model.get(_CONFIG, revision)
            folder = model.get(_CONFIG, commit).parent
            read_supported_config(folder)
            weights: Sequence[str] = (WEIGHTS_FILE,)  # if there are both, it is what transformers loads
            if WEIGHTS_FILE not in files:
                weights = sorted(set(read_index(model.get(INDEX_FILE, commit)).values()))
            missing = [shard for shard in weights if shard not in files]
            if missing:
                raise SourceError(f"{name} lacks {_some(missing)}, named in its {INDEX_FILE}; ask its owner")
            # which is read only where there is no tokenizer.json, and as large
            unread = "tekken.json" if "tokenizer.json" in files else ""
            for file in files:
                if file != unread and any(fnmatchcase(file, pattern) for pattern in _SMALL_FILES):
                    model.get(file, commit)
            n_bytes = sum(model.missing_bytes(shard, commit) for shard in weights)
        if n_bytes:
            model.check_space(n_bytes)
            progress.note(f"downloading {_gigabytes(n_bytes)} of weights for {name} to {model.cache}")
        with _bars(shown=not progress.silent):
            for shard in weights:
                model.get(shard, commit)
        return folder


def _require_model(name: str, files: Sequence[str]) -> None:
    """Refuse a repository without what every model has.

    Raises:
        SourceError: naming what is missing.
    """
    if _CONFIG not in files or not {INDEX_FILE, WEIGHTS_FILE} & set(files):
        raise SourceError(
            f"{name} has no {_CONFIG} with {WEIGHTS_FILE} or {INDEX_FILE}; it has {_some(files)}: "
            "name the repository of the original model"
        )
    if not set(_TOKENIZERS) & set(files):
        raise SourceError(
            f"{name} has no {' or '.join(_TOKENIZERS)}; it has {_some(files)}: name the repository of the original "
            "model, or download both and add the tokenizer"
        )


class _UnreachableError(SourceError):
    """The hub does not answer, or the user works offline.

    Attributes:
        reason: The reason, for a message.
        is_intended: Whether the user chose to work offline.
    """

    def __init__(self, model: _HubModel, reason: str, is_intended: bool = False) -> None:
        again = "check the network and run the command again; it continues where it stopped"
        way_out = "unset it to download" if is_intended else again
        super().__init__(f"{model.name} is not, or not completely, in {model.cache}, and {reason}; {way_out}")
        self.reason = reason
        self.is_intended = is_intended


@dataclass(frozen=True)
class _HubModel:
    """One model, accessed through the client."""

    api: HfApi
    name: str
    revision: str | None

    @property
    def cache(self) -> Path:
        """The client's folder for models."""
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(HF_HUB_CACHE).expanduser()

    def list_files(self) -> tuple[str, tuple[str, ...]]:
        """Commit and files of the revision."""
        from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

        with self._explained():
            info = self.api.model_info(self.name, revision=self.revision, timeout=HF_HUB_ETAG_TIMEOUT)
        if info.sha is None or info.siblings is None:
            raise SourceError(f"{self.api.endpoint} does not list the files of {self.name}; is HF_ENDPOINT right?")
        return info.sha, tuple(sorted(file.rfilename for file in info.siblings))

    def get(self, file: str, revision: str | None) -> Path:
        """A file in the cache, downloaded if it is missing."""
        with self._explained():
            return Path(self.api.hf_hub_download(self.name, file, revision=revision))

    def missing_bytes(self, file: str, commit: str) -> int:
        """Bytes of a file that must be downloaded; 0 if it is in the cache."""
        with self._explained():
            download = self.api.hf_hub_download(self.name, file, revision=commit, dry_run=True)
        return download.file_size or 0 if download.will_download else 0

    def cached(self) -> Path | None:
        """The snapshot in the cache, if it is complete."""
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            config = self.api.hf_hub_download(self.name, _CONFIG, revision=self.revision, local_files_only=True)
        except LocalEntryNotFoundError:
            return None
        folder = Path(config).parent
        index, weights = folder / INDEX_FILE, {WEIGHTS_FILE}
        if index.is_file() and not (folder / WEIGHTS_FILE).is_file():
            weights = set(read_index(index).values())
        has_tokenizer = any((folder / tokenizer).is_file() for tokenizer in _TOKENIZERS)
        return folder if has_tokenizer and all((folder / shard).is_file() for shard in weights) else None

    def check_space(self, n_bytes: int) -> None:
        """Refuse a download that does not fit the disk."""
        place = next(p for p in (self.cache, *self.cache.absolute().parents) if p.exists())
        free = shutil.disk_usage(place).free
        if n_bytes > free:
            raise SourceError(
                f"the weights of {self.name} take {_gigabytes(n_bytes)}, but {self.cache} has {_gigabytes(free)} left; "
                "free some space, or set HF_HOME to a folder on another disk"
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the client's errors into one line that says what to do."""
        # from httpx2, or from httpx before version 2 of the client
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

        try:
            yield
        except (OSError, ValueError, RuntimeError, HTTPError) as error:  # hf_xet raises RuntimeError
            raise self._explanation(error) from error

    def _explanation(self, error: Exception) -> SourceError:
        from huggingface_hub import errors

        name, site = self.name, f"{self.api.endpoint}/{self.name}"
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if isinstance(error, errors.GatedRepoError):
            return SourceError(f"{name} is gated; accept its licence at {site}, then log in: hf auth login")
        if isinstance(error, errors.RepositoryNotFoundError):
            return SourceError(
                f"{name} is neither a directory nor a model of the hub that you may see; check the name and, "
                "if the model is private, log in: hf auth login"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return SourceError(f"{name} has no revision {self.revision}; its branches and tags are at {site}/tree/main")
        if status in (_UNAUTHORIZED, _FORBIDDEN):
            return SourceError(f"the hub refuses your token for {name} ({status}); log in again: hf auth login")
        if isinstance(error, errors.OfflineModeIsEnabled):
            return _UnreachableError(self, "HF_HUB_OFFLINE is set", is_intended=True)
        if isinstance(error, OSError) and error.errno is not None:
            return SourceError(
                f"{name} cannot be stored in {self.cache}: {error.strerror}; free some space, or set HF_HOME to "
                "another folder, and run the command again"
            )
        is_busy = status is not None and (status == _TOO_MANY_REQUESTS or status >= _SERVER_ERRORS)
        if is_busy or not isinstance(error, (OSError, ValueError, RuntimeError)):  # all others are httpx's own
            return _UnreachableError(self, f"{self.api.endpoint} does not answer ({error})")
        if isinstance(error, errors.LocalEntryNotFoundError):
            return _UnreachableError(self, f"{self.api.endpoint} does not answer ({error.__cause__ or error})")
        return SourceError(f"{name} cannot be downloaded from {self.api.endpoint} ({error}); run the command again")


def _some(files: Sequence[str]) -> str:
    """The first few of some file names, without hidden files."""
    names = [file for file in files if not file.startswith(".")] or ["no file"]
    rest = len(names) - _N_SHOWN
    return ", ".join(names[:_N_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.3g} GB"


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Show or hide the client's progress bars; its own setting is restored."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
