"""`fp-client join` against a real TLS enrollment port."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import resource
import stat

import pytest
from fake_ca import FakeCa
from fake_server import SECRET, serving

from common.errors import IdentityError, TokenError, UnreachableError
from common.transport import tls
from common.transport.wire import Backoff
from fp_client.config import load_config
from fp_client.enroll import join, write_server
from fp_client.rpc import Connection
from tests.unit.disk import Disk

QUICK = Backoff(first=0.01, longest=0.02, attempts=3)
MINE = '# mine\nserver = "here:1"\n[budget]\nhost = "1GiB"\n'


def test_join_fills_the_directory_and_the_certificate_opens_a_session(tmp_path):
    async def main():
        async with serving() as server:
            joined = await join(server.token(), tmp_path / "d", QUICK)
            assert (joined.name, joined.role, joined.server) == ("alice", "device", server.address)
            connection = Connection(tmp_path / "d", server.address)
            session = await connection.open()
            assert session.device == "alice"
            await session.close()
            await connection.close()

    asyncio.run(main())
    assert stat.S_IMODE((tmp_path / "d/device.key").stat().st_mode) == 0o600
    assert load_config(tmp_path / "d").server.startswith("localhost:")


def test_another_ca_is_refused_before_the_secret_is_said(tmp_path):
    async def main():
        async with serving() as server:
            with pytest.raises(IdentityError, match="CA is not the token's"):
                await join(server.token(ca=FakeCa.make().digest), tmp_path, QUICK)
            assert server.enrollment.requests == []

    asyncio.run(main())


def test_a_server_that_shows_the_right_ca_but_has_no_certificate_of_it_learns_nothing(tmp_path):
    """A man in the middle can show the real CA; only its key is missing to him."""

    async def main():
        real = FakeCa.make()
        async with serving(FakeCa.make(), shown_ca=real) as server:
            with pytest.raises((IdentityError, UnreachableError)):
                await join(server.token(ca=real.digest), tmp_path, QUICK)
            assert server.enrollment.requests == []

    asyncio.run(main())


def test_a_second_ca_behind_the_right_one_is_not_trusted(tmp_path):
    """A man in the middle shows the token's CA with his own behind it in one text, and a certificate of his own."""

    async def main():
        real, mine = FakeCa.make(), FakeCa.make()

        class Both:
            pem = real.pem + mine.pem

        async with serving(mine, shown_ca=Both()) as server:
            with pytest.raises((IdentityError, UnreachableError)):
                await join(server.token(ca=real.digest), tmp_path, QUICK)
            assert server.enrollment.requests == []
        assert not (tmp_path / "ca.pem").exists()

    asyncio.run(main())


def test_only_the_cas_own_certificate_is_kept_of_what_the_server_shows(tmp_path):
    async def main():
        real = FakeCa.make()

        class Both:
            pem = real.pem + FakeCa.make().pem

        async with serving(real, shown_ca=Both()) as server:
            await join(server.token(), tmp_path / "d", QUICK)
        assert (tmp_path / "d" / "ca.pem").read_bytes() == real.pem

    asyncio.run(main())


@pytest.mark.parametrize("text", ["", "fp1.", "fp1.abc", "hello", "fp1." + "A" * 5000])
def test_what_is_no_token(tmp_path, text):
    with pytest.raises(TokenError, match="not a join token"):
        asyncio.run(join(text, tmp_path))


def test_a_used_or_unknown_token(tmp_path):
    async def main():
        async with serving() as server:
            with pytest.raises(TokenError, match="unknown, used or expired"):
                await join(server.token(secret="x" * 43), tmp_path, QUICK)
            assert not (tmp_path / "device.pem").exists()

    asyncio.run(main())


def test_a_lost_reply_is_retried_with_the_same_key(tmp_path):
    async def main():
        async with serving() as server:
            server.enrollment.lose_replies = 1
            await join(server.token(), tmp_path, QUICK)
            first, second = server.enrollment.requests
            assert first.secret == SECRET and first.csr_pem == second.csr_pem

    asyncio.run(main())


def test_a_lost_reply_can_be_retried_by_a_second_command(tmp_path):
    async def main():
        async with serving() as server:
            server.enrollment.lose_replies = 3
            with pytest.raises(UnreachableError):
                await join(server.token(), tmp_path, QUICK)
            key = (tmp_path / "device.key").read_bytes()
            await join(server.token(), tmp_path, QUICK)
            assert (tmp_path / "device.key").read_bytes() == key

    asyncio.run(main())


def test_a_directory_that_has_joined_is_left_alone(tmp_path):
    async def main():
        async with serving() as server:
            await join(server.token(), tmp_path, QUICK)
            with pytest.raises(IdentityError, match="already joined"):
                await join(server.token(), tmp_path, QUICK)

    asyncio.run(main())


def test_nobody_listens(tmp_path):
    async def main():
        async with serving() as server:
            token = server.token(enroll="localhost:1")
        with pytest.raises(UnreachableError, match="localhost:1"):
            await join(token, tmp_path, QUICK)

    asyncio.run(main())


