"""Corpora in which samples are broken in as many ways as we could think of, each named after its kind."""

import dataclasses
import functools
import io
import json
import struct
import tarfile
import zlib

import numpy as np

SIDE = 32  # of a good image


@dataclasses.dataclass(frozen=True)
class Broken:
    """A sample that cannot be used.

    Attributes:
      name: the kind's.
      reasons: that fit; one of them is to be reported.
      row: a dict, or a line's bytes where it is no JSON object that can be written.
      image: bytes of the image that it names, if it is of its own.
    """

    name: str
    reasons: tuple
    row: dict | bytes
    image: bytes | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Images


def pixels(seed, width=SIDE, height=SIDE):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(seed=0, format="PNG", mode="RGB", size=(SIDE, SIDE), **options):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels(seed, *size)).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def png(width, height, *chunks):
    """A PNG of these chunks after a header that states this size."""
    made = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks, (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in made
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _bmp(width, height):
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


@functools.cache
def broken_images():
    """{kind: (bytes, reasons)}"""
    whole_png, jpeg = encoded(0), encoded(0, "JPEG")
    checksum = bytearray(whole_png)
    checksum[whole_png.index(b"IDAT") + 10] ^= 0xFF
    gif = encoded(0, "GIF", "P")
    lzw = gif.index(b"\x2c", 13 + 768)  # the first frame's descriptor
    huge_text = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**22)))
    cut = ("truncated_image", "broken_image")
    header = ("broken_image", "not_an_image", "truncated_image")
    return {
        "image_of_no_bytes": (b"", ("empty_image",)),
        "web_page_as_jpg": (b"<!doctype html><html><body>404 Not Found</body></html>", ("not_an_image",)),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', ("not_an_image",)),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", ("not_an_image",)),
        "random_bytes": (pixels(7).tobytes(), ("not_an_image",)),
        "jpeg_cut_in_half": (jpeg[: len(jpeg) // 2], cut),
        "jpeg_cut_in_header": (jpeg[:12], header),
        "png_cut_in_half": (whole_png[: len(whole_png) // 2], cut),
        "png_cut_in_header": (whole_png[:20], header),
        "webp_cut_in_half": (encoded(0, "WEBP", lossless=True)[:900], header),
        "png_with_wrong_checksum": (bytes(checksum), ("broken_image",)),
        "png_without_data": (png(SIDE, SIDE), header),
        "bomb_by_header": (png(60_000, 60_000), ("decompression_bomb",)),
        "bomb_just_above_what_pillow_warns_of": (png(13_400, 13_400), ("decompression_bomb",)),
        "bmp_of_2_billion_rows": (_bmp(2**31 - 1, 2**31 - 1), ("decompression_bomb",)),
        "png_text_bomb": (png(SIDE, SIDE, huge_text), ("broken_image",)),
        "png_of_no_width": (png(0, SIDE), ("zero_size", "broken_image", "not_an_image")),
        "bmp_of_no_height": (_bmp(SIDE, 0), ("zero_size", "broken_image", "not_an_image")),
        "gif_broken_in_first_frame": (gif[: lzw + 14], header),
        "gif_without_frames": (gif[:lzw] + b"\x3b", header),
        "tiff_with_nonsense_offsets": (b"II*\0" + struct.pack("<I", 2**31) + bytes(64), header),
        "tiff_cut_in_half": (encoded(0, "TIFF")[-1000:].rjust(1008, b"\0"), ("not_an_image",)),
        "tiff_without_pixels": (encoded(0, "TIFF", compression="tiff_lzw")[:400], header),
        "jpeg2000_cut": (encoded(0, "JPEG2000")[:200], header),
    }


@functools.cache
def odd_images():
    """{kind: bytes} of images that are unusual and whole: they give what Pillow makes of their first frame."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.fromarray(pixels(i)) for i in range(3)]

    def animated(format):
        buffer = io.BytesIO()
        frames[0].save(buffer, format, save_all=True, append_images=frames[1:])
        return buffer.getvalue()

    def deep():
        buffer = io.BytesIO()
        Image.fromarray(pixels(1)[..., 0].astype(np.uint16) * 257).save(buffer, "PNG")
        return buffer.getvalue()

    return {
        "deep_16_bit": deep(),
        "cmyk": encoded(2, "JPEG", "CMYK"),
        "palette": encoded(3, "PNG", "P"),
        "palette_with_transparency": encoded(3, "PNG", "P", transparency=0),
        "alpha": encoded(4, "PNG", "RGBA"),
        "grey_and_alpha": encoded(4, "PNG", "LA"),
        "one_bit": encoded(4, "PNG", "1"),
        "progressive": encoded(4, "JPEG", progressive=True),
        "animated_gif": animated("GIF"),
        "animated_webp": animated("WEBP"),
        "animated_png": animated("PNG"),
        "turned_by_exif": encoded(5, "JPEG", size=(SIDE, 20), exif=exif),
        "very_tall": encoded(5, size=(1, 30_000)),
        "very_wide": encoded(5, size=(30_000, 1)),
        "bmp": encoded(6, "BMP"),
        "tiff": encoded(6, "TIFF"),
        "avif": encoded(6, "AVIF"),
        "with_broken_exif": encoded(6, "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff" + bytes(8)),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def asked(**more):
    """A good row about the image good/0.png but for what `more` says."""
    return {
        "image": "good/0.png",
        "conversations": turns("<image>\nwhat is it?", "a red circle on a large white ground"),
    } | more


def good_row(seed):
    """In turns: an image, with its size or without; several turns; a chat; a question and an answer; text alone."""
    answer = f"it is number {seed}"
    image = f"good/{seed}.png"
    return [
        {"image": image, "width": SIDE, "height": SIDE, "conversations": turns("<image>\nwhat is it?", answer)},
        {"image": image, "conversations": turns("what is it?", answer, "are you sure?", "yes")},
        {"image": image, "messages": [{"role": "system", "content": "be kind."},
                                      {"role": "user", "content": "<image>\nwhat is it?"},
                                      {"role": "assistant", "content": answer}]},
        {"image": [image, image], "conversations": turns("<image>\n<image>\nthe same?", answer)},
        {"image": image, "question": "what is it?", "answer": answer},
        {"image": "", "conversations": turns("what is two and two?", answer)},
    ][seed % 6]  # fmt: skip


@functools.cache
def broken_rows():
    """(Broken, ...): those that are in the row itself, or in where it says that its image is."""
    line = lambda row: json.dumps(row).encode()
    roles = ("wrong_roles",)
    talk = lambda *messages: asked(conversations=list(messages))
    human, gpt = {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "yes"}
    wrong = ("wrong_conversation",)
    return tuple(
        Broken(name, reasons if isinstance(reasons, tuple) else (reasons,), row)
        for name, reasons, row in [
            ("broken_json", "broken_json", b'{"image": "good/0.png", "conversations": ['),
            ("two_rows_in_a_line", "broken_json", line(asked()) * 2),
            ("json_list", "not_a_row", b'["image", "conversations"]'),
            ("json_text", "not_a_row", b'"a text"'),
            ("json_null", "not_a_row", b"null"),
            ("nested_too_deeply", "broken_json", b"[" * 200_000),
            ("number_of_too_many_digits", "broken_json", b'{"id": ' + b"1" * 5000 + b"}"),
            ("not_utf8", "not_utf8", line(asked()).replace(b"red", b"r\xe9d")),
            ("zero_bytes", "broken_json", bytes(100)),
            ("half_a_character", "not_unicode", line(asked(conversations=turns("<image>", "a \ud83d")))),
            ("half_a_character_in_a_path", "not_unicode", line(asked(image="\ud83d.png"))),
            ("half_a_character_as_key", "empty_row", line({"\ud83d": 1})),
            ("nothing_at_all", "empty_row", {}),
            ("an_id_alone", "empty_row", {"id": "7"}),
            ("blank_text", ("empty_row", "no_conversation"), {"text": " \n "}),
            ("text_alone", "no_conversation", {"text": "in a stage that learns answers"}),
            ("image_alone", "no_conversation", {"image": "good/0.png"}),
            ("no_turns", "empty_conversation", talk()),
            ("system_alone", "empty_conversation", talk({"from": "system", "value": "be brief."})),
            ("conversations_as_text", wrong, asked(conversations="human: hi, gpt: hi")),
            ("conversations_nan", wrong, asked(conversations=float("nan"))),
            ("message_is_text", wrong, talk("hi", "hi")),
            ("message_without_value", wrong, talk({"from": "human"}, gpt)),
            ("message_value_is_number", "not_text", talk(human, {"from": "gpt", "value": 5})),
            ("message_part_of_unknown_type", wrong, {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}),
            ("unknown_role", roles, talk(human, {"from": "tool", "value": "x"}, gpt)),
            ("begins_with_gpt", roles, talk(gpt, human)),
            ("two_humans_in_a_row", roles, talk(human, human, gpt)),
            ("ends_with_human", roles, talk(human, gpt, {"from": "human", "value": "and?"})),
            ("empty_answer", "empty_answer", talk(human, {"from": "gpt", "value": ""})),
            ("blank_answer", "empty_answer", talk(human, {"from": "gpt", "value": " \n\t"})),
            ("question_is_number", "not_text", {"image": "good/0.png", "question": 5, "answer": "five"}),
            ("answer_is_number", "not_text", {"image": "good/0.png", "question": "how many?", "answer": 5}),
            ("more_questions_than_answers", "wrong_questions", {"questions": ["a", "b"], "answers": ["c"]}),
            ("too_many_marks", "wrong_marks", asked(conversations=turns("<image> <image>", "yes"))),
            ("too_few_marks", "wrong_marks", asked(image=["good/0.png"] * 3)),
            ("mark_without_image", "wrong_marks", {"conversations": turns("<image>\nhi", "yes")}),
            ("image_is_number", "wrong_image_field", asked(image=5)),
            ("image_is_none_in_a_list", "wrong_image_field", asked(image=[None])),
            ("image_is_empty_in_a_list", "wrong_image_field", asked(image=[""])),
            ("image_is_an_empty_object", "wrong_image_field", asked(image={})),
            ("video", "unsupported", {"video": "a.mp4", "conversations": turns("<video>", "yes")}),
            ("missing_image", "missing_image", asked(image="good/none.png")),
            ("folder_as_image", "missing_image", asked(image="good")),
            ("file_as_folder", ("unreadable_image", "missing_image"), asked(image="good/0.png/1.png")),
            ("path_with_zero_byte", "unreadable_image", asked(image="good/\0.png")),
            ("path_too_long", "unreadable_image", asked(image="a" * 5000)),
            ("unknown_protocol", "refused_url", asked(image="nosuch://bucket/0.png")),
            ("answer_past_the_row", "nothing_supervised", asked(conversations=turns("why? " * 400, "x"))),
            ("images_past_the_row", "nothing_supervised",
             asked(image=["good/0.png"] * 40, conversations=turns("<image>" * 40, "yes"))),
            ("missing_image_of_stated_size", "missing_image", asked(image="none.png", width=SIDE, height=SIDE)),
            # Planned as one tile, and three are too many for its place.
            ("stated_size_is_wrong", "size_differs", asked(image="odd/very_wide.png", width=SIDE, height=SIDE)),
        ]
    )  # fmt: skip


def broken_samples(rows=True, stated=True):
    """All kinds. With `stated` each broken image also has a row that states its size, so it is decoded."""
    kinds = list(broken_rows()) if rows else []
    for name, (data, reasons) in broken_images().items():
        kinds.append(Broken(name, reasons, asked(image=f"broken/{name}"), data))
        if stated:
            row = asked(image=f"broken/{name}", width=SIDE, height=SIDE)
            kinds.append(Broken(f"{name}_of_stated_size", reasons, row, data))
    return kinds


# ---------------------------------------------------------------------------------------------------------------------
# Corpora


def _write_images(folder, good):
    for name in ("good", "broken", "odd"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(good):
        (folder / "good" / f"{i}.png").write_bytes(encoded(i))
    for name, (data, _) in broken_images().items():
        (folder / "broken" / name).write_bytes(data)
    for name, data in odd_images().items():
        (folder / "odd" / f"{name}.png").write_bytes(data)  # whatever it is: names say nothing


def _mixed(good, kinds):
    """Good rows and broken ones by turns: [Broken, or a good row]."""
    rows = [good_row(i) for i in range(good)]
    for place, kind in enumerate(kinds):
        rows.insert(min(2 * place + 1, len(rows)), kind)
    return rows


def write_jsonl(folder, good=100):
    """A jsonl of good rows, broken ones and odd images between them.

    Returns:
      (path, {name of a sample as it is reported: Broken}).
    """
    _write_images(folder, good)
    mixed = _mixed(good, broken_samples()) + [asked(image=f"odd/{name}.png") for name in odd_images()]
    at, found, path = 0, {}, folder / "rows.jsonl"
    with path.open("wb") as file:
        for row in mixed:
            if isinstance(row, Broken):
                found[f"line at byte {at}"] = row
                row = row.row
            line = row if isinstance(row, bytes) else json.dumps(row).encode()
            at += file.write(line + b"\n")
    return path, found


def _with_bytes(row, images):
    """A row with its image in it, as those formats have it that hold both."""
    image = row.get("image")
    return row | {"image": images[image]} if isinstance(image, str) and image in images else row


def _all_images(good):
    return (
        {f"good/{i}.png": encoded(i) for i in range(good)}
        | {f"broken/{name}": data for name, (data, _) in broken_images().items()}
        | {f"odd/{name}.png": data for name, data in odd_images().items()}
    )


def write_array_record(folder, good=40):
    """-> (path, {name: Broken}), rows under their kind's name as 'id'."""
    import msgpack
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    kinds, images = broken_samples(), _all_images(good)
    kinds = [kind for kind in kinds if isinstance(kind.row, dict) and kind.name != "an_id_alone"]  # they have ids
    path = folder / "train-00000-of-00001.array_record"
    writer, found = ArrayRecordWriter(str(path), "group_size:1"), {}
    for i, row in enumerate(_mixed(good, kinds)):
        if isinstance(row, Broken):
            found[row.name] = row
            row = row.row | {"id": row.name}
        row = _with_bytes(row, images)
        if isinstance(row.get("image"), list):
            row = row | {"image": [images.get(name, name) for name in row["image"]]}
        writer.write(msgpack.packb({"id": str(i)} | row))
    rows = len(found) + good
    for i, raw in enumerate([b"\xc1", msgpack.packb([1, 2]), msgpack.packb({"text": "x"})[:-1]]):
        found[str(rows + i)] = Broken(f"record_{i}", ("broken_record", "not_a_row"), raw)
        writer.write(raw)
    writer.close()
    return path, found


def write_tar(folder, good=40):
    """-> (path, {name: Broken}): members KIND.json and KIND.png."""
    folder.mkdir(parents=True, exist_ok=True)
    path, found = folder / "shard-000.tar", {}
    kinds = [Broken(name, reasons, asked(), data) for name, (data, reasons) in broken_images().items()]
    kinds += [
        Broken("json_broken", ("broken_json",), b'{"a":', encoded(0)),
        Broken("json_not_utf8", ("not_utf8",), b'{"a": "\xff"}', encoded(0)),
        Broken("json_list", ("not_a_row",), b"[1]", encoded(0)),
        Broken("json_absent", ("no_conversation",), b"", encoded(0)),
        Broken("image_absent", ("wrong_marks",), {"conversations": turns("<image>", "yes")}),
    ]
    with tarfile.open(path, "w") as tar:

        def add(name, data):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

        for i, row in enumerate(_mixed(good, kinds)):
            name, image = f"{i:05d}", encoded(i)
            if isinstance(row, Broken):
                name, image = row.name, row.image
                found[name] = row
                row = row.row
            else:
                row = {"conversations": turns("<image>\nwhat is it?", f"number {i}")}
            row = row if isinstance(row, bytes) else json.dumps({k: v for k, v in row.items() if k != "image"}).encode()
            if row:
                add(f"{name}.json", row)
            if image is not None:
                add(f"{name}.png", image)
    return path, found


def write_parquet(folder, good=40):
    """-> (path, {name: Broken}); the columns are those of the hub's image data sets."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    path, found, table = folder / "rows.parquet", {}, []
    kinds = [Broken(name, reasons, asked(), data) for name, (data, reasons) in broken_images().items()]
    kinds += [
        Broken("no_turns", ("empty_conversation",), asked(conversations=[]), encoded(0)),
        Broken("unknown_role", ("wrong_roles",), asked(conversations=[{"from": "x", "value": "y"}]), encoded(0)),
        Broken("null_value", ("not_text",), asked(conversations=[{"from": "human", "value": None}]), encoded(0)),
        Broken("null_conversation", ("no_conversation",), asked(conversations=None), encoded(0)),
        Broken("null_image", ("wrong_image_field",), asked()),
    ]
    for i, row in enumerate(_mixed(good, kinds)):
        image = encoded(i)
        if isinstance(row, Broken):
            found[str(i)], image, row = row, row.image, row.row
        else:
            row = {"conversations": turns("<image>\nwhat is it?", f"number {i}")}
        table.append({"image": {"bytes": image, "path": None}, "conversations": row["conversations"]})
    message = pa.struct([("from", pa.string()), ("value", pa.string())])
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("conversations", pa.list_(message))])
    pq.write_table(pa.Table.from_pylist(table, schema), path, row_group_size=16)
    return path, found
