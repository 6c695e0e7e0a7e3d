"""Files are read by lines as they are, and written whole or not at all."""

import contextlib
import errno
import os
import signal
import stat

import pytest

from base import errors, files
from helpers.processes import assert_user_error, run_script, write_script


def test_read_lines_ends_lines_at_line_feeds_alone(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("a\u2028b\x0bc\r\nd\n\ne".encode())
    assert list(files.read_lines(str(path))) == [(1, "a\u2028b\x0bc"), (2, "d"), (3, ""), (4, "e")]
    path.write_bytes(b"fine\n\xff\n")
    with pytest.raises(errors.UserError, match="not UTF-8"):
        list(files.read_lines(str(path)))
    with pytest.raises(errors.UserError, match="--data .*missing: .*No such file"):
        list(files.read_lines(str(tmp_path / "missing"), "--data"))
    with pytest.raises(errors.UserError, match="Is a directory"):
        list(files.read_lines(str(tmp_path), "--data"))


@pytest.mark.parametrize("content, lines", [
    (b"\xef\xbb\xbfa\r\nb\n", ["a", "b"]), (b"a\r\r\nb\r", ["a", "b"]), ("a\ufeffb\n".encode(), ["a\ufeffb"]),
])
def test_a_byte_order_mark_and_the_ends_of_lines_are_no_text(tmp_path, content, lines):
    (tmp_path / "text").write_bytes(content)
    assert [line for _, line in files.read_lines(str(tmp_path / "text"))] == lines


@pytest.mark.parametrize("content, words", [
    (b"a\rb\rc\r", ":1: carriage returns inside the line, got 'a.rb.rc'"), (b"a\r\nb\rc\n", ":2: carriage returns"),
    (b"a\nb\n\xef\xbb\xbfc\n", r":3: begins with a byte-order mark \(U\+FEFF\)"),
    (b"\xef\xbb\xbf\xef\xbb\xbfa\n", ":1: begins with a byte-order"),
    (b"a\nb\0c\n", ":2: holds NUL"), ("text\n".encode("utf-16-le"), ":1: holds NUL"),
    ("text\n".encode("utf-16"), ":1: not UTF-8 .byte 0xff"),
])
def test_what_nobody_sees_in_a_text_is_refused_by_name(tmp_path, content, words):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(errors.UserError, match=f"text{words}"):
        list(files.read_lines(str(tmp_path / "text")))


def test_json_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "object").write_text("\ufeff{}", encoding="utf-8")
    assert files.read_object(str(tmp_path / "object"), "one") == {}


def test_atomic_write_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    with files.atomic_write(str(path)) as handle:
        handle.write("old\r\n")
        assert not path.exists()
    assert path.read_bytes() == b"old\r\n"
    with pytest.raises(ZeroDivisionError), files.atomic_write(str(path), "wb") as handle:
        handle.write(b"half")
        _ = 1 // 0
    assert path.read_bytes() == b"old\r\n" and os.listdir(tmp_path) == ["file"]


def test_atomic_write_survives_a_kill_and_a_full_disk(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    script = write_script(tmp_path / "script.py", """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if sys.argv[2] == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with files.atomic_write(sys.argv[1], "wb") as handle:
            handle.write(b"x" * 100000)
            handle.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        """)
    assert run_script(script, path, "kill").returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    partial = [name for name in os.listdir(tmp_path) if name.endswith(".partial")]
    assert len(partial) == 1
    os.unlink(tmp_path / partial[0])
    assert_user_error(run_script(script, path, "full"), os.strerror(errno.EFBIG))
    assert path.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["file", "script.py"]


@pytest.mark.parametrize("number, folder_alone, done", [
    (errno.EINVAL, True, True), (errno.EINVAL, False, True), (errno.EOPNOTSUPP, False, True),
    (errno.ENOSYS, True, True),
    (errno.EIO, True, False), (errno.EDQUOT, False, False),
])
def test_a_file_system_that_cannot_sync(tmp_path, monkeypatch, number, folder_alone, done):
    """A call that is not there is no error; one that is there and fails is."""
    real = os.fsync

    def fsync(handle):
        if folder_alone and not stat.S_ISDIR(os.fstat(handle).st_mode):
            return real(handle)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with contextlib.nullcontext() if done else pytest.raises(OSError, match=os.strerror(number)):
        with files.atomic_write(str(tmp_path / "file")) as handle:
            handle.write("new")
        assert not files.sync_folder(str(tmp_path))
    assert (tmp_path / "file").exists() == (done or folder_alone)


@pytest.mark.parametrize("number, found", [(errno.ENOLCK, False), (errno.ENOSYS, False), (errno.EOPNOTSUPP, False),
                                           (errno.EWOULDBLOCK, None), (errno.EIO, None)])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number, found):
    def flock(handle, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with open(tmp_path / "file", "w") as handle, contextlib.nullcontext() if found is False else pytest.raises(OSError):
        assert files.lock(handle.fileno()) is found
