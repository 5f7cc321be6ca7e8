"""Why a file is not used: the documented list of reasons, and the exception that carries one of them."""

from enum import StrEnum


class Reason(StrEnum):
    """A reason for which a file is put aside."""

    MISSING_PATIENT_ID = "missing_patient_id"
    """The file names no patient, so that nothing can protect that patient."""
    MISSING_UID = "missing_uid"
    """The file has no SOP Class UID or no SOP Instance UID."""
    UNSUPPORTED_TRANSFER_SYNTAX = "unsupported_transfer_syntax"
    """Pixels in an encoding that cannot be read or cannot be cleaned."""
    UNREADABLE = "unreadable"
    """The file is damaged, or its parts contradict one another."""
    BURNED_IN_TEXT = "burned_in_text"
    """Text may be drawn into the pixels, and the policy or a lack of known regions forbids masking it."""
    ALREADY_DEIDENTIFIED = "already_deidentified"
    """The file came out of this de-identifier: a second pass would give the patient a second pseudonym."""


class Quarantined(Exception):
    """A file that cannot be used. Carries the reason and nothing of the file."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason
