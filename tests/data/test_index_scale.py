"""Damaged, unfinished, shared, stopped, huge: what an index of a real crawl meets."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash

from ldm import cli
from ldm.data.counting import count_shards
from ldm.data.hashes import hash_text
from ldm.data.index import FOLDER, build_index
from ldm.data.parts import write_table
from ldm.data.reader import ShardReader
from ldm.data.table import Index, name_index, open_index, save_index
from ldm.errors import InputError

HTML = b"<!DOCTYPE html><html>" + b"x" * 5000


def headers(data, suffix):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [m.offset_data - 512 for m in tar.getmembers() if m.name.endswith(suffix)]


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def wipe(data, at):
    return data[:at] + bytes(512) + data[at + 512 :]


def repacked(data, order):
    """The members of a tar in another order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=buffer, mode="w") as new:
        for member in order(old.getmembers()):
            new.addfile(member, old.extractfile(member))
    return buffer.getvalue()


DAMAGES = {  # name: change, reasons, byte offset of the first, samples lost of 5
    "cut on a member's boundary": (lambda d: d[: headers(d, ".png")[3]], {"truncated"}, 2),
    "cut in a header": (lambda d: d[: headers(d, ".png")[3] + 40], {"truncated"}, 2),
    "cut in data": (lambda d: d[: headers(d, ".png")[3] + 530], {"truncated"}, 2),
    "flipped header byte": (lambda d: flip(d, headers(d, ".png")[2]), {"bad_header", "no_image"}, 1),
    "zeroed block": (lambda d: wipe(d, headers(d, ".txt")[2]), {"bad_header", "no_caption"}, 1),
    "empty file": (lambda d: b"", {"empty"}, 5),
    "gzip": (gzip.compress, {"gzip"}, 5),
    "html page": (lambda d: HTML, {"not_tar"}, 5),
    "unordered": (
        lambda d: repacked(d, lambda m: sorted(m, key=lambda x: x.name[-3:])),
        {"no_caption", "unordered"},
        5,
    ),
    "duplicate key": (lambda d: repacked(d, lambda m: [*m[:3], *m]), {"duplicate"}, 0),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_reported_with_shard_and_offset(write, sample, name):
    change, reasons, lost = DAMAGES[name]
    good = write("s/0.tar", [sample(i) for i in range(5)])
    bad = good.with_name("1.tar")
    bad.write_bytes(change(good.read_bytes()))
    index = build_index(str(good.parent))
    assert set(index.damage) == reasons
    assert {problem.shard for problem in index.problems} == {"1.tar"}
    assert all(0 <= problem.offset <= bad.stat().st_size for problem in index.problems)
    assert index.counts.tolist() == [5, 5 - lost]
    raws = ShardReader(index, ("image", "caption", "json"))(np.arange(len(index)))
    assert [raw.reason for raw in raws] == [""] * len(index)  # what is in the index can be read
    for row, raw in zip(index.samples, raws, strict=True):
        for kind, data in raw.parts.items():
            assert row[f"{kind}_check"] == xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


def spoiled(index):
    """How many of the samples cannot be had, or not as they were, now that a shard is damaged."""
    raws = ShardReader(index, ("image", "caption"))(np.arange(len(index)))
    count = 0
    for row, raw in zip(index.samples, raws, strict=True):
        checks = {k: xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF for k, data in raw.parts.items()}
        count += bool(raw.reason) or any(row[f"{kind}_check"] != check for kind, check in checks.items())
    return count


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (lambda d: flip(d, headers(d, ".png")[2] + 520), 1),  # in a picture
        (lambda d: wipe(d, headers(d, ".txt")[3] + 512), 1),  # a caption's block
        (lambda d: flip(d, headers(d, ".png")[2]), 0),  # in a header, which nobody reads again
        (lambda d: repacked(d, lambda m: [*m[3:6], *m[:3], *m[6:]]), 2),  # same size, two samples swapped
        (lambda d: d[:-512], 5),  # another size: not the file that was indexed
        (lambda d: HTML, 5),
    ],
)
def test_damage_after_indexing_costs_the_samples_that_it_hit(write, sample, change, lost):
    path = write("s/0.tar", [sample(i) for i in range(5)])
    index = build_index(str(path))
    times = path.stat()
    path.write_bytes(change(path.read_bytes()))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a bad disk would leave it
    assert spoiled(index) == lost


