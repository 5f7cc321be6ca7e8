"""The bundle that a run's launch ships: names and values, no code. A site reads it and never unpacks it."""

import io
import tomllib
import zipfile
from dataclasses import dataclass
from importlib.metadata import version

from flwr.cli.build import build_fab_from_files

from fedmed.flower.line import LinkError

SERVER_APP, CLIENT_APP = "strategies.server_app:app", "clients.client_app:app"
MANIFEST = "pyproject.toml"
# A manifest is a page of text; an archive may claim anything.
LARGEST = 64 * 1024
TEXT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "fedmed"
version = "{version}"
description = "Names what is installed at both ends"
license = "Apache-2.0"
dependencies = ["flwr=={flower}"]

[tool.flwr.app]
publisher = "fedmed"
fab-include = ["README.md"]

[tool.flwr.app.components]
serverapp = "{server}"
clientapp = "{client}"

[tool.flwr.app.config]
overrides = ""
"""


@dataclass(frozen=True)
class Bundle:
    """What a bundle says of itself."""

    name: str
    version: str
    publisher: str
    components: dict[str, str]
    files: tuple[str, ...]


def installed() -> Bundle:
    """What a bundle of the installed fedmed says."""
    return Bundle(
        name="fedmed",
        version=version("fedmed"),
        publisher="fedmed",
        components={"serverapp": SERVER_APP, "clientapp": CLIENT_APP},
        files=(MANIFEST, "README.md", ".info/CONTENT"),
    )


def make_bundle() -> bytes:
    """The bundle of the installed fedmed: Flower asks for one."""
    text = TEXT.format(
        version=version("fedmed"), flower=version("flwr"), server=SERVER_APP, client=CLIENT_APP
    )
    readme = b"fedmed ships no code: both ends run what they have installed.\n"
    content, _ = build_fab_from_files({MANIFEST: text.encode(), "README.md": readme})
    return bytes(content)


def read_bundle(content: bytes) -> Bundle:
    """What a bundle says, from its manifest alone.

    Raises:
        LinkError: it is no bundle.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = tuple(archive.namelist())
            with archive.open(MANIFEST) as file:
                text = file.read(LARGEST)
        values = tomllib.loads(text.decode())
        app = values["tool"]["flwr"]["app"]
        return Bundle(
            name=str(values["project"]["name"]),
            version=str(values["project"]["version"]),
            publisher=str(app["publisher"]),
            components={str(key): str(value) for key, value in app["components"].items()},
            files=names,
        )
    except (
        zipfile.BadZipFile,
        KeyError,
        ValueError,
        AttributeError,
        TypeError,
        OSError,
        RuntimeError,
    ) as error:
        raise LinkError(f"the run's bundle cannot be read ({type(error).__name__})") from None
