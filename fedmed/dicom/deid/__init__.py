"""De-identification to DICOM PS3.15 Annex E: CONFIDENTIALITY.md says what it does and what it does not see."""
