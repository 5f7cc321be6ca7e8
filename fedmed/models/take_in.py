"""A folder of converted weights, taken into the models folder under an id of its own: local/NAME."""

import shutil
from pathlib import Path

from fedmed.errors import ModelError, require
from fedmed.models.pins import (
    FILES,
    LOCAL,
    WEIGHTS,
    Pin,
    PinnedFile,
    Progress,
    digest_of,
    drafting,
    install,
    is_hub_id,
    sha256_of,
    transformers_version,
)


def take_in(folder: Path, name: str, *, replace: bool = False, progress: Progress | None = None) -> Pin:
    """Copy and pin what `save_pretrained` wrote. From then on it is like a pulled model, and can be exported.

    Its `revision` is made of its files: two machines that convert to the same bytes have the same one.

    Raises:
        ConfigError: `name` is no name for a model.
        ModelError: the folder lacks weights or settings, another version is here, or the disk is full.
    """
    hub = f"{LOCAL}{name}"
    ok = bool(name) and "/" not in name and is_hub_id(hub)
    require(ok, "--name", name or "''", "letters, digits, '.', '_' and single '-', e.g. my_encoder")
    paths = [folder / file for file in sorted(FILES) if (folder / file).is_file()]
    missing = sorted({WEIGHTS, "config.json"} - {path.name for path in paths})
    if missing:
        raise ModelError(
            f"{folder}: no {' and no '.join(missing)} in it; write it with save_pretrained(FOLDER)"
        )
    with drafting(sum(path.stat().st_size for path in paths)) as draft:
        files = {}
        for path in paths:
            copy = draft / path.name
            shutil.copyfile(path, copy)
            files[path.name] = PinnedFile(sha256=sha256_of(copy, progress), size=copy.stat().st_size)
        pin = Pin(hub=hub, revision=digest_of(files)[:40], transformers=transformers_version(), files=files)
        install(draft, pin, replace=replace)
    return pin
