"""A page of small images, to see at a glance whether an export was read as it was meant."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from fedmed.dicom.assemble import PendingImage

LARGEST = 80
COLUMNS = 10
SIDE, CAPTION, GAP = 112, 26, 6


def contact_sheet(images: "Sequence[PendingImage]") -> bytes:
    """A PNG of up to 80 records, evenly over all of them; of a volume or a clip the middle frame.

    Below each stand its label, modality and size; nothing that names a person. What stands in the pixels is shown.
    Small images are enlarged by a whole number, so that each pixel stays what it is.
    """
    chosen = [
        images[i] for i in np.unique(np.linspace(0, len(images) - 1, min(LARGEST, len(images))).astype(int))
    ]
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    sheet = Image.new(
        "RGB", (columns * (SIDE + GAP) + GAP, rows * (SIDE + CAPTION + GAP) + GAP), (24, 24, 24)
    )
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(chosen):
        left = GAP + index % columns * (SIDE + GAP)
        top = GAP + index // columns * (SIDE + CAPTION + GAP)
        stored = image.load()
        frames, height, width = stored.pixels.shape[:3]
        middle = Image.fromarray((stored.pixels[frames // 2] >> 8).astype(np.uint8))
        middle.thumbnail((SIDE, SIDE))
        times = SIDE // max(middle.size)
        middle = middle.resize((middle.width * times, middle.height * times), Image.Resampling.NEAREST)
        at = left + (SIDE - middle.width) // 2, top + (SIDE - middle.height) // 2
        sheet.paste(middle.convert("RGB"), at)
        what = f"{stored.modality} {width} x {height}" + (f", {frames} frames" if frames > 1 else "")
        label = _fitting(draw, stored.label or "no label")
        draw.text((left, top + SIDE + 1), label, fill=(235, 235, 235) if stored.label else (160, 160, 160))
        draw.text((left, top + SIDE + 13), _fitting(draw, what), fill=(160, 160, 160))
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()


def _fitting(draw: ImageDraw.ImageDraw, text: str) -> str:
    """As much of a line as fits below an image."""
    text = " ".join(text.split())[:100]
    if draw.textlength(text) <= SIDE:
        return text
    while draw.textlength(f"{text}..") > SIDE:
        text = text[:-1]
    return f"{text}.."