def test_the_secret_and_the_key_are_in_no_message(tmp_path, caplog):
    async def main():
        said: list[str] = []
        async with serving() as server:
            await join(server.token(), tmp_path, QUICK, said.append)
        return said

    text = "\n".join(asyncio.run(main())) + caplog.text
    assert SECRET not in text and "PRIVATE" not in text and "fp1." not in text


def test_join_keeps_what_the_owner_wrote(tmp_path):
    path = tmp_path / "client.toml"
    path.write_text('# mine\nserver = "old:1"\nthreads = 2\n\n[budget]\nhost = "1GiB"  # enough\n')
    write_server(path, "new:2")
    assert path.read_text() == '# mine\nserver = "new:2"\nthreads = 2\n\n[budget]\nhost = "1GiB"  # enough\n'
    path.write_text('[budget]\nhost = "1GiB"\n')
    write_server(path, "new:2")
    assert load_config(tmp_path).server == "new:2"
    assert load_config(tmp_path).budget.host == 1 << 30


def test_a_configuration_that_names_the_server_already_is_not_written_and_may_be_read_only(tmp_path, monkeypatch):
    """As a container's client.toml is, mounted from outside."""
    path = tmp_path / "client.toml"
    path.write_text(MINE)
    real = type(path).open

    def read_only(self, mode="r", *rest, **named):
        if self == path and mode not in ("r", "rb"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(self, mode, *rest, **named)

    monkeypatch.setattr(type(path), "open", read_only)
    write_server(path, "here:1")
    with pytest.raises(OSError, match="Read-only"):
        write_server(path, "there:1")
    assert path.read_text() == MINE and [p.name for p in tmp_path.iterdir()] == ["client.toml"]


def test_a_disk_that_is_full_leaves_the_owners_configuration_as_it_was(tmp_path):
    path = tmp_path / "client.toml"
    path.write_text(MINE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_server(path, "there:1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == MINE and [p.name for p in tmp_path.iterdir()] == ["client.toml"]


def test_a_configuration_is_replaced_in_one_step_and_for_good(tmp_path, monkeypatch):
    path = tmp_path / "client.toml"
    path.write_text(MINE)
    (tmp_path / "client.toml.tmp").write_text("left by a crash")
    disk = Disk(tmp_path, monkeypatch)
    disk.contents[path.stat().st_ino] = path.read_bytes()
    with path.open() as before:
        write_server(path, "there:1")
        assert before.read() == MINE, "the old file was not touched"
    assert disk.after_the_power_went() == {"client.toml": MINE.replace("here", "there").encode()}


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_a_configuration_keeps_its_mode_its_owner_and_its_place(tmp_path, mode):
    (tmp_path / "kept").mkdir()
    path, link = tmp_path / "kept/mine.toml", tmp_path / "client.toml"
    path.write_text(MINE)
    path.chmod(mode)
    if os.getuid() == 0:
        os.chown(path, 1234, 1235)
    before = path.stat()
    link.symlink_to(path)
    write_server(link, "there:1")
    after = path.stat()
    assert link.is_symlink() and load_config(tmp_path).server == "there:1" and after.st_ino != before.st_ino
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def busy(path, target):
    """`Path.replace`, of a file that is mounted by itself."""
    raise OSError(errno.EBUSY, "Device or resource busy", str(path), None, str(target))


def test_a_configuration_mounted_by_itself_is_written_in_place(tmp_path, monkeypatch):
    path = tmp_path / "client.toml"
    path.write_text(MINE)

    monkeypatch.setattr(type(path), "replace", busy)
    write_server(path, "there:1")
    assert load_config(tmp_path).server == "there:1" and [p.name for p in tmp_path.iterdir()] == ["client.toml"]


@pytest.mark.parametrize("written", [0, 10, 10_000])
def test_a_configuration_mounted_by_itself_is_put_back_when_the_disk_is_full(tmp_path, monkeypatch, written):
    """Of the new text only so many bytes can be written; what it held has its blocks."""
    path = tmp_path / "client.toml"
    path.write_text(MINE)
    room = [written]

    class Full(io.FileIO):
        def write(self, data):
            if room and len(data) > room[0]:
                room.clear()
                super().write(bytes(data)[:written])
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(type(path), "replace", busy)
    usual = type(path).open
    monkeypatch.setattr(type(path), "open", lambda self, *a, **k: Full(self, "r+") if "buffering" in k else usual(self, *a, **k))
    if written < len(MINE):
        with pytest.raises(OSError, match="No space"):
            write_server(path, "there:1")
        assert path.read_text() == MINE
    else:
        write_server(path, "there:1")
        assert load_config(tmp_path).server == "there:1"


def test_the_example_configuration_is_valid_with_and_without_its_comments(tmp_path):
    import re

    path = tmp_path / "client.toml"
    write_server(path, "host:1")
    assert load_config(tmp_path).server == "host:1"
    path.write_text(re.sub(r"(?m)^# (?=\[|[a-z_]+ = )", "", path.read_text()))
    config = load_config(tmp_path)
    assert config.models and config.data is not None and config.budget.device == 3 * 10**9


def test_key_file_is_never_readable_by_others(tmp_path):
    tls.write_private(tmp_path / "k", b"x")
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
