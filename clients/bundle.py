"""What a coordinator may ship with a run: nothing but the name of what is installed here. Nothing of it is run."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Protocol

from clients.asked import shown

NAME, PUBLISHER = "fedmed", "fedmed"
COMPONENTS = {"serverapp": "strategies.server_app:app", "clientapp": "clients.client_app:app"}


class Bundle(Protocol):
    """What a shipped bundle says of itself: parsed, never unpacked."""

    @property
    def name(self) -> str: ...

    @property
    def publisher(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def components(self) -> Mapping[str, str]: ...


def misfit(bundle: Bundle) -> str | None:
    """What a bundle says that it should not, and what it should; None where it only names the installed fedmed."""
    expected = {"name": NAME, "publisher": PUBLISHER, "version": version("fedmed")}
    for key, value in expected.items():
        found = getattr(bundle, key)
        if found != value:
            hint = "; install the same version of fedmed at both ends" if key == "version" else ""
            return f"{key} {shown(str(found))}, expected '{value}'{hint}"
    if dict(bundle.components) != COMPONENTS:
        return f"components {shown(str(dict(bundle.components)))}, expected {COMPONENTS}"
    return None
