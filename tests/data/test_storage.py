"""Naming shards, their sizes and ranges of their bytes: local, from a web server, from an S3."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from ldm.data.remote import fetch
from ldm.data.storage import ChangedError, ReadAhead, expand, is_remote, open_shard, stat, stats
from ldm.errors import InputError

BYTES = np.random.default_rng(0).bytes(300_000)
NAMES = ("00000", "00001", "00003")


def test_ways_to_name_shards(shards, monkeypatch, caplog):
    every = [str(shards / f"{name}.tar") for name in ("00000", "00001", "00003")]
    assert expand(str(shards)) == expand(f"{shards}/*.tar") == expand(every) == expand(shards) == every
    monkeypatch.chdir(shards)
    assert expand("0000[01].tar") == expand(["00000.tar", "00001.tar"]) == every[:2]
    assert expand("{00000..00003}.tar") == every
    assert "1 of 4 paths do not exist" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("/d/{00000..00009}.tar", r"data.shards: no shard matches '/d/\{0.*\}.tar' \(checked 10 paths\)"),
        ("/d/*.tar", r"data.shards: no shard matches '/d/\*.tar' \(checked 1 paths\)"),
        (["/d/a.tar", "/d/b.tar"], r"data.shards\[0\]: no shard matches"),
        (
            ["pipe:cat x", "b"],
            r"data.shards\[0\]: pipe: URLs run a shell; set data.allow_pipe=true only for URLs you wrote",
        ),
        ("http://x/*.tar", r"data.shards: 'http://x/\*.tar' .* a web server lists none; name the shards"),
        ("http://x/set/", r"data.shards: 'http://x/set/' .* a web server lists none; name the shards"),
        ("nfs4://x/0.tar", r"nfs4://x/0.tar: unknown protocol nfs4://; use"),
        ("{1..2.tar", r"data.shards: .*"),
        ([], r"data.shards: no shards given; set data.shards="),
        ([__file__, __file__], "is given twice"),
    ],
)
def test_wrong_shards_are_named(given, message):
    with pytest.raises(InputError, match=message):
        expand(given)


@pytest.fixture(params=["local", "http", "s3", "memory"])
def placed(request, tmp_path):
    """The same three files in each kind of place -> (their urls, url of their folder)."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i, name in enumerate(NAMES):
        (folder / f"{name}.tar").write_bytes(BYTES[i:])
    (folder / "00000_stats.json").write_text("{}")
    if request.param == "local":
        return [str(folder / f"{name}.tar") for name in NAMES], str(folder)
    if request.param == "http":
        root = request.getfixturevalue("web").url + "/set"
        return [f"{root}/{name}.tar" for name in NAMES], root
    if request.param == "s3":
        put = request.getfixturevalue("bucket")
        urls = [put(path, f"set/{path.name}") for path in sorted(folder.iterdir())]
    else:
        import fsspec

        urls = [f"memory:///{path.relative_to(tmp_path.parent)}" for path in sorted(folder.iterdir())]
        fsspec.filesystem("memory").pipe(dict(zip(urls, [BYTES, b"{}", BYTES[1:], BYTES[2:]], strict=True)))
    return [url for url in urls if url.endswith(".tar")], urls[0].rpartition("/")[0]


def test_places_are_expanded_alike(placed, caplog):
    urls, folder = placed
    assert expand(urls) == expand(folder + "/{00000..00003}.tar") == expand(folder + "/{00000..00020}.tar")
    assert expand(urls) == urls
    assert "18 of 21 paths do not exist" in caplog.text
    if not folder.startswith("http"):
        assert expand(folder) == expand(folder + "/*.tar") == expand(folder + "/0000?.tar") == urls
    with pytest.raises(InputError, match=r"no shard matches '.*/9.tar' \(checked 1 paths\)"):
        expand(folder + "/9.tar")
    assert all(is_remote(url) == ("://" in url) for url in urls)


def test_ranges_are_those_of_the_file(placed):
    urls, _ = placed
    assert [s.size for s in stats(urls)] == [300_000, 299_999, 299_998]
    assert all(s.tag for s in stats(urls))
    shard = open_shard(urls[1])
    assert shard.size == 299_999
    ranges = [(0, 1), (0, 0), (17, 4096), (299_998, 1), (0, 299_999)]
    for start, size in ranges:
        assert shard.read(start, size) == BYTES[1 + start : 1 + start + size]
    with pytest.raises(OSError, match=r"got|416|InvalidRange|Invalid"):
        shard.read(299_000, 2000)
    shard.close()


def test_reading_ahead_is_reading(placed):
    shard = open_shard(placed[0][0])
    with ReadAhead(shard, chunk=40_000) as file:
        assert file.read(10) + file.read(100_000) == BYTES[:100_010]
        assert file.seek(-5, os.SEEK_END) == 299_995
        assert file.read() == BYTES[-5:]
        assert file.read(1) == b""
        assert file.seek(39_990) == file.tell() == 39_990
        assert file.read(20) == BYTES[39_990:40_010]
    shard.close()


