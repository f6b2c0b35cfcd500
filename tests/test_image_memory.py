"""Memory of images: a small file may be a large image, and many threads decode at once."""

import concurrent.futures
import io
import threading

import pytest
from PIL import Image

from hovle_jax.data import images
from hovle_jax.data.bad_samples import BadSample
from hovle_jax.data.files.records import parse, sizes_of
from hovle_jax.data.images import decode_image, decoded_image, image_size
from hovle_jax.system.budget import Budget
from tests import broken
from tests.source_files import reader_of


def of_one_colour(width, height):
    """A PNG of a few bytes for each thousand pixels."""
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_large_image_is_refused_by_its_header(monkeypatch):
    bomb = broken.png(13_000, 13_000)  # 169 million pixels
    for read in (image_size, decode_image):
        with pytest.raises(
            BadSample, match="decompression_bomb: 13000 x 13000 pixels, and at most 67,108,864 are read"
        ):
            read(bomb)
    assert image_size(bomb, max_pixels=2**28) == (13_000, 13_000)
    reader = reader_of(max_pixels=100)
    record = parse({"image": of_one_colour(20, 20), "conversations": broken.turns("hi", "yes")})
    for ask in (lambda: reader.needs(record), lambda: reader.make(record, None)):
        with pytest.raises(BadSample, match="20 x 20 pixels, and at most 100 are read"):
            ask()
    assert sizes_of(record) == ((20, 20),)


class Watched(Budget):
    """Notes the most that was taken at any time."""

    most = 0

    def of(self, size):
        inner = super().of(size)

        class Noted:
            def __enter__(noted):
                inner.__enter__()
                self.most = max(self.most, self._used)

            def __exit__(noted, *error):
                return inner.__exit__(*error)

        return Noted()


def test_large_images_wait_for_room(monkeypatch):
    """Sixteen threads, images of 24 kB in memory each, and room for two."""
    data = of_one_colour(60, 50)
    budget = Watched(50_000)
    monkeypatch.setattr(images, "DECODING", budget)
    monkeypatch.setattr(images, "LARGE", 1000)
    record = parse({"image": [data] * 3, "conversations": broken.turns("hi", "yes")})
    reader = reader_of()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: reader.make(record, None), range(32)))
    assert len(made) == 32 and 24_000 <= budget.most <= 50_000 and budget._used == 0
    decode_image(of_one_colour(30, 30))
    with decoded_image(data) as image:
        assert image.size == (60, 50) and budget._used == 24_000
    with pytest.raises(ValueError):
        image.getpixel((0, 0))  # its memory is gone


def test_what_is_larger_than_the_budget_is_alone():
    budget, inside = Budget(10), threading.Event()

    def small():
        with budget.of(1):
            inside.set()

    with budget.of(1000):
        thread = threading.Thread(target=small)
        thread.start()
        assert not inside.wait(0.05)
    thread.join(30)
    assert inside.is_set()
