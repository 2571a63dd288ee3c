"""A Hugging Face hub on loopback: what its client needs to list and download models, and faults to order."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

TOKEN = "hf_of_the_tests"
_LIST = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/?]+))?(?:\?.*)?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)(?:\?.*)?")


@dataclass
class ServedModel:
    """A model and who may have it.

    Attributes:
        folder: Its files.
        revisions: Names of its one commit.
        gated: Whether files, but not their list, need the token.
        private: Whether everything needs the token.
    """

    folder: Path
    revisions: tuple[str, ...] = ("main", "v1")
    gated: bool = False
    private: bool = False

    @property
    def commit(self) -> str:
        return hashlib.sha1(str(self.folder).encode()).hexdigest()

    def files(self) -> list[str]:
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())


@dataclass
class HubServer:
    """What is served, what is to go wrong, and what was asked.

    Attributes:
        models: By name, ``owner/name``.
        endpoint: For ``HF_ENDPOINT``.
        listed: Models whose files were listed.
        sent: Files whose content was asked for, as ``name/file``, with the first byte asked for.
        cut: Files to break off once, after so many bytes.
        held: Files to send half of, and then nothing until ``release`` is set.
        broken: Files to answer with this status.
        claimed: Sizes to claim of files.
        is_down: Whether to answer everything with 503.
    """

    models: dict[str, ServedModel] = field(default_factory=dict)
    endpoint: str = ""
    listed: list[str] = field(default_factory=list)
    sent: list[tuple[str, int]] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    broken: dict[str, int] = field(default_factory=dict)
    claimed: dict[str, int] = field(default_factory=dict)
    is_down: bool = False
    is_holding: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def sent_files(self) -> list[str]:
        return sorted(name for name, _first in self.sent)


@contextmanager
def serving() -> Iterator[HubServer]:
    """A hub for the length of a ``with``."""
    hub = HubServer()

    class Handler(_Handler):
        server_of = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: HubServer

    def do_GET(self) -> None:
        if self.server_of.is_down:
            self._refuse(503, "")
        elif found := _LIST.fullmatch(self.path):
            self._list(found[1], unquote(found[2] or "main"))
        elif found := _FILE.fullmatch(self.path):
            self._file(found[1], unquote(found[2]), unquote(found[3]))
        else:
            self._refuse(404, "")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _find(self, name: str, revision: str) -> ServedModel | None:
        """The model, or None after an answer that says why not."""
        model = self.server_of.models.get(name)
        if model is None or (model.private and not self._has_token()):
            self._refuse(401, "RepoNotFound")  # the hub does not tell the two apart
            return None
        if revision not in (*model.revisions, model.commit):
            self._refuse(404, "RevisionNotFound")
            return None
        return model

    def _list(self, name: str, revision: str) -> None:
        model = self._find(name, revision)
        if model is None:
            return
        self.server_of.listed.append(name)
        document = {"id": name, "sha": model.commit, "siblings": [{"rfilename": file} for file in model.files()]}
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, revision: str, file: str) -> None:
        hub = self.server_of
        model = self._find(name, revision)
        if model is None:
            return
        if model.gated and not self._has_token():
            self._refuse(403, "GatedRepo")
            return
        if file not in model.files():
            self._refuse(404, "EntryNotFound")
            return
        data = (model.folder / file).read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": model.commit,
            "X-Linked-Size": str(hub.claimed.get(file, len(data))),
            "Accept-Ranges": "bytes",
        }
        if self.command == "HEAD":
            self._send(200, data, headers)
            return
        if file in hub.broken:
            self._refuse(hub.broken[file], "")
            return
        first = 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first = int(asked[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        hub.sent.append((f"{name}/{file}", first))
        stop = hub.cut.pop(file, None)
        if file in hub.held:
            stop = len(data) // 2
        self._send(206 if first else 200, data[first:], headers, stop)
        if file in hub.held:
            hub.is_holding.set()
            hub.release.wait()

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, body: bytes, headers: dict[str, str], stop: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:stop])
            self.wfile.flush()
            self.close_connection = self.close_connection or stop is not None
