"""One line of `fedmed site check`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What was looked at, whether it is well, and what was found: where it is not, what to do about it."""

    what: str
    ok: bool
    says: str

    @property
    def line(self) -> str:
        """The finding on one line, whatever a name in it holds."""
        says = "".join(letter if letter.isprintable() else " " for letter in self.says)
        return f"{'OK  ' if self.ok else 'TODO'}  {self.what:<9} {says}"
