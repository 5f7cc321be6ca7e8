"""Hospitals of made-up patients, as folders of real DICOM files: for demos, benchmarks and tests."""
