import gzip
import io
import json
import logging
import os
import pickle
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ldm.data import scanning as module
from ldm.data.index import FOLDER, build_index
from ldm.data.scan import Problem, scan_shard
from ldm.errors import InputError


@pytest.fixture
def scanned(monkeypatch):
    """Names of the shards that were read, in order."""
    names = []
    monkeypatch.setattr(
        module,
        "scan_shard",
        lambda path, checksums: names.append(Path(path).name) or scan_shard(path, checksums),
    )
    return names


def test_rows_say_where_and_what(shards):
    index = build_index(str(shards))
    assert [Path(p).name for p in index.shards] == ["00000.tar", "00001.tar", "00003.tar"]
    assert index.counts.tolist() == [23, 30, 11]
    assert len(index) == 64
    assert not index.damage
    row = index.samples[25]
    data = (shards / "00001.tar").read_bytes()
    assert data[row["image_offset"] :][: row["image_size"]].startswith(b"\x89PNG")
    assert data[row["caption_offset"] :][: row["caption_size"]] == b"picture 25"
    assert json.loads(data[row["json_offset"] :][: row["json_size"]])["url"] == "http://x/25"
    sizes = ("width", "height", "original_width", "original_height", "caption_length")
    assert [int(row[name]) for name in sizes] == [16, 12, 64, 48, 10]
    assert index.keys(np.array([0, 63])) == ["00000/000000000", "00003/000000063"]
    assert index.shard_of(np.array([0, 22, 23, 63])).tolist() == [0, 0, 1, 2]


def test_scores_come_from_the_json_and_missing_is_nan(shards):
    index = build_index(str(shards))
    assert index.scores() == ["AESTHETIC_SCORE", "punsafe"]  # not the url, not the 60-bit hash
    assert index["AESTHETIC_SCORE"].dtype == np.float32
    assert index["AESTHETIC_SCORE"][:4].tolist() == [0, 0.25, 0.5, 0.75]
    assert np.isnan(index["punsafe"][53:]).all()
    assert not np.isnan(index["punsafe"][:53]).any()


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        ("aesthetic", "aesthetic"),
        ("aesthetic", "AESTHETIC_SCORE"),
        ("aesthetic", "aesthetic_score_laion_v2"),
        ("punsafe", "PUNSAFE"),
        ("punsafe", "nsfw_score_opennsfw2"),
        ("pwatermark", "watermark_score"),
        ("similarity", "clip_similarity_vitb32"),
    ],
)
def test_aliases_of_the_releases(write, sample, name, alias):
    index = build_index(str(write("a.tar", [sample(i, **{alias: i / 8}) for i in range(3)])))
    assert index[name].tolist() == [0, 0.125, 0.25]


def test_the_users_own_names_come_first_and_shards_may_differ(write, sample):
    write("s/0.tar", [sample(0, aesthetic=1.0, mine=2.0)])
    folder = write("s/1.tar", [sample(1, AESTHETIC_SCORE=3.0, mine=None)]).parent
    assert build_index(str(folder))["aesthetic"].tolist() == [1, 3]
    assert build_index(str(folder), names={"aesthetic": "mine"})["aesthetic"].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"s": 1}, 1.0),
        ({"s": True}, 1.0),
        ({"s": None}, None),
        ({"s": "0.5"}, None),
        ({"s": [1]}, None),
        ({"s": float("nan")}, None),
        ({"s": float("inf")}, None),
        ({"s": 10**400}, None),
    ],
)
def test_what_counts_as_a_number(write, sample, meta, expected):
    index = build_index(str(write("a.tar", [sample(0, other=1, **meta), sample(1, s=2, other=1)])))
    value = float(index["s"][0])
    assert np.isnan(value) if expected is None else value == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"txt": None}, "no_caption"),
        ({"png": None}, "no_image"),
        ({"json": b"{"}, "bad_json"),
        ({"json": b"[" * 100_000}, "bad_json"),
        ({"json": b"[1]"}, "bad_json"),
        ({"json": b'{"a": 1' + b"0" * 5000 + b"}"}, "bad_json"),  # Python's limit on digits
        ({"json": b" " * (2 << 20)}, "too_large"),
        ({"png": b"<html>"}, "not_image"),
        ({"png": b""}, "not_image"),
        ({"txt": b"\xff\xfe\xff"}, "bad_caption"),
        ({"__key__": "../../etc/x"}, "bad_name"),
        ({"__key__": "a b"}, "bad_name"),
        ({"__key__": "k" * 200}, "bad_name"),
        ({"__key__": "000000001"}, "duplicate"),
    ],
)
def test_a_damaged_sample_is_left_out_and_counted(write, sample, caplog, change, reason):
    def clean(item):
        return {name: value for name, value in item.items() if value is not None}

    bad = clean(sample(2) | change)
    index = build_index(str(write("a.tar", [sample(0), sample(1), bad, sample(3)])))
    assert len(index) == 3
    assert index.damage == {reason: 1}
    assert index.problems[0][:3] == ("a.tar", bad["__key__"].lstrip("./"), reason) or reason == "bad_name"
    problem = index.problems[0]
    assert f"left out a.tar/{problem.key}: {reason} at byte {problem.offset}" in caplog.text
    assert f"left out: {reason} 1" in index.summary()


