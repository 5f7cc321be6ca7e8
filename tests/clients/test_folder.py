"""A site's folder is whole or absent, closed to others, and its signature is the site's."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

import clients.site
import fedmed.secret_folder
from clients.folder import FILES, SiteError, SiteFolder, verify
from clients.policy import Policy
from fedmed.config import RunConfig
from fedmed.data.split import hash_split
from fedmed.records import Arrays
from tests.clients.test_client_app import SITE, instruction_of, rows, start, table_config, write
from tests.conftest import count

NAME = "St. Mary's"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "the site"


@pytest.fixture
def site(folder: Path) -> SiteFolder:
    return SiteFolder.init(folder, name=NAME)


def test_a_new_site_has_its_secrets_and_the_default_policy(site: SiteFolder, folder: Path) -> None:
    assert sorted(os.listdir(folder)) == sorted(FILES)
    assert os.listdir(folder.parent) == [folder.name]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in FILES} == {0o600}
    assert site.policy == Policy(name=NAME)
    assert (folder / "key").read_bytes() == site.split_key
    assert len(site.split_key) == 32
    identity = serialization.load_pem_private_key((folder / "identity.pem").read_bytes(), password=None)
    assert isinstance(identity, ec.EllipticCurvePrivateKey)
    assert identity.curve.name == "secp384r1"
    assert (folder / "identity.pem").read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----\n")


def test_modes_do_not_depend_on_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        SiteFolder.init(folder, name=NAME)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in FILES} == {0o600}


def test_an_opened_site_is_the_one_that_was_made(site: SiteFolder, folder: Path) -> None:
    again = SiteFolder.open(folder)
    assert (again.split_key, again.public_key, again.policy) == (site.split_key, site.public_key, site.policy)


def test_two_sites_share_no_secret(site: SiteFolder, tmp_path: Path) -> None:
    other = SiteFolder.init(tmp_path / "other", name=NAME)
    assert other.split_key != site.split_key
    assert other.public_key != site.public_key


def test_what_prints_a_site_shows_no_secret(site: SiteFolder) -> None:
    assert "key" not in repr(site)
    assert repr(site.split_key) not in f"{site} {site!r}"


def test_a_signature_is_of_these_bytes_by_this_site(site: SiteFolder, tmp_path: Path) -> None:
    other = SiteFolder.init(tmp_path / "other", name=NAME)
    data = b"an entry"
    signature = site.sign(data)
    assert verify(site.public_key, data, signature)
    assert site.public_key.startswith(b"-----BEGIN PUBLIC KEY-----\n")
    assert verify(site.public_key, b"", site.sign(b""))
    assert not verify(site.public_key, data + b" ", signature)
    assert not verify(other.public_key, data, signature)
    assert not verify(site.public_key, data, signature[:-1])
    assert not verify(site.public_key, data, bytes([signature[0] ^ 1]) + signature[1:])
    for nothing in (b"", b"no key", site.public_key[:60]):
        assert not verify(nothing, data, signature)
    assert not verify(site.public_key, data, b"")


def test_a_key_on_another_curve_verifies_nothing() -> None:
    from cryptography.hazmat.primitives import hashes

    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert not verify(public, b"x", key.sign(b"x", ec.ECDSA(hashes.SHA384())))


def test_init_never_replaces_anything(site: SiteFolder, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SiteError, match=r"holds a site already; show it with: fedmed site policy '.*the site'$"
    ):
        SiteFolder.init(folder, name="other")
    assert SiteFolder.open(folder).split_key == site.split_key
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes").write_text("mine")
    with pytest.raises(SiteError, match="holds other files; expected a new or an empty folder"):
        SiteFolder.init(used, name=NAME)
    with pytest.raises(SiteError, match="is no folder"):
        SiteFolder.init(used / "notes", name=NAME)
    with pytest.raises(SiteError, match=r"no folder '.*absent' to make it in"):
        SiteFolder.init(tmp_path / "absent" / "site", name=NAME)
    assert os.listdir(used) == ["notes"]
    assert (used / "notes").read_text() == "mine"


@pytest.mark.parametrize("name", ["", "x" * 101, "two\nlines", "\ud800"])
def test_a_name_that_is_none_makes_no_site(name: str, folder: Path) -> None:
    with pytest.raises(SiteError, match=r"^name=.*: expected 1 to 100 printable characters$"):
        SiteFolder.init(folder, name=name)
    assert not folder.exists()


CALLS = ("mkdir", "open", "fdopen", "fsync", "close", "chmod", "link", "rename")


class Faulty:
    """`os`, in which the n-th call that changes or writes anything fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, fault: BaseException) -> None:
        self.calls = 0
        self._at, self._fault = at, fault
        self._patch = monkeypatch
        for name in CALLS:
            monkeypatch.setattr(fedmed.secret_folder.os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, call: Callable) -> Callable:
        def wrapped(*arguments: object, **options: object) -> object:
            self.calls += 1
            if self.calls == self._at:
                # Tidying up goes through the same functions, and works.
                self._patch.undo()
                raise self._fault
            return call(*arguments, **options)

        return wrapped


def faults(
    monkeypatch: pytest.MonkeyPatch, folder: Path, fault: BaseException, *, inside: bool
) -> Iterator[int]:
    """Interrupt `init` at each call in turn, until one goes through."""
    for at in range(1, 100):
        if inside:
            folder.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            Faulty(patch, at, fault)
            try:
                SiteFolder.init(folder, name=NAME)
                return
            except (SiteError, KeyboardInterrupt) as error:
                told = str(error)
        if isinstance(fault, OSError):
            assert told == f"{folder}: a site cannot be made there (No space left on device)"
        yield at