def test_without_checksums_only_headers_are_known(shards):
    quick = build_index(str(shards), checksums=False)
    assert not quick.checked
    assert not quick.samples["image_check"].any()
    assert quick.samples["caption_check"].all()  # texts are read anyway
    whole = build_index(str(shards))  # what was stored knows too little
    assert whole.checked
    assert whole.samples["image_check"].all()
    assert whole.digest == quick.digest
    assert build_index(str(shards), checksums=False).checked  # but what knows more will do


def test_arrays_stand_for_a_picture(tmp_path, write):
    meta = json.dumps({"width": 64, "height": 32, "original_width": 128, "caption_length": 9}).encode()
    samples = [{"__key__": f"{i}", "moments.npy": bytes(500), "json": meta} for i in range(2)]
    samples[1] |= {"context.npy": b"abc", "txt": "four"}
    index = build_index(str(write("a.tar", [*samples, {"__key__": "2", "json": meta}])))
    assert index.damage == {"no_image": 1}
    assert sorted(index.kinds()) == ["caption", "context", "json", "moments"]
    assert "image_offset" not in index.samples.dtype.names
    assert index.samples["context_size"].tolist() == [0, 3]
    facts = ("width", "height", "original_width", "original_height", "caption_length")
    assert [int(index[name][0]) for name in facts] == [64, 32, 128, 32, 9]
    assert index["caption_length"].tolist() == [9, 4]
    raw = ShardReader(index, ("moments", "json"))(np.array([1]))[0]
    assert raw.parts == {"moments": bytes(500), "json": meta}


def test_hashes_for_opt_outs(write, sample):
    items = [sample(0, url="https://WWW.x.org/a.jpg", md5="AB" * 16), sample(1, url=None)]
    index = build_index(str(write("a.tar", items)))
    assert index["url"].tolist() == [hash_text("https://WWW.x.org/a.jpg"), 0]
    assert index["domain"].tolist() == [hash_text("x.org"), 0]
    assert index["picture"].tolist() == [hash_text("ab" * 16), 0]
    assert index["url"].dtype == np.uint64


# ---- img2dataset's files


def finished(folder, name, count):
    (folder / f"{name}_stats.json").write_text(json.dumps({"count": count + 3, "successes": count}))


def test_stats_are_compared_with_what_is_there(shards):
    for name, count in (("00000", 23), ("00001", 33), ("00003", 11)):
        finished(shards, name, count)
    index = build_index(str(shards))
    assert index.damage == {"count_mismatch": 3}
    assert index.problems[0][:3] == ("00001.tar", "", "count_mismatch")


def test_an_unfinished_download_is_refused(shards, capsys):
    finished(shards, "00000", 23)
    finished(shards, "00001", 30)
    with pytest.raises(InputError) as caught:
        build_index(str(shards))
    said = "00003.tar has no 00003_stats.json: download not finished; finish it or "
    assert str(caught.value) == f"data.shards: {said}set data.allow_incomplete=true"
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", "index", str(shards)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"ldm: error: shards: {said}pass --allow-incomplete\n"
    assert not (shards / FOLDER).exists()  # nothing was read for it
    assert len(build_index(str(shards), allow_incomplete=True)) == 64
    with pytest.raises(InputError, match="download not finished"):
        build_index(str(shards))  # also from the cache


def parquet(path, **columns):
    table = pytest.importorskip("pyarrow").table(columns)
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, path)


def test_tables_beside_a_shard_become_columns(shards, capsys):
    keys = [f"{i:09d}" for i in range(64)]
    parquet(
        shards / "00000.parquet",
        key=[*keys[:23][::-1], "999"],  # any order, and downloads that failed
        status=["success"] * 23 + ["failed_to_download"],
        width=[16] * 23 + [None],
        AESTHETIC_SCORE=[9.0] + [None] * 23,
        similarity=[i / 10 for i in range(24)],
        hash=[2**60] * 24,
    )
    before = build_index(str(shards))
    assert before["AESTHETIC_SCORE"][[0, 1, 22]].tolist() == [0, 0.25, 9.0]  # the json's where it has none
    assert before["similarity"][:3].tolist() == pytest.approx([2.2, 2.1, 2.0])
    assert np.isnan(before["similarity"][23:]).all()
    assert "hash" not in before.scores()
    assert before["width"].tolist() == [16] * 64
    parquet(shards / "00000_scores.parquet", key=keys[:23], similarity=[0.5] * 23, blur=[True] * 23)
    after = build_index(str(shards))  # a new table is seen
    assert after["similarity"][:23].tolist() == [0.5] * 23
    assert after["blur"][:23].tolist() == [1] * 23
    assert after.digest != before.digest
    (shards / "00001.parquet").write_bytes(b"no table")
    with pytest.raises(InputError, match=r"00001.parquet: not a table \(.*\); make it again, or remove it"):
        build_index(str(shards))


