"""DICOM files in, arrays ready to train on out: reading pixels, geometry, de-identification, ingestion."""
