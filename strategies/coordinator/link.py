"""How this machine speaks to the SuperLink that runs for a coordinator's folder."""

from typing import TYPE_CHECKING

from strategies.coordinator.folder import CoordinatorError, CoordinatorFolder, command

if TYPE_CHECKING:
    from fedmed.flower.control import Control, Node


def control(folder: CoordinatorFolder) -> "Control":
    """The operator's side of the running SuperLink.

    Raises:
        CoordinatorError: the coordinator does not run.
    """
    running = folder.running()
    if running is None:
        raise CoordinatorError(
            f"{folder.path}: this coordinator does not run; start it with: {command('start', folder.path)}"
        )
    # Imported here: it brings Flower.
    from fedmed.flower.control import Control

    ca = None if running.get("insecure") else folder.trusted
    return Control(folder.address, ca=ca, secret=folder.control_secret)


def nodes(folder: CoordinatorFolder) -> "list[Node] | None":
    """The sites as the SuperLink knows them; None: none runs, or it does not answer."""
    if folder.running() is None:
        return None
    from fedmed.flower.line import LinkError

    operator = control(folder)
    try:
        return operator.nodes()
    except LinkError:
        return None
    finally:
        operator.close()
