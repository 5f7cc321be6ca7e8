"""From the Hugging Face hub into the models folder: safetensors, settings and vocabularies at one commit."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmed.errors import ConfigError, ModelError
from fedmed.models.pins import (
    FILES,
    LOCAL,
    WEIGHTS,
    Pin,
    PinnedFile,
    Progress,
    check_replaces,
    differences,
    drafting,
    find,
    install,
    is_hub_id,
    sha256_of,
    transformers_version,
)
from fedmed.pretrained import COMMIT

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".pb", ".keras", ".onnx")


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """What a pull came to. `fetched`: False where the model was here already, unchanged."""

    pin: Pin
    fetched: bool


def pull(
    hub: str,
    *,
    revision: str = "",
    sha256: str = "",
    replace: bool = False,
    progress: Progress | None = None,
) -> Pulled:
    """Fetch a model of the hub at a commit, check it, pin it.

    A model that is here already is hashed and, where it was damaged, fetched again at the commit of its pin; what comes
    must then be what was pinned.

    Args:
        revision: a commit, branch or tag; empty: that of the pin, else `main`.
        sha256: what the weights must have; empty: whatever the hub says at that commit.
        replace: put another version in place of the one that is here.
        progress: told of what is fetched and hashed.

    Raises:
        ConfigError: `hub` is no id.
        ModelError: the hub cannot be reached, refuses, or has no such model in this form; or what came is not what
            was pinned, or not what the hub says.
    """
    if not is_hub_id(hub):
        raise ConfigError(f"'{hub}': expected a name that fedmed models list shows, or ORG/NAME of the hub")
    if hub.startswith(LOCAL):
        raise ModelError(f"{hub}: not of the hub; bring it with: fedmed models import FILE.tar")
    before = None if replace else find(hub)
    if before is not None and revision in ("", before.revision):
        if not differences(before, progress=progress):
            _check_sha256(before, sha256)
            return Pulled(pin=before, fetched=False)
        revision = before.revision
    _check_online(hub)
    with _in_words(hub, revision):
        info = _info(hub, revision or "main")
    if not COMMIT.fullmatch(info.sha or ""):
        raise ModelError(f"{hub}: the hub at {_shown()} names no commit for it")
    listed = _listed(hub, info)
    if before is not None and info.sha != before.revision:
        raise ModelError(
            f"{hub}: here already at {before.revision[:12]}, asked for {info.sha[:12]}; replace it with --replace"
        )
    with drafting(sum(file.size or 0 for file in listed)) as draft:
        with _in_words(hub, revision):
            files = {file.rfilename: _fetch(hub, info.sha, file, draft, progress) for file in listed}
        pin = Pin(hub=hub, revision=info.sha, transformers=transformers_version(), files=files)
        _check_sha256(pin, sha256)
        if before is not None and before.files != pin.files:
            raise ModelError(f"{hub}: the hub has other files at {info.sha[:12]} than were pinned; not kept")
        check_replaces(pin, replace=replace)
        install(draft, pin, replace=replace)
    return Pulled(pin=pin, fetched=True)


def _check_sha256(pin: Pin, sha256: str) -> None:
    if sha256 and pin.sha256 != sha256:
        raise ModelError(
            f"{pin.hub}: {WEIGHTS} has sha256 {pin.sha256} at {pin.revision[:12]}, expected {sha256}; not kept"
        )


def _check_online(hub: str) -> None:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise ModelError(
            f"{hub}: HF_HUB_OFFLINE is set, nothing is downloaded; on a machine with internet run: "
            f"fedmed models pull {hub} && fedmed models export {hub} FILE.tar, then here: fedmed models import FILE.tar"
        )
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    # Read once when the library is imported, which may have been before it was allowed.
    constants.HF_HUB_OFFLINE = False
    logging.set_verbosity_error()


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _shown() -> str:
    """The hub's address without a name and password that may stand in it."""
    scheme, mark, rest = _endpoint().rpartition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}"


def _info(hub: str, revision: str) -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=_endpoint()).model_info(hub, revision=revision, files_metadata=True, timeout=30)


