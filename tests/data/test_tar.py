import io
import tarfile

import pytest

from ldm.data.tar import Damage, Member, number, parse, walk


def tar_of(files, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


FILES = [(f"{i:03d}.bin", bytes([i + 1]) * (700 + 300 * i)) for i in range(5)]
PLAIN = tar_of(FILES, format=tarfile.USTAR_FORMAT)  # header of member i at STARTS[i]
STARTS = [sum(512 + -(-len(data) // 512) * 512 for _, data in FILES[:i]) for i in range(6)]


def found(data):
    items = list(walk(io.BytesIO(data), len(data)))
    names = [item.name for item in items if isinstance(item, Member)]
    return names, [item for item in items if isinstance(item, Damage)]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_every_format(kind):
    files = [*FILES, ("a" * 90 + "/" + "b" * 90 + ".bin", b"long name")]
    data = tar_of(files, format=kind)
    members = list(walk(io.BytesIO(data), len(data)))
    assert [m.name for m in members] == [name for name, _ in files]
    assert [data[m.offset : m.offset + m.size] for m in members] == [content for _, content in files]


def test_only_regular_files():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("x.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert found(buffer.getvalue()) == ([], [])


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


ALL = [name for name, _ in FILES]


@pytest.mark.parametrize(
    ("data", "names", "damage"),
    [
        (PLAIN, ALL, []),
        (PLAIN[: STARTS[3]], ALL[:3], [Damage("truncated", STARTS[3])]),  # on a member's boundary
        (PLAIN[: STARTS[3] + 100], ALL[:3], [Damage("truncated", STARTS[3])]),  # in a header
        (PLAIN[: STARTS[3] + 600], ALL[:3], [Damage("truncated", STARTS[3] + 512)]),  # in data
        (PLAIN[: STARTS[5]] + bytes(512), ALL, [Damage("truncated", STARTS[5] + 512)]),  # half an end marker
        (flip(PLAIN, STARTS[2] + 3), [*ALL[:2], *ALL[3:]], [Damage("bad_header", STARTS[2])]),  # in a name
        (flip(PLAIN, STARTS[0] + 130), ALL[1:], [Damage("bad_header", 0)]),  # in a size
        (flip(PLAIN, STARTS[4] + 150), ALL[:4], [Damage("bad_header", STARTS[4])]),  # in a checksum
        (
            PLAIN[: STARTS[2]] + bytes(512) + PLAIN[STARTS[2] + 512 :],  # a zeroed header: tarfile's end
            [*ALL[:2], *ALL[3:]],
            [Damage("bad_header", STARTS[2])],
        ),
        (
            PLAIN[: STARTS[2]] + bytes(STARTS[3] - STARTS[2]) + PLAIN[STARTS[3] :],  # a zeroed member
            [*ALL[:2], *ALL[3:]],
            [Damage("bad_header", STARTS[2])],
        ),
        (b"", [], [Damage("truncated", 0)]),
    ],
)
def test_damage_is_found_and_the_rest_is_read(data, names, damage):
    assert found(data) == (names, damage)


def test_a_size_beyond_the_file_is_damage():
    header = bytearray(PLAIN[:512])
    header[124:136] = b"\x80" + (1 << 40).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    assert parse(bytes(header)).size == 1 << 40
    assert found(bytes(header) + PLAIN[512:]) == ([], [Damage("truncated", 512)])


@pytest.mark.parametrize(
    ("field", "value"),
    [(b"0000644\0", 0o644), (b"\0" * 8, 0), (b"0000008\0", None), (b"\xff" * 12, None), (b"-0000001", None)],
)
def test_number(field, value):
    assert number(field) == value


def test_broken_pax_records_do_not_rename():
    data = tar_of([("\u00e9.bin", b"1")], format=tarfile.PAX_FORMAT)
    at = data.index(b"path=")
    names, damage = found(data[: at - 3] + b"99 " + data[at:])
    assert len(names) == 1
    assert names != ["\u00e9.bin"]
    assert not damage
