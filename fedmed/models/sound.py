"""HeAR's encoder of health sounds: two seconds of sound as a picture of its frequencies, seen by a ViT.

The picture is that of Google's port to PyTorch (google/hear-pytorch): `spectrogram` computes what its
python/data_processing/audio_utils.py does. For embedding alone: nothing of it is trained here.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedmed.data.dataset import SiteDataset
from fedmed.data.sounds import RATE, SAMPLES
from fedmed.devices import CPU, sent
from fedmed.model import SoundModelConfig
from fedmed.models.activations import ActivationCache, Asked
from fedmed.models.loading import load_sound_encoder, settings_digest
from fedmed.task import SoundTaskConfig

# Of the short-time Fourier transform: 25 ms, every 10 ms.
WINDOW, STEP = RATE * 25 // 1000, RATE * 10 // 1000
BANDS = 128
# Rows (time) and columns (frequency) of what the encoder reads.
SIZE = (192, BANDS)
# Per-channel energy normalisation (Wang et al. 2017, "Trainable frontend for robust and far-field keyword spotting",
# equation 1): how fast the smoother follows, its exponent, and the offset, root and floor.
FOLLOW, EXPONENT, OFFSET, ROOT, FLOOR = 0.04, 0.8, 2.0, 0.5, 1e-8


class SoundEncoder:
    """Recordings go through it clip by clip, each clip by itself.

    Raises:
        ModelError: the folder holds no encoder of one-channel pictures of `SIZE`, or is not the pinned one.
    """

    def __init__(self, task: SoundTaskConfig, model: SoundModelConfig, *, device: torch.device = CPU) -> None:
        self.config, self.where, self.device = model, task.path, device
        self.encoder = load_sound_encoder(model, SIZE).to(device)

    @property
    def depends(self) -> dict[str, Any]:
        """What an embedding depends on besides the sound."""
        return {
            "model": self.config.sha256,
            "settings": settings_digest(self.encoder),
            "preprocessing": {
                "rate": RATE, "samples": SAMPLES, "window": WINDOW, "step": STEP, "bands": BANDS, "size": SIZE,
                "pcen": (FOLLOW, EXPONENT, OFFSET, ROOT, FLOOR),
            },
        }  # fmt: skip

    @torch.no_grad()
    def sounds(self, data: SiteDataset, *, cache: ActivationCache | None = None) -> Tensor:
        """(records, width): the mean of the pooled outputs of a record's clips."""
        records = torch.from_numpy(data.sounds)

        def pieces() -> Iterator[Tensor]:
            for clips in records:
                rows = [self._clip(clip[None]) for clip in clips]
                yield torch.stack(rows).mean(dim=0).cpu()

        return Asked(cache, data, self.where, self.depends, {"sounds": records}, self.device).features(pieces)

    def _clip(self, clip: Tensor) -> Tensor:
        picture = spectrogram(sent(clip, self.device))[:, None]
        found: Tensor = self.encoder(pixel_values=picture).pooler_output
        return found


def spectrogram(clips: Tensor) -> Tensor:
    """(clips, *SIZE) of (clips, SAMPLES), each clip by itself."""
    low = clips.amin(dim=1, keepdim=True)
    scaled = clips - low
    scaled = 2 * scaled / (scaled.amax(dim=1, keepdim=True) + FLOOR) - 1
    # The last frames reach beyond the end, into silence.
    frames = functional.pad(scaled, (0, WINDOW - STEP)).unfold(1, WINDOW, STEP)
    window = torch.hann_window(WINDOW, device=clips.device)
    power = torch.fft.rfft(frames * window, dim=2).abs().square()
    energy = power @ sent(mel_filters(), clips.device)
    smooth, smoothed = energy[:, 0], []
    for frame in energy.unbind(1):
        smooth = (1 - FOLLOW) * smooth + FOLLOW * frame
        smoothed.append(smooth)
    gain = (FLOOR + torch.stack(smoothed, dim=1)) ** EXPONENT
    normalised = (energy / gain + OFFSET) ** ROOT - OFFSET**ROOT
    return functional.interpolate(normalised[:, None], size=SIZE, mode="bilinear", align_corners=False)[:, 0]


@lru_cache(maxsize=1)
def mel_filters() -> Tensor:
    """(WINDOW / 2 + 1, BANDS): triangles that overlap by half, of equal width on the mel scale (2595 log10(1 + f/700))
    from 0 to RATE / 2, their sides straight on that scale."""
    frequencies = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    mels = 2595 * torch.log10(1 + frequencies / 700)
    edges = torch.linspace(0, float(mels[-1]), BANDS + 2, dtype=torch.float64)
    rising = (mels[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - mels[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()
