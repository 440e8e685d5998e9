"""Files are replaced whole, and what the disk says of them is heard."""

import errno
import os
import stat

import pytest

from distilcb.durability import sync, write_durably


def failing(number, is_concerned):
    def fsync(descriptor):
        if is_concerned(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    return fsync


@pytest.mark.parametrize(("content", "written"), [("été\n", "été\n".encode()), (b"\x00\xff", b"\x00\xff")])
def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path, content, written):
    (tmp_path / "a").write_text("before")
    write_durably(tmp_path / "a", content)
    assert (tmp_path / "a").read_bytes() == written
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_a_file_that_does_not_reach_the_disk_leaves_the_one_before(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("before")
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC, stat.S_ISREG))
    with pytest.raises(OSError, match="No space left"):
        write_durably(tmp_path / "a", "after")
    assert (tmp_path / "a").read_text() == "before"


def test_a_file_system_that_cannot_sync_folders_is_written_to_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL, stat.S_ISDIR))
    write_durably(tmp_path / "a", "after")
    assert (tmp_path / "a").read_text() == "after"
    monkeypatch.setattr(os, "fsync", failing(errno.EIO, stat.S_ISDIR))
    with pytest.raises(OSError, match="Input/output error"):
        sync(tmp_path)
