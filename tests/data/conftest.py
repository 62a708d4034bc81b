import io
import json
import uuid

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from tests.data.servers import s3_server, web_server


@pytest.fixture
def picture():
    """(width, height, number) -> bytes of a picture in one colour that tells the number."""

    def make(width=16, height=12, number=0, extension="png", **options):
        colour = (number % 256, number // 256 % 256, 7 * number % 256)
        buffer = io.BytesIO()
        image = Image.new("RGB", (width, height), colour)
        image.save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension], **options)
        return buffer.getvalue()

    return make


@pytest.fixture
def sample(picture):
    """number -> one sample as img2dataset writes it, for `wds.TarWriter`; extra json fields by keyword."""

    def make(number, key=None, width=16, height=12, extension="png", caption=None, **meta):
        facts = {"url": f"http://x/{number}", "status": "success", "width": width, "height": height}
        facts |= {"original_width": 4 * width, "original_height": 4 * height, "hash": 2**60 + number}
        return {
            "__key__": key or f"{number:09d}",
            extension: picture(width, height, number, extension),
            "txt": caption or f"picture {number}",
            "json": json.dumps(facts | meta).encode(),
        }

    return make


@pytest.fixture
def write(tmp_path):
    """(name, samples) -> path of a tar of them."""

    def make(name, samples):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with wds.TarWriter(str(path)) as tar:
            for item in samples:
                tar.write(item)
        return path

    return make


@pytest.fixture
def shards(write, sample):
    """Folder of three uneven shards, 64 samples, the last without scores."""
    number = 0
    for name, count in (("00000", 23), ("00001", 30), ("00003", 11)):
        scores = [{"AESTHETIC_SCORE": i / 4, "punsafe": 0.1} for i in range(count)]
        if name == "00003":
            scores = [{}] * count
        path = write(f"set/{name}.tar", [sample(number + i, **scores[i]) for i in range(count)])
        number += count
    return path.parent


@pytest.fixture
def number_of():
    """Image of a batch [3 H W] in one colour -> the number of its sample."""
    return lambda image: int(np.asarray(image)[0, 0, 0]) + 256 * int(np.asarray(image)[1, 0, 0])


@pytest.fixture
def web(tmp_path):
    """A web server of the files under tmp_path."""
    with web_server(tmp_path) as server:
        yield server


@pytest.fixture(scope="session")
def s3():
    """The endpoint of an S3 that the environment points to."""
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3):
    """(path of a file, key) -> its url in an S3 bucket of this test."""
    import boto3

    client, name = boto3.client("s3"), f"b-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=name)

    def put(path, key):
        client.upload_file(str(path), name, key)
        return f"s3://{name}/{key}"

    yield put
    client.close()