def test_a_sample_without_json_is_fine(write, sample):
    item = sample(0)
    del item["json"]
    index = build_index(str(write("a.tar", [item, sample(1, aesthetic=5)])))
    assert index.samples["json_size"].tolist()[0] == 0
    assert np.isnan(index["aesthetic"][0])
    assert index["original_width"].tolist() == [16, 64]


def test_too_many_pixels(write, sample, picture):
    wide = sample(0) | {"png": picture(60_000, 1000)}
    assert build_index(str(write("a.tar", [wide, sample(1)]))).damage == {"too_large": 1}


def test_long_headers_are_read_whole(write, sample, picture):
    item = sample(0) | {"jpg": picture(20, 10, extension="jpg", icc_profile=bytes(50_000))}
    del item["png"]
    index = build_index(str(write("a.tar", [item, sample(1, extension="webp", width=30)])))
    assert index["width"].tolist() == [20, 30]


def test_other_members_are_skipped(write, sample):
    index = build_index(str(write("a.tar", [sample(0) | {"cls": b"7", "npy": b"x"}, sample(1)])))
    assert len(index) == 2
    assert not index.damage


def test_unordered_tar(tmp_path, write, sample):
    with tarfile.open(write("a.tar", [sample(i) for i in range(3)])) as ordered:
        members = [(m, ordered.extractfile(m).read()) for m in ordered.getmembers()]
    members.sort(key=lambda pair: pair[0].name.rpartition(".")[2])
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    part = scan_shard(tmp_path / "b.tar")
    assert len(part.samples) == 0
    assert part.damage["unordered"] == 6


def headers(data, suffix):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [m.offset_data - 512 for m in tar.getmembers() if m.name.endswith(suffix)]


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def wipe(data, at):
    return data[:at] + bytes(512) + data[at + 512 :]


@pytest.mark.parametrize(
    ("damage", "kept", "expected"),
    [
        (lambda d: d[: headers(d, ".json")[3] - 1024], 2, {"truncated": 2}),  # between samples: 2 may be cut
        (lambda d: d[: headers(d, ".png")[3]], 3, {"truncated": 2}),  # between members
        (lambda d: d[: headers(d, ".png")[3] + 40], 3, {"truncated": 2}),  # in a header
        (lambda d: d[: headers(d, ".png")[3] + 530], 3, {"truncated": 2}),  # in data
        (lambda d: flip(d, headers(d, ".png")[2]), 4, {"bad_header": 1, "no_image": 1}),
        (lambda d: flip(d, headers(d, ".txt")[2] + 125), 4, {"bad_header": 1, "no_caption": 1}),
        (lambda d: wipe(d, headers(d, ".txt")[2]), 4, {"bad_header": 1, "no_caption": 1}),
        (lambda d: b"<!DOCTYPE html><html>" + b"x" * 5000, 0, {"not_tar": 1}),
        (lambda d: b"", 0, {"empty": 1}),
        (lambda d: bytes(10240), 0, {"not_tar": 1}),
    ],
)
def test_damaged_tars_are_found(write, sample, damage, kept, expected):
    good = write("s/0.tar", [sample(i) for i in range(5)])
    bad = good.with_name("1.tar")
    bad.write_bytes(damage(good.read_bytes()))
    index = build_index(str(good.parent))
    assert index.counts.tolist() == [5, kept]
    assert index.damage == expected
    assert all(problem.shard == "1.tar" for problem in index.problems)


def test_gzip_is_refused(write, sample):
    path = write("a.tar", [sample(0)])
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match="no good sample in .*; left out: gzip 1; unpack them with gunzip$"):
        build_index(str(path))


def test_no_good_sample_is_an_error(write, sample):
    item = sample(0)
    del item["txt"]
    with pytest.raises(InputError, match="no good sample in 1 shards, 0 samples; left out: no_caption 1"):
        build_index(str(write("a.tar", [item])))


# ---- the cache


