"""What a coordinator may ship with a run: nothing but the name of what is installed here. Nothing of it is run."""

from clients.asked import shown
from fedmed.flower.bundle import Bundle, installed


def misfit(bundle: Bundle) -> str | None:
    """What a bundle says that it should not, and what it should; None where it only names the installed fedmed."""
    expected = installed()
    for key in ("name", "publisher", "version", "components"):
        found, value = getattr(bundle, key), getattr(expected, key)
        if found != value:
            hint = "; install the same version of fedmed at both ends" if key == "version" else ""
            return f"{key} {shown(str(found))}, expected {value}{hint}"
    # They would stay where they are, but an honest coordinator ships none.
    more = sorted(set(bundle.files) - set(expected.files))
    return f"{len(more)} other files, e.g. {shown(more[0])}" if more else None
