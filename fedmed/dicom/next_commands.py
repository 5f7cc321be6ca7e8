"""The commands that follow on a folder of hospitals, as a shell reads them."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path


def commands(
    *,
    folder: str,
    ingested: str,
    sizes: dict[str, int],
    positive: Sequence[str],
    negative: Sequence[str],
    images_per_patient: int,
) -> list[str]:
    """One `fedmed site ingest` for each hospital, then `fedmed run` on all of them."""
    found = []
    for name in sizes:
        source, to = Path(folder) / name, Path(ingested) / name
        words = [
            "fedmed",
            "site",
            "ingest",
            source / "dicom",
            to,
            "--labels",
            source / "labels.csv",
            "--name",
            name,
        ]
        found.append(shlex.join(map(str, words)))
    declared = ", ".join(f"{_word(name)}: {size}" for name, size in sizes.items())
    settings = [
        f"task.path={_word(ingested)}",
        f"task.positive=[{', '.join(map(_word, positive))}]",
        f"task.negative=[{', '.join(map(_word, negative))}]",
        f"task.declared_sizes={{{declared}}}",
        f"task.images_per_patient={images_per_patient}",
    ]
    return [*found, shlex.join(["fedmed", "run", "task=dicom", "model=cnn", *settings])]


def _word(text: str) -> str:
    """A text in Hydra's grammar: in quotes where it is no plain word or would be read as a number."""
    if re.fullmatch(r"[A-Za-z][\w./-]*|[./][\w./-]*", text, re.ASCII) and text.lower() not in (
        "true",
        "false",
        "null",
    ):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