def _listed(hub: str, info: Any) -> list[Any]:
    """The files of a model that are fetched. Raises `ModelError` where the weights are not among them."""
    names = {file.rfilename for file in info.siblings or []}
    if WEIGHTS not in names:
        shards = f"{WEIGHTS}.index.json" in names
        others = sorted(name for name in names if name.endswith(_PICKLES) and "/" not in name)
        hint = "its weights are split into several files, and one is pinned" if shards else ""
        hint = hint or (
            f"{', '.join(others[:3])} may run code or is no PyTorch, and is not read" if others else ""
        )
        raise ModelError(
            f"{hub}: no {WEIGHTS} at {info.sha[:12]}{f' ({hint})' if hint else ''}; a pull request may have it: "
            f"fedmed models pull {hub} --revision refs/pr/N; or convert it and use model.path"
        )
    if "config.json" not in names:
        raise ModelError(f"{hub}: no config.json at {info.sha[:12]}; transformers cannot load it")
    return [file for file in info.siblings if file.rfilename in FILES]


def _fetch(hub: str, commit: str, file: Any, draft: Path, progress: Progress | None) -> PinnedFile:
    """One file, and what it came to; what the hub says of it beforehand must be true."""
    from huggingface_hub import hf_hub_download

    # Beside the draft, since the library keeps books in the folder that it fills.
    beside = draft.parent / "download"
    fetched = Path(
        hf_hub_download(
            hub, file.rfilename, revision=commit, local_dir=beside, endpoint=_endpoint(),
            tqdm_class=_reporting(file.rfilename, progress),
        )
    )  # fmt: skip
    found = PinnedFile(sha256=sha256_of(fetched, progress), size=fetched.stat().st_size)
    said = file.lfs.sha256 if file.lfs else found.sha256
    if found.sha256 != said or found.size != (found.size if file.size is None else file.size):
        raise ModelError(
            f"{hub}: {file.rfilename} came with sha256 {found.sha256[:12]} and {found.size} bytes, the hub "
            f"says {said[:12]} and {file.size}; nothing was kept, try again"
        )
    os.rename(fetched, draft / file.rfilename)
    return found


def _reporting(name: str, progress: Progress | None) -> type:
    """What huggingface_hub tells of its progress, passed on instead of drawn."""
    from tqdm import tqdm

    class Reporting(tqdm):
        def __init__(self, *args: Any, **settings: Any) -> None:
            self._done, self._whole = settings.get("initial") or 0, settings.get("total") or 0
            super().__init__(*args, **(settings | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            self._done += n or 0
            if progress:
                progress(name, int(self._done), int(self._whole))

    return Reporting


@contextlib.contextmanager
def _in_words(hub: str, revision: str) -> Iterator[None]:
    """What the hub answers, as one line: never an address, which may hold a token."""
    from huggingface_hub import errors

    page = f"{_shown()}/{hub}"
    try:
        yield
    except errors.GatedRepoError:
        raise ModelError(
            f"{hub}: gated; accept its terms at {page} with your account, then set HF_TOKEN to a token of it"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{hub}: no revision '{revision or 'main'}'; see {page}/commits/main") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{hub}: not on the hub, or private: see {page}; for one of yours set HF_TOKEN"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        raise ModelError(f"{hub}: the hub at {_shown()} answers {status}; try again later") from None
    except (errors.HTTPError, errors.LocalEntryNotFoundError) as error:
        raise ModelError(
            f"{hub}: the hub at {_shown()} cannot be reached ({type(error).__name__}); see HF_ENDPOINT, "
            "or bring a file: fedmed models import FILE.tar"
        ) from None
    except (
        errors.XetDownloadError,
        errors.FileMetadataError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
    ) as error:
        raise ModelError(
            f"{hub}: the download failed ({type(error).__name__}); nothing was kept, try again"
        ) from None
    except OSError as error:
        if error.errno:
            raise
        # What the library raises of a file that ends early: without a number.
        raise ModelError(f"{hub}: the download ended early; nothing was kept, try again") from None