def test_many_threads_read_one_shard(placed):
    shard, wrong = open_shard(placed[0][0]), []

    def read(k):
        for i in range(k, 300_000, 30_000):
            if shard.read(i, 1000) != BYTES[i : i + 1000]:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(1000 * k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    shard.close()


@pytest.mark.parametrize(
    ("placed", "method"),
    [("http", "fork"), ("http", "spawn"), ("http", "forkserver"), ("s3", "fork"), ("s3", "spawn")],
    indirect=["placed"],
)
def test_other_processes_read_after_this_one_has(placed, method):
    urls, _ = placed
    facts = stats(urls)
    here = [fetch(url, 5, 1000, 30.0, known) for url, known in zip(urls, facts, strict=True)]
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        jobs = [pool.submit(fetch, url, 5, 1000, 30.0, known) for url, known in zip(urls, facts, strict=True)]
        assert [job.result(60) for job in jobs] == here == [BYTES[i + 5 : i + 1005] for i in range(3)]
    assert open_shard(urls[0]).read(7, 9) == BYTES[7:16]  # and this one still can


def test_what_a_web_server_answers(web, tmp_path):
    (tmp_path / "a.tar").write_bytes(BYTES)
    (tmp_path / "empty.tar").write_bytes(b"")
    assert stat(f"{web.url}/empty.tar").size == 0
    with pytest.raises(FileNotFoundError, match="404"):
        open_shard(f"{web.url}/b.tar")
    with pytest.raises(PermissionError, match="403"):
        open_shard(f"{web.url}/secret/a.tar")
    with pytest.raises(OSError, match="whole files only"):
        open_shard(f"{web.url}/whole/a.tar")
    with pytest.raises(OSError, match="cut/a.tar"):
        open_shard(f"{web.url}/cut/a.tar").read(0, 100_000)
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer in 0.5 s"):
        open_shard(f"{web.url}/stalled/a.tar", timeout=0.5)
    assert time.monotonic() - begun < 5
    with pytest.raises(OSError, match="127.0.0.1:9"):
        open_shard("http://127.0.0.1:9/a.tar")


def test_sizes_are_remembered(web, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.tar").write_bytes(BYTES)
    urls = expand(f"{web.url}/{{0..2}}.tar")
    stats(urls)
    shards = [open_shard(url) for url in urls]
    assert web.requests.total() == 3
    shards[0].read(0, 100)
    assert web.requests.total() == 4


def test_a_file_that_changes_on_the_server_is_noticed(web, tmp_path):
    (tmp_path / "a.tar").write_bytes(BYTES)
    before = stat(f"{web.url}/a.tar")
    shard = open_shard(f"{web.url}/a.tar")
    (tmp_path / "a.tar").write_bytes(BYTES[::-1])
    os.utime(tmp_path / "a.tar", (1, 1))
    with pytest.raises(ChangedError, match="has changed"):
        shard.read(0, 10)
    assert expand(f"{web.url}/a.tar")
    assert stat(f"{web.url}/a.tar").tag != before.tag


def line(*shards):
    """What a user is told of wrong shards."""
    with pytest.raises(InputError) as error:
        stats(expand(shards))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_wrong_urls_are_one_line(web, bucket, tmp_path):
    (tmp_path / "a.tar").write_bytes(BYTES)
    there = bucket(tmp_path / "a.tar", "a.tar")
    assert line(f"{web.url}/secret/a.tar").endswith("HTTP 403 FORBIDDEN; check that you may read it")
    assert "the server gives whole files only" in line(f"{web.url}/whole/a.tar")
    secret = web.url.replace("//", "//me:word@") + "/b.tar?token=abc"
    assert line(secret) == f"data.shards: no shard matches '{web.url}/b.tar' (checked 1 paths)"
    assert "no shard matches 's3:" in line(there + ".gz")
    assert "no shard matches 's3:" in line(there.removesuffix("a.tar") + "*.gz")
    assert "data.shards[1]: no shard matches 's3://no-such-bucket" in line(there, "s3://no-such-bucket/a")


def test_a_folder_that_may_not_be_listed_is_named():
    code = "import os, sys; from ldm.errors import reported; from ldm.data.storage import expand\n"
    code += "os.getuid() or os.setuid(65534)  # root may\nwith reported(): expand(sys.argv[1])"
    with tempfile.TemporaryDirectory() as folder:  # tmp_path itself is closed to others
        os.chmod(folder, 0o755)
        secret = os.path.join(folder, "secret")
        os.mkdir(secret, 0)
        done = subprocess.run([sys.executable, "-c", code, secret], capture_output=True, text=True)
    what = f"ldm: error: data.shards: {secret}: Permission denied; check that you may read it\n"
    assert (done.returncode, done.stderr) == (2, what)


def test_without_the_extra_packages():
    """`import ldm` needs neither, and a url names what to install."""
    code = "import sys; sys.modules['s3fs'] = None; from ldm.data.storage import expand\n"
    code += "assert 'fsspec' not in sys.modules\nexpand(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, "s3://b/a.tar"], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert "InputError: s3://b/a.tar: s3:// needs a package that is not installed" in last
    assert last.endswith('; pip install "ldm[remote]"')
