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

    Below each stand modality, label and what it is; nothing that names a person. What stands in the pixels is shown.
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
        at = left + (SIDE - middle.width) // 2, top + (SIDE - middle.height) // 2
        sheet.paste(middle.convert("RGB"), at)
        what = f"{frames} x {width} x {height}" if frames > 1 else f"{width} x {height}"
        draw.text((left, top + SIDE + 1), f"{stored.modality} {stored.label}"[:20], fill=(235, 235, 235))
        draw.text((left, top + SIDE + 13), what, fill=(160, 160, 160))
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()
