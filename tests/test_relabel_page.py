"""The relabelling page's server: what it stores, what it refuses, and what it survives."""

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import refused
from PIL import Image

from common.runtime import UserError
from data import panoptic_shapes
from data.panoptic import Panoptic
from data.relabel import BODY, PAGE, Choices, Server, main

ROOT = Path(__file__).parent.parent
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    panoptic_shapes.main([str(root), "--count", "5"])
    (root / "secret.txt").write_text("secret")
    return root


@pytest.fixture
def root(drawn, tmp_path) -> Path:
    shutil.copytree(drawn, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def server(root) -> Iterator[Server]:
    with Server(Choices(Panoptic(root / "COCO", "train2017")), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


def ask(server: Server, path: str, body=None, headers=None, method=None) -> tuple[int, bytes]:
    """(status, body); a body that is no bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    if body is not None and not isinstance(body, bytes):
        body, headers = json.dumps(body).encode(), JSON | (headers or {})
    connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def told(server: Server, path: str, body=None) -> dict:
    status, answer = ask(server, path, body)
    assert status == 200, answer
    return json.loads(answer)


def raw(server: Server, data: bytes, half: bool = False) -> bytes:
    """What comes back for these bytes; half: the sender then stops sending."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as line:
        line.sendall(data)
        if half:
            line.shutdown(socket.SHUT_WR)
        found = b""
        while part := line.recv(65536):
            found += part
    return found


def alive(server: Server) -> bool:
    return told(server, "/set")["count"] == 5


# ---- What the page gets --------------------------------------------------------------------------
def test_everything_the_page_asks_for(server, root):
    scenes = server.choices.scenes
    assert ask(server, "/")[1] == PAGE.read_bytes()
    assert told(server, "/set") == {
        "title": "COCO train2017",
        "start": 0,
        "hand": 0,
        "vote": 0,
        "skipped": 0,
        "count": 5,
    }
    scene = told(server, "/scene/2")
    assert scene["name"] == "000000000003" and tuple(scene["size"]) == scenes.size(2)
    assert [s["id"] for s in scene["segments"]] == [s.id for s in scenes.segments(2)]
    assert scene["segments"][0].keys() == {"id", "category", "thing", "crowd", "area", "box"}
    assert (scene["chosen"], scene["skipped"], scene["by"]) == ([], False, None)
    assert len(scene["captions"]) == 5
    pixels = np.frombuffer(ask(server, "/labels/2")[1], "<u2").reshape(scenes.size(2))
    assert (pixels == scenes.labels(2)).all()
    assert ask(server, "/photo/2")[1] == (root / "COCO/train2017/000000000003.jpg").read_bytes()


def test_the_page_asks_nobody_else(server):
    page = PAGE.read_text()
    assert not re.findall(
        r"https?://|//[a-z]+\.[a-z]|@import|url\(|<link[^>]*href=\"(?!data:)"
        r"|<script[^>]+src|<iframe|eval\(|innerHTML",
        page,
    )
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request("GET", "/")
    policy = connection.getresponse().getheader("Content-Security-Policy")
    connection.close()
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy


def test_choices_are_stored_at_once_and_can_be_changed(server, root):
    ids = [s.id for s in server.choices.scenes.segments(1)]
    sod = root / "COCO/sod"
    done = told(server, "/scene/1", {"chosen": ids[:2], "skipped": False})
    assert done == {"hand": 1, "vote": 0, "skipped": 0, "count": 5}
    stored = json.loads((sod / "choices/train2017/000000000002.json").read_text())
    assert stored == {"chosen": sorted(ids[:2]), "skipped": False, "by": "hand"}
    mask = np.asarray(Image.open(sod / "masks/train2017/000000000002.png"))
    assert (mask == server.choices.scenes.mask(1, ids[:2])).all()
    assert told(server, "/scene/1")["chosen"] == sorted(ids[:2])
    assert told(server, "/set")["start"] == 1 and told(server, "/undone/0") == {"index": 2}
    assert told(server, "/scene/1", {"chosen": [], "skipped": True})["skipped"] == 1
    assert not (sod / "masks/train2017/000000000002.png").exists()
    assert told(server, "/scene/1", {"chosen": [], "skipped": False})["skipped"] == 0
    assert not list(sod.rglob("*.json"))


def test_a_killed_server_continues_where_it_stopped(root):
    def start() -> tuple[subprocess.Popen, SimpleNamespace]:
        process = subprocess.Popen(
            [sys.executable, "-m", "data.relabel", "--data-root", str(root), "--port", "0"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
        return process, SimpleNamespace(server_port=int(found[1]))

    process, server = start()
    try:
        ids = [s["id"] for s in told(server, "/scene/3")["segments"]]
        told(server, "/scene/2", {"chosen": [], "skipped": True})
        told(server, "/scene/3", {"chosen": ids[:2], "skipped": False})
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process, server = start()
    try:
        assert told(server, "/scene/3")["chosen"] == sorted(ids[:2])
        assert told(server, "/set") == {
            "title": "COCO train2017",
            "start": 3,
            "hand": 1,
            "vote": 0,
            "skipped": 1,
            "count": 5,
        }
    finally:
        process.kill()
        process.communicate()


def test_what_cannot_be_written_is_a_sentence_in_the_page(server, root):
    ids = [s.id for s in server.choices.scenes.segments(0)]
    (root / "COCO/sod/masks").write_text("in the way")
    status, answer = ask(server, "/scene/0", {"chosen": ids[:1], "skipped": False})
    assert status == 500 and "cannot write" in json.loads(answer)["error"]
    (root / "COCO/sod/masks").unlink()
    told(server, "/scene/0", {"chosen": ids[:1], "skipped": False})
    mask = root / "COCO/sod/masks/train2017/000000000001.png"
    mask.unlink()
    mask.mkdir()
    status, answer = ask(server, "/scene/0", {"chosen": [], "skipped": False})
    assert status == 500 and f"cannot remove {mask}" in json.loads(answer)["error"]
    assert told(server, "/scene/0")["chosen"] == ids[:1]  # still as before


def test_a_split_is_for_one_process_at_a_time(root):
    flags = ["--data-root", str(root)]
    command = [sys.executable, "-m", "data.relabel", *flags, "--port", "0"]
    page = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert "5 images" in page.stdout.readline()
        choices = root / "COCO/sod/choices"
        (choices / "train2017/.x.json.1.part").write_text("")  # would belong to the other process
        assert refused(main, *flags, "--auto") == (
            f"another process is writing to {choices}/train2017: wait for it, or give another "
            "--split or --data-root"
        )
        main([*flags, "--auto", "--split", "val2017"])
        assert [path.name for path in choices.rglob("*.part")] == [".x.json.1.part"]
    finally:
        page.kill()
        page.communicate()
    main([*flags, "--auto"])  # a killed process holds nothing
    assert not list((root / "COCO/sod").rglob("*.part"))


def test_control_c_stops_without_a_traceback(root, monkeypatch, capsys):
    def interrupt(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupt)
    main(["--data-root", str(root), "--port", "0"])
    shown = capsys.readouterr().out
    assert "5 images, 0 labelled by hand" in shown and "the next start continues here" in shown


# ---- What it refuses -----------------------------------------------------------------------------
def test_it_listens_on_loopback_only(server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.socket.getsockname()[0] == "127.0.0.1"
    with pytest.raises(UserError, match="choose another --port"):
        Server(server.choices, server.server_port)
    with pytest.raises(UserError, match="choose another --port"):
        Server(server.choices, 70_000)


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/../../secret.txt",
        "/..%2fsecret.txt",
        "/%2e%2e/secret.txt",
        "//etc/passwd",
        "/etc/passwd",
        "/photo/../../secret.txt",
        "/photo/..",
        "/photo/",
        "/photo",
        "/photo/5",
        "/photo/-1",
        "/photo/+1",
        "/photo/1.0",
        "/photo/0x1",
        "/photo/1?x=1",
        "/photo/1#a",
        "/photo/1/",
        "/photo/000000000001.jpg",
        "/photo/1000000000000",
        "/photo/" + "9" * 5000,
        "/labels/1%00",
        "/relabel.py",
        "/relabel.html",
        "/data/README.md",
        "/set/",
        "/?",
        "/.",
        "*",
        "http://127.0.0.1/set",
        "file:///etc/passwd",
        "\\..\\secret.txt",
    ],
)
def test_no_address_names_a_file(server, path):
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n"
    answer = raw(server, request.encode())
    assert answer.startswith(b"HTTP/1.1 404 ") and b"secret" not in answer.replace(
        path.encode(), b""
    )
    assert alive(server)


def test_other_hosts_and_other_origins_are_refused(server):
    own = f"127.0.0.1:{server.server_port}"
    choice = {"chosen": [], "skipped": True}
    for headers in (
        {"Host": "evil.example"},
        {"Host": f"evil.example:{server.server_port}"},
        {"Host": "127.0.0.1:1"},
        {"Host": "127.0.0.1"},
        {"Host": ""},
        {"Host": own, "Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": f"https://{own}"},
    ):
        assert ask(server, "/scene/0", headers=headers)[0] == 403, headers
        assert ask(server, "/scene/0", choice, headers)[0] == 403, headers
    assert raw(server, b"GET / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 403 ")
    twice = f"GET / HTTP/1.1\r\nHost: {own}\r\nHost: evil.example\r\n\r\n"
    assert raw(server, twice.encode()).startswith(b"HTTP/1.1 403 ")
    assert not server.choices.made
    for headers in ({"Origin": f"http://{own}"}, {"Host": f"localhost:{server.server_port}"}):
        assert ask(server, "/scene/0", choice, headers)[0] == 200, headers


def test_only_choices_are_stored(server):
    good = server.choices.scenes.segments(0)[0].id
    strange = server.choices.scenes.segments(1)[0].id
    for body in (
        {},
        [],
        None,
        3,
        "x",
        {"chosen": [good]},
        {"skipped": True},
        {"chosen": [strange], "skipped": False},
        {"chosen": [True], "skipped": False},
        {"chosen": [float(good)], "skipped": False},
        {"chosen": good, "skipped": False},
        {"chosen": [[good]], "skipped": False},
        {"chosen": [0], "skipped": False},
        {"chosen": [good], "skipped": 0},
        {"chosen": [10**400], "skipped": False},
        {"chosen": [good], "skipped": False, "by": "vote"},
    ):
        assert ask(server, "/scene/0", json.dumps(body).encode(), JSON)[0] == 400, body
    for body in (b"", b"{", b"\xff\xfe", b"NaN", b"[" * 50_000, b'{"a":' * 20_000):
        assert ask(server, "/scene/0", body, JSON)[0] == 400, body[:20]
    text = json.dumps({"chosen": [good], "skipped": False}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert ask(server, "/scene/0", text, {"Content-Type": kind})[0] == 415, kind
    assert ask(server, "/set", text, JSON)[0] == ask(server, "/photo/0", text, JSON)[0] == 405
    assert ask(server, "/scene/5", text, JSON)[0] == 404
    assert not server.choices.made and alive(server)
    assert (
        ask(server, "/scene/0", text, {"Content-Type": "application/json; charset=utf-8"})[0] == 200
    )


def test_oversized_bodies_are_refused_unread(server):
    head = (
        f"POST /scene/0 HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n"
        "Content-Type: application/json\r\n"
    )
    for length, status in (
        (BODY + 1, 413),
        (999_999_999, 413),
        (10**30, 411),
        (-1, 411),
        ("+5", 411),
        ("5_0", 411),
        ("٣", 411),
        ("", 411),
        ("x", 411),
    ):
        answer = raw(server, f"{head}Content-Length: {length}\r\n\r\n".encode())
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), (length, answer)
    assert raw(server, f"{head}\r\n".encode()).startswith(b"HTTP/1.1 411 ")
    chunked = f"{head}Transfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n"
    assert raw(server, chunked.encode()).startswith(b"HTTP/1.1 411 ")
    both = chunked.replace("\r\n\r\n2", "\r\nContent-Length: 2\r\n\r\n2", 1)
    assert raw(server, both.encode()).startswith(b"HTTP/1.1 411 ")
    assert not server.choices.made and alive(server)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x00\xff\x16\x03",
        b"GET / HTTP/1.1 more\r\n\r\n",
        b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x80" * 70_000,
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 300 + b"\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n: no name\r\nnonsense\r\n\r\n",
    ],
)
def test_malformed_requests_are_survived(server, data):
    try:
        answer = raw(server, data, half=True)
    except ConnectionError:
        answer = b""
    assert b" 200 " not in answer[:20] and b"Traceback" not in answer
    assert alive(server)


def test_a_sender_that_stops_halfway_is_survived(server):
    head = (
        f"POST /scene/0 HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n"
        "Content-Type: application/json\r\nContent-Length: 50\r\n\r\n"
    )
    answer = raw(server, head.encode() + b'{"chosen": []', half=True)
    assert answer.startswith(b"HTTP/1.1 400 ") and not server.choices.made
    silent = socket.create_connection(("127.0.0.1", server.server_port))  # holds up nobody
    assert alive(server)
    silent.close()


def test_a_broken_png_is_a_sentence_in_the_page(server, root):
    path = root / "COCO/annotations/panoptic_train2017/000000000001.png"
    path.write_bytes(path.read_bytes()[:100])
    status, answer = ask(server, "/labels/0")
    assert status == 500 and "000000000001.png" in json.loads(answer)["error"]
    choice = {"chosen": [server.choices.scenes.segments(0)[0].id], "skipped": False}
    assert ask(server, "/scene/0", choice)[0] == 500
    assert not server.choices.made and not list((root / "COCO/sod").rglob("*.json"))
    (root / "COCO/train2017/000000000002.jpg").unlink()
    assert ask(server, "/photo/1")[0] == 500
    Image.new("RGB", (9, 5)).save(root / "COCO/train2017/000000000003.jpg")  # of another size
    status, answer = ask(server, "/labels/2")
    assert status == 500 and "000000000003.jpg is 9 x 5" in json.loads(answer)["error"]
    assert alive(server)