def test_count_opens_no_tar(shards, capsys):
    for name, count in (("00000", 23), ("00001", 30)):
        finished(shards, name, count)
        parquet(
            shards / f"{name}.parquet",
            key=[f"{i}" for i in range(count + 3)],
            width=[10] * count + [None] * 3,
            AESTHETIC_SCORE=[i / 4 for i in range(count + 3)],
        )
        (shards / f"{name}.tar").write_bytes(b"")
    command = ["data", "index", str(shards), "--count"]
    assert cli.main([*command, "--where", "aesthetic>=5", "--where", "width<11"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["2", "53", "13", "13", "1"]  # 3 + 10 of 23 and 30
    with pytest.raises(SystemExit):
        cli.main([*command, "--where", "height>1"])
    assert (
        "00000.tar has no table with 'height' beside it; it has: width, AESTHETIC" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        cli.main([*command, "--where", "height"])
    assert "--where height: no comparison of a column; for example" in capsys.readouterr().err


# ---- many processes and machines


def rows_of(index):
    return index.samples.tobytes(), index.digest, index.shards


def test_a_count_that_storage_fails_is_one_line(shards, monkeypatch):
    def failing(self):
        raise OSError("503 Service Unavailable")

    monkeypatch.setattr("ldm.data.counting.Sidecars.promised", failing)
    with pytest.raises(
        InputError, match="beside .*tar cannot be read: 503 Service Unavailable; run it again"
    ):
        count_shards(str(shards))


def test_processes_and_tasks_make_the_same_index(shards, tmp_path, capsys, monkeypatch):
    expected = rows_of(build_index(str(shards), tmp_path / "alone"))
    assert rows_of(build_index(str(shards), tmp_path / "pool", processes=2)) == expected
    out = str(tmp_path / "tasks")
    command = ["data", "index", str(shards), "--out", out, "--processes", "1"]
    assert cli.main([*command, "--task", "1/2"]) == 0
    assert "task 1 of 2: 1 of 3 shards done; the last task joins all" in capsys.readouterr().out
    assert not (tmp_path / "tasks" / "index.json").exists()
    for name, value in (("ID", "7"), ("MIN", "7"), ("COUNT", "2")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert cli.main(command) == 0
    assert f"use it with data.shards={out}" in capsys.readouterr().out
    assert rows_of(build_index(out)) == expected
    with pytest.raises(SystemExit):
        cli.main([*command, "--task", "2/2"])
    assert "--task 2/2: expected I/N with 0 <= I < N" in capsys.readouterr().err


def test_bad_shards_in_other_processes_are_one_line(shards):
    (shards / "00004.tar").write_bytes((shards / "00000.tar").read_bytes())
    (shards / "00004.parquet").write_bytes(b"no table")
    with pytest.raises(InputError, match="00004.parquet: not a table"):
        build_index(str(shards), processes=2)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(write, sample, tmp_path):
    for number in range(12):
        write(f"set/{number:05d}.tar", [sample(number * 40 + i) for i in range(40)])
    folder, out = tmp_path / "set", tmp_path / "out"
    expected = rows_of(build_index(str(folder), tmp_path / "alone"))
    command = [sys.executable, "-m", "ldm.cli", "data", "index", str(folder), "--out", str(out)]
    random = np.random.default_rng(0)
    for _ in range(6):
        process = subprocess.Popen(
            [*command, "--processes", "2"], start_new_session=True, stdout=-3, stderr=-3
        )
        time.sleep(0.6 + 2 * random.random())
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, stdout=-3)
    assert rows_of(build_index(str(out))) == expected


# ---- index folders


@pytest.fixture
def named(shards, tmp_path):
    out = tmp_path / "set" / "index"
    assert cli.main(["data", "index", str(shards), "--out", str(out), "--processes", "1"]) == 0
    return out


def test_an_index_folder_stands_for_its_shards(shards, named, tmp_path):
    index = build_index(str(named))
    assert index.shards == [str(shards / f"{name}.tar") for name in ("00000", "00001", "00003")]
    assert index.known(0).size == (shards / "00000.tar").stat().st_size
    assert len(ShardReader(index)(np.array([0]))[0].parts["image"])
    moved = shards.rename(tmp_path / "moved")
    assert build_index(str(moved / "index")).shards[0] == str(moved / "00000.tar")
    alone = (moved / "index").rename(tmp_path / "alone")
    moved.rename(shards)
    assert build_index(str(alone)).shards[0] == str(shards / "00000.tar")  # where they were


def test_a_stale_index_is_one_line(shards, named):
    size = (shards / "00001.tar").stat().st_size
    with open(shards / "00001.tar", "ab") as file:
        file.write(bytes(512))
    message = f"data.shards: shard 00001.tar is {size + 512:,} bytes, index says {size:,}; re-index"
    with pytest.raises(InputError, match=message):
        build_index(str(named))
    (named / "index.json").write_text("{}")
    with pytest.raises(InputError, match="holds no index of this version; run ldm data index again"):
        build_index(str(named))


SHARDS, EACH = 231_350, 8_000
PROOF = """
import sys, time, numpy, pathlib
import ldm.data.selection, ldm.data.table, ldm.data.plan
def grown():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1e3
before, begun, used = grown(), time.perf_counter(), time.process_time()
index = ldm.data.table.open_index(pathlib.Path(sys.argv[1]))
selection = ldm.data.selection.select(index)
constants = ldm.data.plan.plan_constants(len(selection), index.mean_bytes, 2048)
stream = ldm.data.plan.Stream(selection.counts, *constants)
rows = selection.rows[stream.places(numpy.arange(2048))[1]]
keys = index.keys(rows[:8])
print(len(index), grown() - before, time.process_time() - used, time.perf_counter() - begun)
"""


def test_an_index_of_laions_size_loads_in_a_second(tmp_path):
    """231,350 shards, 1.85e9 samples: the table is a sparse file, all else is real."""
    fields = [("key", "S9"), ("image_offset", "i8"), ("image_size", "i4"), ("image_check", "u4")]
    path, total = tmp_path / "index-0.npy", SHARDS * EACH
    with open(path, "wb") as file:
        write_table(file, iter(()), tuple(fields), total)
        file.truncate(file.tell() + total * np.dtype(fields).itemsize)
    sizes = np.full(SHARDS, 400_000_000, np.int64)
    index = Index(
        samples=np.empty(0, fields),
        shards=[f"s3://bucket/laion2B-en/{i:06d}.tar" for i in range(SHARDS)],
        counts=np.full(SHARDS, EACH),
        sizes=sizes,
        tags=np.full(SHARDS, b"0" * 34),
        digest="0",
        path=path,
    )
    save_index(index, path)
    name_index(index, tmp_path)
    assert len(open_index(tmp_path)) == total
    done = subprocess.run(
        [sys.executable, "-c", PROOF, str(tmp_path)], capture_output=True, text=True, check=True
    )
    count, megabytes, seconds, wall = map(float, done.stdout.split())
    print(f"{count:,.0f} samples: {megabytes:.0f} MB, {seconds:.2f} s of a core, {wall:.2f} s by the clock")
    assert count == total
    assert megabytes < 100
    assert seconds < 1  # of a core: by the clock it is as much, unless the machine has other work


def test_behind_a_web_server(shards, web):
    urls = [f"{web.url}/set/{name}.tar" for name in ("00000", "00001", "00003")]
    finished(shards, "00001", 30)
    finished(shards, "00000", 23)
    finished(shards, "00003", 11)
    local = build_index(str(shards))
    remote = build_index(urls, shards / "remote")
    assert remote.samples.tobytes() == local.samples.tobytes()
    assert remote.digest == local.digest
    assert web.requests["/set/00001.tar"] <= 4  # its size, and all of it, not one a header
    assert {raw.reason for raw in ShardReader(local)(np.arange(64))} == {""}
    (shards / "00003_stats.json").unlink()
    with pytest.raises(InputError, match="00003.tar has no 00003_stats.json"):
        build_index(urls, shards / "again")


def test_path_of_cached_table_is_beside_the_shards(shards):
    assert build_index(str(shards)).path.parent == Path(shards) / FOLDER
