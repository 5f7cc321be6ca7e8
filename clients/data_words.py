"""A data set's manifest in words, for a person at the site: exact counts, which do not leave it."""

import re
from pathlib import Path
from typing import Any

from fedmed.dicom.reasons import Reason

LONGEST = 12


def in_words(folder: Path, manifest: dict[str, Any], *, checked: bool = False) -> str:
    """What a data set holds and what was left out of it, whatever a scanner or a label calls itself."""
    lines = [
        f"{folder}: {counted(manifest['records'], 'record')} of {counted(manifest['patients'], 'patient')}"
    ]
    lines += [
        f"  by {what}: {_listed(manifest[f'by_{what}'])}"
        for what in ("modality", "label", "manufacturer", "year")
    ]
    rows, images = manifest["labels"]["unmatched_rows"], manifest["labels"]["unmatched_images"]
    told = []
    if rows:
        told.append(f"{counted(rows, 'row')} {'fits' if rows == 1 else 'fit'} no image")
    if images:
        told.append(f"{counted(images, 'image')} {'has' if images == 1 else 'have'} no row")
    if told:
        lines.append(f"  labels: {'; '.join(told)}; see unmatched.csv")
    lines += [f"  note: {warning}" for warning in manifest["warnings"]]
    lines += _quarantine(manifest["quarantine"])
    size = f"at most {manifest['size']} pixels a side" if manifest["size"] else "at their own size"
    lines.append(f"  stored {size}; {'de-identified files beside them; ' if manifest['deidentified'] else ''}"
                 f"sha256 {manifest['content_sha256'][:16]}…")  # fmt: skip
    if checked:
        lines.append("  checked: every byte of pixels and records is as ingestion wrote it")
    # What a scanner calls itself might be an order to the terminal.
    return "\n".join(re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", line) for line in lines)


def counted(number: int, what: str) -> str:
    """`1 file`, `1,200 files`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _listed(counts: dict[str, int]) -> str:
    """Each with its count; of many the most frequent."""
    shown, rest = list(counts.items()), 0
    if len(shown) > LONGEST:
        shown = sorted(shown, key=lambda one: -one[1])
        rest = sum(count for _, count in shown[LONGEST:])
    # Unquoted, the comma in a name would begin another one.
    names = {name: f'"{name}"' if "," in name else name or "none" for name in counts}
    told = ", ".join(f"{names[name]} {count:,}" for name, count in shown[:LONGEST])
    return f"{told}, and {len(shown) - LONGEST} more with {rest:,}" if rest else told


def _quarantine(counts: dict[str, int]) -> list[str]:
    if not counts:
        return []
    width, digits = max(map(len, counts)), max(len(f"{count:,}") for count in counts.values())
    return [
        f"  in quarantine: {counted(sum(counts.values()), 'file')}, listed in quarantine.csv",
        *(
            f"    {count:>{digits},}  {reason:<{width}}  {Reason(reason).meaning}"
            for reason, count in sorted(counts.items(), key=lambda one: (-one[1], one[0]))
        ),
    ]
