"""Made-up recordings of a site."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.io import wavfile


def hum(hertz: float, rate: int, *, seconds: float) -> NDArray[np.float64]:
    """A tone of half the largest amplitude."""
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def recordings(folder: Path, *, patients: int = 6, seed: int = 0) -> Path:
    """Two recordings a patient, a cough and a breath, of 1 to 3 seconds, and their index."""
    folder.mkdir(parents=True)
    draws, lines = np.random.default_rng(seed), ["file,patient,label"]
    for number in range(2 * patients):
        wave = hum(200 + 40 * number, 8000, seconds=draws.uniform(1, 3))
        noisy = wave + draws.normal(0, 0.05, len(wave))
        wavfile.write(folder / f"{number}.wav", 8000, (20_000 * noisy).astype(np.int16))
        lines.append(f"{number}.wav,P{number // 2},{('cough', 'breath')[number % 2]}")
    (folder / "index.csv").write_text("\n".join(lines) + "\n")
    return folder