@pytest.mark.parametrize("inside", [False, True], ids=["new", "empty"])
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=type)
def test_an_interrupted_init_leaves_nothing(
    fault: BaseException, inside: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = 0
    for _ in faults(monkeypatch, folder, fault, inside=inside):
        tried += 1
        assert [path.name for path in folder.parent.rglob("*")] == ([folder.name] if inside else [])
    # Three files, each opened, wrapped and synced, and what puts them in place.
    assert tried >= 12
    assert SiteFolder.open(folder).policy.name == NAME
    assert sorted(os.listdir(folder)) == sorted(FILES)


@pytest.mark.parametrize("inside", [False, True], ids=["new", "empty"])
def test_a_site_that_another_process_made_first_is_kept(
    inside: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race, in slow motion: the other one is done between the look and the last step."""
    if inside:
        folder.mkdir()
    name = "link" if inside else "rename"
    step = getattr(os, name)

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(fedmed.secret_folder.os, name, step)
        folder.mkdir(mode=0o700, exist_ok=True)
        for file in FILES:
            (folder / file).write_text("theirs")
        step(source, target)

    monkeypatch.setattr(fedmed.secret_folder.os, name, late)
    with pytest.raises(SiteError, match="a site cannot be made there"):
        SiteFolder.init(folder, name=NAME)
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(FILES, "theirs")
    assert os.listdir(folder.parent) == [folder.name]


def test_no_site_says_how_to_make_one(folder: Path) -> None:
    for make in (lambda: None, folder.mkdir, folder.rmdir, lambda: folder.write_text("a file")):
        make()
        with pytest.raises(
            SiteError,
            match=r"no site there; make one with: fedmed site init '.*the site' --name|cannot be read",
        ):
            SiteFolder.open(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, site: SiteFolder) -> None:
    (site.path / name).unlink()
    with pytest.raises(SiteError, match=f"damaged, without {name}; restore it from a backup"):
        SiteFolder.open(site.path)


P256 = ec.generate_private_key(ec.SECP256R1()).private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
)
LOCKED = ec.generate_private_key(ec.SECP384R1()).private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("key", b"", "32 bytes"), ("key", b"x" * 31, "32 bytes"), ("key", b"x" * 33, "32 bytes"),
        ("identity.pem", b"", "P-384"), ("identity.pem", b"-----BEGIN PRIVATE KEY-----\n", "P-384"),
        ("identity.pem", P256, "P-384"), ("identity.pem", LOCKED, "P-384"),
    ],
)  # fmt: skip
def test_a_damaged_secret_is_refused_and_kept(
    name: str, content: bytes, expected: str, site: SiteFolder
) -> None:
    (site.path / name).write_bytes(content)
    with pytest.raises(
        SiteError, match=f"{name}: damaged, expected .*{expected}.*; restore it from a backup"
    ):
        SiteFolder.open(site.path)
    assert (site.path / name).read_bytes() == content


@pytest.mark.parametrize("mode", [0o010, 0o001, 0o040, 0o004, 0o020, 0o002, 0o077])
@pytest.mark.parametrize("name", ["", *FILES])
def test_a_site_that_others_may_read_is_refused_until_the_command_is_run(
    name: str, mode: int, site: SiteFolder
) -> None:
    place = site.path / name
    place.chmod(stat.S_IMODE(place.stat().st_mode) | mode)
    with pytest.raises(SiteError, match="others may read or change it; run: chmod") as refused:
        SiteFolder.open(site.path)
    assert os.system(str(refused.value).partition("run: ")[2]) == 0
    assert SiteFolder.open(site.path).split_key == site.split_key


def test_one_command_closes_all_of_it(site: SiteFolder) -> None:
    for place in (site.path, *(site.path / name for name in FILES)):
        place.chmod(0o755)
    with pytest.raises(SiteError) as refused:
        SiteFolder.open(site.path)
    assert os.system(str(refused.value).partition("run: ")[2]) == 0
    SiteFolder.open(site.path)


def test_no_error_holds_a_secret(site: SiteFolder) -> None:
    (site.path / "key").write_bytes(b"SECRET" * 9)
    with pytest.raises(SiteError) as refused:
        SiteFolder.open(site.path)
    assert "SECRET" not in str(refused.value)


def update(config: RunConfig, key: bytes) -> Arrays:
    return clients.site.work(
        instruction_of(config), SITE, start(config), clients.site.Own(split_key=key)
    ).delta


@pytest.mark.parametrize("number", range(count(1, 5)))
def test_the_split_of_a_site_with_a_folder_is_its_folder_s(
    number: int, site: SiteFolder, tmp_path: Path
) -> None:
    """The patients that this key holds out are the scored ones, and do not reach the update."""
    del number
    records = rows()
    config = table_config(write(tmp_path / "t.csv", records), "privacy.seeded=true")
    names = list(dict.fromkeys(record["id"] for record in records if record["site"] == SITE))
    held = hash_split(names, fraction=0.34, key=site.split_key)
    out = {name for name, hit in zip(names, held, strict=True) if hit}
    scored = clients.site.score(
        instruction_of(config), SITE, start(config), clients.site.Own(split_key=site.split_key)
    )
    assert scored.records == sum(record["id"] in out for record in records)
    before = update(config, site.split_key)
    changed = [record | {"age": "7"} if record["id"] in out else record for record in records]
    config = table_config(write(tmp_path / "t.csv", changed), "privacy.seeded=true")
    after = update(config, site.split_key)
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}
    other = update(config, bytes(32))
    assert any((other[name] != after[name]).any() for name in after)
    # Nobody asked for the simulated site's key.
    assert not (tmp_path / "fedmed-home").exists()
