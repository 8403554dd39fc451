"""The disk port: one contract for both twins, and what the in-memory one can do beyond it."""

import errno
import random

import numpy as np
import pytest

from tallymark_runtime.disk import Disk, DiskError, DiskFullError, FileMissingError, MemoryDisk, RealDisk


@pytest.fixture(params=["real", "memory"])
def disk(request, tmp_path):
    """Each twin in turn."""
    return RealDisk(tmp_path / "root") if request.param == "real" else MemoryDisk()


def test_written_parts_are_read_back_joined(disk):
    """Parts of every kind of buffer land one after the other."""
    file = disk.create("a")
    file.write(3, [b"one", bytearray(b"two"), memoryview(b"three"), np.frombuffer(b"four", np.uint8), b""])
    assert file.read(0, 100).tobytes() == b"\0\0\0onetwothreefour"
    assert file.size() == 18
    file.write_sync(0, [b"xyz"])
    file.sync()
    assert file.read(2, 4).tobytes() == b"zone"
    assert file.name == "a"
    file.close()
    file.close()


def test_more_parts_than_one_call_takes(disk):
    """Thousands of parts are written whole, with and without sync."""
    file = disk.create("a")
    parts = [bytes([number % 251]) * (number % 3) for number in range(3_500)]
    file.write(5, parts)
    expected = b"".join(parts)
    assert file.read(5, len(expected)).tobytes() == expected
    file.write_sync(1, parts)
    assert file.read(1, len(expected)).tobytes() == expected
    file.close()


def test_reading_past_the_end_is_short(disk):
    """A read returns what there is."""
    file = disk.create("a")
    file.write(0, [b"abc"])
    assert file.read(2, 5).tobytes() == b"c"
    assert len(file.read(3, 5)) == 0
    assert len(file.read(10, 5)) == 0
    file.close()


def test_truncate_cuts_and_extends_with_zeros(disk):
    """Truncation works both ways."""
    file = disk.create("a")
    file.write(0, [b"abcdef"])
    file.truncate(2)
    file.truncate(4)
    assert file.read(0, 9).tobytes() == b"ab\0\0"
    file.close()


def test_a_map_shows_later_writes_and_outlives_the_file(disk):
    """Views stay good after close and removal, and can't be written through."""
    file = disk.create("a")
    file.write(0, [bytes(64)])
    view = file.map()
    file.write(10, [b"late"])
    file.close()
    disk.remove("a")
    assert view[10:14].tobytes() == b"late"
    with pytest.raises(ValueError):
        view[0] = 1


def test_an_empty_file_maps_to_nothing(disk):
    """Mapping needs no special case at the caller."""
    file = disk.create("a")
    assert len(file.map()) == 0
    file.close()


def test_names(disk):
    """Create, list, rename over another, remove."""
    for name in ("b", "a", "c"):
        file = disk.create(name)
        file.write(0, [name.encode()])
        file.close()
    assert disk.list() == ["a", "b", "c"]
    disk.rename("a", "c")
    disk.remove("b")
    disk.sync_dir()
    assert disk.list() == ["c"]
    file = disk.open("c")
    assert file.read(0, 9).tobytes() == b"a"
    file.close()


def test_create_empties_an_existing_file(disk):
    """A second creation starts over."""
    file = disk.create("a")
    file.write(0, [b"abc"])
    file.close()
    file = disk.create("a")
    assert file.size() == 0
    file.close()


def test_folders_are_apart(disk):
    """A folder's files show in it alone, and the same folder is found again."""
    inner = disk.at("wal")
    inner.create("x").close()
    disk.create("y").close()
    assert disk.list() == ["y"]
    assert disk.at("wal").list() == ["x"]


def test_missing_files(disk):
    """Whatever needs a file says that it is missing."""
    with pytest.raises(FileMissingError) as caught:
        disk.open("nothing")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(FileMissingError):
        disk.remove("nothing")
    with pytest.raises(FileMissingError):
        disk.rename("nothing", "something")


def test_a_folder_is_locked_once(disk):
    """The second taker is refused."""
    disk.lock("LOCK")
    with pytest.raises(DiskError) as caught:
        disk.lock("LOCK")
    assert caught.value.errno == errno.EWOULDBLOCK


def test_free_bytes_is_a_number(disk):
    """There is some room in a test."""
    assert disk.free_bytes() > 0