def test_a_hit_reads_no_tar_and_a_new_shard_is_read_alone(shards, write, sample, scanned):
    first = build_index(str(shards))
    assert scanned == ["00000.tar", "00001.tar", "00003.tar"]
    assert (shards / FOLDER).is_dir()
    again = build_index(str(shards))
    assert len(scanned) == 3
    assert (again.samples == first.samples).all() or np.isnan(first["punsafe"]).any()
    assert again.samples.tobytes() == first.samples.tobytes()
    assert (again.digest, again.shards, again.damage) == (first.digest, first.shards, Counter())
    write("set/00004.tar", [sample(100)])
    more = build_index(str(shards))
    assert scanned[3:] == ["00004.tar"]
    assert len(more) == 65
    assert more.digest != first.digest


def test_damage_is_remembered(shards, scanned, write, sample):
    write("set/00004.tar", [sample(100) | {"json": b"{"}, sample(101)])
    assert build_index(str(shards)).damage == build_index(str(shards)).damage == {"bad_json": 1}
    assert isinstance(build_index(str(shards)).problems[0], Problem)
    assert len(scanned) == 4


def test_a_changed_shard_is_read_again(shards, scanned, write, sample):
    before = build_index(str(shards)).digest
    write("set/00001.tar", [sample(i, caption="other") for i in range(23, 53)])
    assert build_index(str(shards)).digest != before
    assert scanned[3:] == ["00001.tar"]


def test_digest_is_of_content_not_of_place(shards, tmp_path, scanned):
    before = build_index(str(shards))
    moved = Path(shutil.copytree(shards, tmp_path / "elsewhere"))  # keeps times of change, and the cache
    after = build_index(str(moved))
    assert len(scanned) == 3
    assert after.digest == before.digest
    assert after.shards[0].startswith(str(moved))
    shutil.rmtree(moved / FOLDER)
    assert build_index(str(moved)).digest == before.digest


def test_order_of_shards_is_part_of_the_digest(shards):
    paths = [str(shards / f"{name}.tar") for name in ("00000", "00001")]
    assert build_index(paths).digest != build_index(paths[::-1]).digest


def test_broken_cache_files_are_made_again(shards, scanned):
    build_index(str(shards))
    for path in [*(shards / FOLDER).glob("*.json"), *(shards / FOLDER / "parts").glob("00001-*")]:
        path.write_bytes(path.read_bytes()[:40])
    assert len(build_index(str(shards))) == 64
    assert scanned[3:] == ["00001.tar"]


def test_cache_folder_falls_back(shards, tmp_path, monkeypatch, scanned):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (shards / FOLDER).write_text("a file in the way")
    index = build_index(str(shards))
    assert index.path.is_relative_to(tmp_path / "home")
    build_index(str(shards))
    assert len(scanned) == 3


def test_without_any_cache_the_index_stays_in_memory(shards, tmp_path, caplog):
    (tmp_path / "no").write_text("")
    index = build_index(str(shards), tmp_path / "no" / "cache")
    assert index.path is None
    assert len(pickle.loads(pickle.dumps(index)).samples) == 64
    assert "index not cached" in caplog.text


def test_workers_map_the_table_instead_of_copying(shards, tmp_path):
    index = build_index(str(shards), tmp_path / "cache")
    data = pickle.dumps(index)
    assert len(data) < index.samples.nbytes
    copy = pickle.loads(data)
    assert isinstance(copy.samples.base, np.memmap)
    assert copy.samples.tobytes() == index.samples.tobytes()


def test_progress_bar_appears_when_it_takes_long(shards, monkeypatch, capsys):
    build_index(str(shards), progress=True)
    assert "indexing" not in capsys.readouterr().err
    shutil.rmtree(shards / FOLDER)
    monkeypatch.setattr(module, "PATIENCE", -1.0)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    build_index(str(shards), progress=True)
    assert "indexing shards" in capsys.readouterr().err
    shutil.rmtree(shards / FOLDER)
    build_index(str(shards), progress=False)
    assert "indexing" not in capsys.readouterr().err


# ---- which shards


def test_an_unreadable_shard_is_named(shards, monkeypatch):
    def denied(path, checksums):
        raise PermissionError(13, os.strerror(13), path)

    monkeypatch.setattr(module, "scan_shard", denied)
    with pytest.raises(InputError, match=r"00000.tar: Permission denied"):
        build_index(str(shards))


def test_a_full_disk_is_one_line_and_what_is_indexed_stays(shards, monkeypatch):
    original, saved = module.save_part, []

    def full(part, path):
        if saved:
            raise OSError(28, os.strerror(28))
        saved.append(path)
        return original(part, path)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_part", full)
        with pytest.raises(InputError, match="cannot be written: No space left on device; make room"):
            build_index(str(shards))
    assert saved[0].exists()
    assert len(build_index(str(shards))) == 64


def test_log_of_a_build(shards, caplog):
    with caplog.at_level(logging.INFO, logger="ldm.data.index"):
        build_index(str(shards))
    assert "indexed 3 shards, 64 samples" in caplog.text
