"""DICOM: reading it, cleaning it, writing it. Needs the extra `dicom`; nothing here imports torch."""
