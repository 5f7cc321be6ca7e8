"""From DICOM files to images that are ready to train on. Nothing here imports torch."""
