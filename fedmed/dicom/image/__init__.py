"""One file's pixels to frames, and slices to volumes: pure functions of a pydicom data set."""
