"""Data of strangers: rows whose paths lead elsewhere, folders that would run code. Nothing runs, nothing is read."""

import contextlib
import http.server
import json
import os
import pathlib
import sys
import threading

import pytest

from hovle_jax.corpora.converting import convert
from hovle_jax.data.bad_samples import BadSample, read_bad_samples
from hovle_jax.data.files import image_paths, shard, storage
from hovle_jax.data.files.mixture import open_mixture
from hovle_jax.data.files.records import parse
from hovle_jax.data.files.sources import open_source
from hovle_jax.data.files.tfds_shard import check_tfds_folder
from hovle_jax.errors import UserError
from hovle_jax.inference.many import read_questions
from hovle_jax.system import fetching
from tests import broken

pytestmark = pytest.mark.usefixtures("own_cache")
SECRET = b"SECRET-of-the-machine"
WATCHED = ("open", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
_heard = None


def _hear(event, arguments):
    if _heard is not None and event in WATCHED:
        _heard.append((event, arguments[0]))


@contextlib.contextmanager
def heard():
    """[(event, its first argument)] of all that is opened, connected to or started within."""
    global _heard
    "x".encode("idna")  # imports what looking up a host imports
    if not hasattr(sys, "_hovle_hears"):  # a hook stays for ever
        sys.addaudithook(_hear)
        sys._hovle_hears = True
    _heard = []
    try:
        yield _heard
    finally:
        _heard = None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder `root` of rows beside what they must not reach."""
    folder = tmp_path_factory.mktemp("place").resolve()
    (folder / "root" / "inner").mkdir(parents=True)
    (folder / "other").mkdir()
    (folder / "secret.png").write_bytes(SECRET)
    (folder / "other" / "image.png").write_bytes(broken.encoded(0))
    (folder / "root-beside").mkdir()
    (folder / "root-beside" / "image.png").write_bytes(broken.encoded(0))
    (folder / "root" / "good.png").write_bytes(broken.encoded(0))
    (folder / "root" / "linked.png").symlink_to(folder / "secret.png")
    (folder / "root" / "folder").symlink_to(folder / "other")
    (folder / "root" / "inner" / "up").symlink_to("../..")
    (folder / "root" / "loop.png").symlink_to("loop.png")
    (folder / "root" / "device.png").symlink_to("/dev/zero")
    (folder / "root" / "near.png").symlink_to("inner/../good.png")
    os.mkfifo(folder / "root" / "pipe.png")
    return folder


PATHS = (
    "../secret.png", "inner/../../secret.png", "./../secret.png", "inner/up/secret.png", "../root-beside/image.png",
    "../" * 40 + "etc/passwd", "/etc/passwd", "//etc/passwd", "/dev/zero", "/dev/random", "/proc/self/environ",
    "/proc/self/fd/0", "/dev/stdin", "linked.png", "folder/image.png", "loop.png", "device.png", "pipe.png",
    "../secret.png\0.png", "good.png\0/../../secret.png", "..\\secret.png", "\\\\host\\share\\x.png", "//host/share/x",
    "C:\\secret.png", "C:/secret.png", "%2e%2e/secret.png", "%2e%2e%2fsecret.png", "..%2fsecret.png",
    "\u2024\u2024/secret.png", "\uff0e\uff0e/secret.png", "..\uff0fsecret.png", "..\u2215secret.png", "~/secret.png",
    "~root/x.png", "$HOME/x.png", "${HOME}/x.png", "%HOME%/x.png", "$(touch RAN)", "`touch RAN`", "|touch RAN",
    "a" * 5000, "a/" * 3000 + "x.png", "file:../secret.png", "*.png", "good.png/../../secret.png", "..", ".", "./",
    "\x1b[2Jx.png", "\n../secret.png", "-rf", "{root}/../secret.png", "{{7*7}}.png", "con", "NUL", ".../x.png",
)  # fmt: skip
URLS = (
    "file:///etc/passwd", "FILE:///etc/passwd", "local:///etc/passwd", "zip://x.png::../secret.zip",
    "simplecache::file:///etc/passwd", "filecache::https://example.com/x.png", "reference://x.png::file:///ref.json",
    "reference://x.png", "ftp://127.0.0.1/x.png", "github://a:b@main/x.png", "http://169.254.169.254/latest/meta-data",
    "http://example.com/x.png", "dir://..::file:///etc", "tar://x.png::file:///x.tar", "memory://x.png", "jar://x",
    "sftp://host/x.png", "smb://host/x.png", "hdfs://host/x.png", "hf://user/x.png", "data://x", "gopher://host/x",
    "s3://bucket/x::file:///etc/passwd", "gs://a/x::reference://y", "https://example.com/a::file:///etc/passwd",
    "libarchive://x::/etc/passwd", "async_wrapper::file:///etc/passwd", "blockcache::/etc/passwd", "git://.", "abfs://x",
    "https://127.0.0.1/x.png", "https://[::1]/x.png", "https://2130706433/x.png", "https://0x7f.1/x.png",
    "https://10.0.0.1/x.png", "https://169.254.169.254/x.png", "https://[::ffff:127.0.0.1]/x", "https:///etc/passwd",
    "https://user:word@127.0.0.1/x.png", "https://0.0.0.0/x.png", "https://[fe80::1]/x.png", "https://127.0.0.1:22/",
    "https://[::1", "https://127.0.0.1:99999/x",
)  # fmt: skip


def read_row(image, root):
    record = parse(broken.asked(image=image), str(root))
    return record.image_bytes(0)


@pytest.mark.parametrize("image", PATHS + URLS)
def test_a_row_reaches_nothing_outside_of_its_folder(image, place, monkeypatch):
    root = place / "root"
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(place / "other")
    with heard() as events, pytest.raises(BadSample) as refused:
        read_row(image, root)
    assert SECRET.decode() not in str(refused.value) and "root:x:0" not in str(refused.value)
    assert not set(refused.value.detail) & set("\x1b\n\0")
    names = [name for event, name in events if event == "open" and isinstance(name, (str, bytes))]
    opened = [os.path.realpath(os.fsdecode(name)) for name in names]
    assert all(path.startswith(f"{root}/") for path in opened if path != str(root)), opened
    assert {event for event, _ in events} <= {"open", "socket.getaddrinfo"}
    assert not list(place.rglob("RAN"))


def test_what_is_below_the_folder_is_read(place):
    for image in ("good.png", "inner/../good.png", "near.png", str(place / "root" / "good.png")):
        assert read_row(image, place / "root") == broken.encoded(0)
    linked = place / "link"
    linked.symlink_to("root")  # the user's choice
    assert read_row("good.png", linked) == read_row(str(place / "root" / "good.png"), linked) == broken.encoded(0)
    for image in ("../other/image.png", "folder/image.png", str(place / "other" / "image.png")):
        row = broken.asked(image=image)
        with pytest.raises(BadSample, match="outside_root: .* is not below .*; allow it with data.outside_root=True"):
            parse(row, str(place / "root")).image_bytes(0)
        assert parse(row, str(place / "root"), outside_root=True).image_bytes(0) == broken.encoded(0)


def test_paths_stay_below_a_url(monkeypatch):
    monkeypatch.setattr(storage, "read", lambda path, *_: path)
    for root in ("gs://bucket/data", "https://example.com/data", "memory://data"):
        assert read_row("a/b.png", root) == f"{root}/a/b.png"
        for image in ("../x.png", "a/../../x.png", "%2e%2e/x.png", "/etc/passwd", "a::file", "..\\x.png"):
            with pytest.raises(BadSample, match="outside_root"):
                read_row(image, root)
    assert read_row("s3://bucket/a.png", "/data") == "s3://bucket/a.png"
    monkeypatch.setattr(image_paths.fetching, "fetch", lambda url, most, seconds: url.encode())
    assert read_row("https://example.com/a.png", "/data") == b"https://example.com/a.png"


def test_a_url_that_does_not_answer_is_given_up(monkeypatch):
    import fsspec

    answer = threading.Event()
    monkeypatch.setattr(storage, "RETRY_AFTER", ())
    monkeypatch.setattr(storage, "URL_SECONDS", 0.05)
    monkeypatch.setattr(fsspec.filesystem("memory").__class__, "cat_file", lambda *_, **__: answer.wait(30))
    with pytest.raises(BadSample, match="unreadable_image: memory://data/a.png: no answer within 0.05 seconds"):
        read_row("a.png", "memory://data")
    answer.set()


def test_an_image_at_a_url_has_a_largest_size(monkeypatch):
    monkeypatch.setattr(image_paths, "LARGEST_IMAGE", 10)
    monkeypatch.setattr(storage, "read", lambda path, start, length: bytes(100)[start:length])
    with pytest.raises(BadSample, match="unreadable_image: gs://b/a.png has more than 10 bytes"):
        read_row("gs://b/a.png", "/data")


def rows_of(place, *images, name="rows.jsonl"):
    """A file in `root` of a good row and those of these images, each stating its size."""
    rows = [broken.asked(image="good.png"), *(broken.asked(image=image) for image in images)]
    (place / "root" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place / "root" / name


REFUSED = ("../secret.png", "linked.png", "folder/image.png", "file:///etc/passwd", "/etc/passwd")


def test_a_corpus_is_made_of_what_its_rows_may_read(place, tmp_path):
    source = rows_of(place, *REFUSED)
    assert convert(source, tmp_path / "corpus", ceiling=1.0, say=lambda line: None) == {"train": 1}
    listed = (tmp_path / "corpus" / "bad_samples.jsonl").read_text()
    assert [e.reason for e in read_bad_samples(tmp_path / "corpus")] == (
        ["outside_root"] * 3 + ["refused_url", "outside_root"]
    )
    assert SECRET.decode() not in listed and "root:x:0" not in listed
    more = convert(source, tmp_path / "more", ceiling=1.0, say=lambda line: None, outside_root=True)
    assert more == {"train": 2}  # the image in the other folder


def test_questions_of_a_file_read_what_they_may(place):
    for image in REFUSED:
        (place / "root" / "in.jsonl").write_text(json.dumps({"prompt": "what?", "image": image}))
        with pytest.raises(UserError, match="in.jsonl:1: .*(is not below|only files of this machine)"):
            read_questions(place / "root" / "in.jsonl")
    (place / "root" / "in.jsonl").write_text(json.dumps({"prompt": "what?", "image": "folder/image.png"}))
    assert read_questions(place / "root" / "in.jsonl", outside_root=True)[0].images == (place / "other" / "image.png",)


def test_evaluated_rows_read_what_they_may(place):
    from hovle_jax.evaluation.own_data import read_items
    from hovle_jax.evaluation.scorers import exact

    (entry,) = open_mixture(rows_of(place, *REFUSED, name="asked.jsonl"))
    good, *bad = read_items(entry, range(6), exact)
    assert len(good.images) == 1
    assert {event.reason for event in bad} == {"outside_root", "refused_url"}


def test_a_meta_file_names_no_chain(tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps({"a": {"annotation": "simplecache::file:///etc/passwd"}}))
    with pytest.raises(UserError, match="no chain of file systems"):
        open_mixture(str(tmp_path / "meta.json"))


# ---------------------------------------------------------------------------------------------------------------------
# Folders of TFDS

OWN = "tensorflow_datasets.core.features.text_feature.Text"
DICT = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
SEQUENCE = "tensorflow_datasets.core.features.sequence_feature.Sequence"
EVIL = "evil_features.X"


def feature(name, **more):
    return {"pythonClassName": name, "text": {}, **more}


def of_features(**features):
    return {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }


HOSTILE_FEATURES = {
    "at the top": feature(EVIL),
    "in a dict": of_features(text=feature(EVIL)),
    "in a sequence": of_features(text={"pythonClassName": SEQUENCE,
                                       "sequence": {"feature": feature(EVIL), "length": "-1"}}),
    "under the proto's own name": {"python_class_name": EVIL, "text": {}},
    "as TFDS 3 wrote it": {"type": EVIL, "content": {}},
    "in a text": of_features(text={"pythonClassName": SEQUENCE, "jsonFeature": {"json": json.dumps(
        {"feature": {"type": EVIL, "content": {}}, "length": None})}}),
    "with a beginning that is right": feature("tensorflow_datasets_evil.X"),
    "with a path": feature("tensorflow_datasets./../evil.X"),
    "with another alphabet": feature("tensorflow_datasets.\u0435vil.X"),
    "with an end of line": feature(f"{OWN}\nevil.X"),
}  # fmt: skip


def described(folder, features, info=None):
    (folder / "features.json").write_text(features if isinstance(features, str) else json.dumps(features))
    splits = [{"name": "train", "shardLengths": ["1"], "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}"}]
    info = {"name": "x", "version": "1.0.0", "fileFormat": "array_record", "moduleName": "evil_features",
            "splits": splits} | (info or {})  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.mark.parametrize("how", HOSTILE_FEATURES)
def test_a_tfds_folder_runs_no_code(how, tmp_path, monkeypatch):
    described(tmp_path, HOSTILE_FEATURES[how])
    (tmp_path / "evil_features.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    shard._readers._open.clear()
    with pytest.raises(UserError, match="names the class .* whose code TFDS would run"):
        len(open_source(tmp_path))
    assert not (tmp_path / "RAN").exists() and "evil_features" not in sys.modules


def test_a_doubled_key_hides_no_class(tmp_path):
    described(tmp_path, f'{{"pythonClassName": "{EVIL}", "pythonClassName": "{OWN}", "text": {{}}}}')
    with pytest.raises(UserError, match="names the class 'evil_features.X'"):
        check_tfds_folder(str(tmp_path))


@pytest.mark.parametrize("info", [
    {"splits": [{"name": "train", "filepathTemplate": "../../{DATASET}"}]},
    {"splits": [{"name": "train", "filepath_template": "/etc/passwd"}]},
    {"splits": [{"name": "../train"}]}, {"name": "../x"}, {"fileFormat": "array_record/../x"},
    {"alternativeFileFormats": ["a", "../x"]},
])  # fmt: skip
def test_a_tfds_folder_names_no_file_elsewhere(info, tmp_path):
    described(tmp_path, feature(OWN), info)
    with pytest.raises(UserError, match="names files elsewhere"):
        check_tfds_folder(str(tmp_path))


def test_what_tfds_itself_writes_is_read_and_what_is_no_json_said(path_of, tmp_path):
    check_tfds_folder(path_of("tfds"))
    described(tmp_path, "[" * 100_000)
    with pytest.raises(UserError, match="features.json cannot be read as JSON"):
        check_tfds_folder(str(tmp_path))
    assert pathlib.Path(path_of("tfds"), "features.json").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# The web


@pytest.mark.parametrize("address", [
    "127.0.0.1", "10.1.2.3", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::",
    "fd00::1", "fe80::1%eth0", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
])  # fmt: skip
def test_addresses_of_the_inside_are_none_of_the_web(address):
    assert not fetching.is_public(address)


def test_addresses_of_the_web_are():
    assert all(map(fetching.is_public, ("8.8.8.8", "2606:4700::1111", "64:ff9b::808:808")))


class Answers(http.server.BaseHTTPRequestHandler):
    """A web server that redirects, sends too much, or never ends."""

    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/")
            self.end_headers()
            return
        if self.path == "/slow_header":
            for _ in range(100):
                self.wfile.write(b"x")
                self.server.leave.wait(0.05)
            self.server.all_was_heard = True
            return
        self.send_response(200)
        self.end_headers()
        for _ in range(100 if self.path == "/slow" else 1):
            self.wfile.write(b"x" * 20)
            self.server.leave.wait(0.05 if self.path == "/slow" else 0)

    def log_message(self, *_):
        pass


def test_what_is_fetched_is_bounded(monkeypatch):
    monkeypatch.setattr(fetching, "is_public", lambda address: True)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.leave, server.all_was_heard = threading.Event(), False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at = f"http://127.0.0.1:{server.server_port}"
        assert fetching.fetch(f"{at}/", 20) == b"x" * 20
        for url, most, seconds, said in (
            (f"{at}/", 19, 10, "more than 19 bytes"), (f"{at}/moved", 99, 10, "answered 302; redirects are not"),
            (f"{at}/slow", 10**6, 0.2, "could not be read"), ("ftp://x/y", 9, 1, "no URL of http"),
            (f"{at}/slow_header", 10**6, 0.2, "could not be read"),
        ):  # fmt: skip
            with pytest.raises(fetching.CannotFetch, match=said):
                fetching.fetch(url, most, seconds)
        assert not server.all_was_heard
        server.leave.set()
        server.shutdown()