def test_capacity_bounds_growth_only():
    """A full disk refuses to grow a file and still overwrites one."""
    disk = MemoryDisk(capacity=100)
    file = disk.create("a")
    file.write(0, [bytes(90)])
    assert disk.free_bytes() == 10
    with pytest.raises(DiskFullError):
        disk.create("b").write(0, [bytes(11)])
    file.write(0, [b"x" * 90])
    disk.capacity = 200
    disk.open("b").write(0, [bytes(11)])
    assert disk.free_bytes() == 99


def test_synced_bytes_and_names_survive_every_crash():
    """What the contract calls durable is there after any crash."""
    for seed in range(50):
        disk = MemoryDisk()
        file = disk.create("a")
        file.write(0, [b"x" * 2000])
        file.sync()
        file.write_sync(100, [b"y" * 10])
        disk.sync_dir()
        file.write(1000, [b"z" * 500])
        disk.crash(random.Random(seed))
        data = disk.open("a").read(0, 5000).tobytes()
        assert data[:1000] == b"x" * 100 + b"y" * 10 + b"x" * 890
        assert set(data[1000:1500]) <= set(b"xz")
        assert data[1500:] == b"x" * 500


def test_unsynced_bytes_are_lost_kept_or_torn():
    """Over many crashes every fate turns up."""
    fates = set()
    for seed in range(200):
        disk = MemoryDisk()
        file = disk.create("a")
        file.write(0, [bytes(2048)])
        file.sync()
        disk.sync_dir()
        file.write(0, [b"z" * 2048])
        disk.crash(random.Random(seed))
        count = disk.open("a").read(0, 2048).tobytes().count(b"z")
        fates.add("lost" if count == 0 else "kept" if count == 2048 else "torn")
    assert fates == {"lost", "kept", "torn"}


def test_names_need_their_folder_synced():
    """Without the folder's sync a name may be lost; with `lose_all` it is."""
    disk = MemoryDisk()
    file = disk.create("a")
    file.write(0, [b"abc"])
    file.sync()
    disk.sync_dir()
    disk.rename("a", "b")
    disk.create("c")
    disk.crash(random.Random(1), lose_all=True)
    assert disk.list() == ["a"]
    disk.rename("a", "b")
    disk.sync_dir()
    disk.crash(random.Random(1), lose_all=True)
    assert disk.list() == ["b"]


def test_a_synced_write_is_not_undone_by_an_older_one():
    """An unsynced write under a synced one can't come up again."""
    for seed in range(30):
        disk = MemoryDisk()
        file = disk.create("a")
        disk.sync_dir()
        file.write(0, [b"old" * 10])
        file.write_sync(0, [b"new" * 10])
        disk.crash(random.Random(seed))
        assert disk.open("a").read(0, 30).tobytes() == b"new" * 10


def test_failures_happen_once_and_where_they_were_asked_for():
    """A planned failure hits the named file's next such operation."""
    disk = MemoryDisk()
    file = disk.create("abc")
    disk.fail_next("write", name="b")
    disk.fail_next("sync", name="zzz")
    file.sync()
    with pytest.raises(DiskError) as caught:
        file.write(0, [b"x"])
    assert caught.value.errno == errno.EIO
    file.write(0, [b"x"])


def test_bits_flip_and_files_are_cut():
    """Rot shows at once and after a crash."""
    disk = MemoryDisk()
    file = disk.create("a")
    file.write(0, [bytes(8)])
    disk.sync_dir()
    disk.flip_bit("a", 3, 2)
    disk.overwrite("a", 6, b"Q")
    disk.cut("a", 7)
    assert disk.open("a").read(0, 9).tobytes() == b"\0\0\0\x04\0\0Q"
    disk.crash(random.Random(0))
    assert disk.open("a").read(0, 9).tobytes() == b"\0\0\0\x04\0\0Q"


def test_unlocking_lets_another_in(disk: Disk) -> None:
    """What `lock` took is free again after `unlock`, before the process ends."""
    folder = disk.at("guarded")
    folder.lock("LOCK")
    with pytest.raises(DiskError):
        disk.at("guarded").lock("LOCK")
    folder.unlock()
    again = disk.at("guarded")
    again.lock("LOCK")
    again.unlock()
