"""A server on this machine that answers the real client of the Hugging Face Hub as the hub does, and can go wrong."""

import base64
import contextlib
import hashlib
import json
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import close_session, constants, get_session, set_client_factory

assert constants.ENDPOINT.startswith("http://127.0.0.1:"), "the client was imported before tests.isolation"

UNKNOWN_LENGTH = -1


@dataclass
class Repository:
    """Commits, the last one first named by `main`: by their id the contents of all files by name."""

    commits: dict = field(default_factory=dict)
    refs: dict = field(default_factory=dict)
    private: bool = False
    messages: list = field(default_factory=list)

    def commit(self, files, message=""):
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = self.commits.get(self.refs.get("main"), {}) | files
        self.refs["main"] = sha
        self.messages.append(message)
        return sha


@dataclass
class Hub:
    """What the server has and was asked.

    `spoiled` changes what is sent of a file, by name: its bytes, whatever length was announced. `status` answers every
    question with an error. `plain` are files at addresses outside the hub, by path.
    """

    repositories: dict = field(default_factory=dict)
    spoiled: dict = field(default_factory=dict)
    status: int | None = None
    plain: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)
    large: dict = field(default_factory=dict)
    announced: dict = field(default_factory=dict)
    pause: float = 0.0


def redirect(host):
    """Have the client of the hub find the addresses of a host on the server instead; the client is a real one."""
    library = sys.modules[type(get_session()).__module__.partition(".")[0]]  # it differs between its versions
    here = urlsplit(constants.ENDPOINT)

    class Transport(library.HTTPTransport):
        def handle_request(self, request):
            if request.url.host == host:
                request.url = request.url.copy_with(scheme="http", host=here.hostname, port=here.port)
            return super().handle_request(request)

    set_client_factory(lambda: library.Client(transport=Transport(), follow_redirects=True))


def spoil(data):
    """As many bytes, one of them another."""
    return data[:-1] + bytes([data[-1] ^ 1])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, value=None, status=200, headers=(), body=None, length=None):
        data = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for name, text in {"Content-Length": len(data) if length is None else length, **dict(headers)}.items():
            if text == UNKNOWN_LENGTH:
                name, text, self.close_connection = "Connection", "close", True
            self.send_header(name, str(text))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(OSError):
                for start in range(0, len(data), 65536):
                    self.wfile.write(data[start : start + 65536])
                    time.sleep(self.hub.pause)
                if length is not None and len(data) < length:
                    self.close_connection = True

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.status:
            return self.answer({"error": "out of order"}, self.hub.status)
        if path in self.hub.plain:
            data = self.hub.plain[path]
            length = self.hub.announced.get(path, len(data))
            return self.answer(body=self.hub.spoiled.get(path, lambda d: d)(data), length=length)
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree)/(.+))?", path):
            return self.look(match[1], match[2], match[3] or "main")
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self.send_file(*match.groups())
        return self.answer({"error": path}, 404)

    do_HEAD = do_GET

    def look(self, name, what, revision):
        found = self.hub.repositories.get(name)
        if found is None:
            return self.answer({"error": "no repository"}, 404, {"X-Error-Code": "RepoNotFound"})
        revision, _, folder = revision.partition("/")
        sha = found.refs.get(revision, revision)
        if sha not in found.commits:
            return self.answer({"error": "no revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if folder:  # no repository has one
            return self.answer({"error": "no folder"}, 404, {"X-Error-Code": "EntryNotFound"})
        sizes = {path: self.hub.announced.get(path, len(data)) for path, data in found.commits[sha].items()}
        oids = {path: hashlib.sha1(data).hexdigest() for path, data in found.commits[sha].items()}
        if what == "tree":
            return self.answer([{"type": "file", "path": p, "size": sizes[p], "oid": oids[p]} for p in sizes])
        files = [{"rfilename": p, "size": sizes[p], "blobId": oids[p]} for p in sizes]
        return self.answer({"id": name, "sha": sha, "private": found.private, "siblings": files, "tags": []})

    def send_file(self, name, sha, path):
        found = self.hub.repositories.get(name)
        if found is None:
            return self.answer({"error": "no repository"}, 404, {"X-Error-Code": "RepoNotFound"})
        sha = found.refs.get(sha, sha)
        if sha not in found.commits:
            return self.answer({"error": "no revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        data = found.commits[sha].get(path)
        if data is None:
            return self.answer({"error": "no file"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        sent = self.hub.spoiled.get(path, lambda d: d)(data) if self.command == "GET" else data
        status, whole = 200, len(data)
        if (given := self.headers.get("Range")) and self.command == "GET":
            start = int(re.fullmatch(r"bytes=(\d+)-.*", given)[1])
            sent, status = sent[start:], 206
            headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
            whole -= start
        return self.answer(body=sent, status=status, headers=headers, length=whole)

    def do_POST(self):
        path, body = urlsplit(self.path).path, self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.asked.append(f"POST {path}")
        if self.hub.status:
            return self.answer({"error": "out of order"}, self.hub.status)
        if path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            address = {"url": f"{constants.ENDPOINT}/{name}"}
            if name in self.hub.repositories:
                return self.answer(address | {"error": "exists"}, 409)
            self.hub.repositories[name] = Repository(
                private=asked.get("visibility") == "private" or asked.get("private", False)
            )
            self.hub.repositories[name].commit({".gitattributes": b""})
            return self.answer(address)
        if match := re.fullmatch(r"/api/models/(.+/.+)/preupload/main", path):
            files = json.loads(body)["files"]
            kind = {True: "lfs", False: "regular"}
            return self.answer({"files": [
                {"path": f["path"], "uploadMode": kind[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                for f in files
            ]})  # fmt: skip
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            links = [o | {"actions": {"upload": {"href": f"{constants.ENDPOINT}/lfs/{o['oid']}"}}} for o in objects]
            return self.answer({"transfer": "basic", "objects": links})
        if match := re.fullmatch(r"/api/models/(.+/.+)/commit/main", path):
            files, message = {}, ""
            for line in map(json.loads, body.splitlines()):
                key, value = line["key"], line["value"]
                message = value["summary"] if key == "header" else message
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                if key == "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
            sha = self.hub.repositories[match[1]].commit(files, message)
            address = f"{constants.ENDPOINT}/{match[1]}/commit/{sha}"
            return self.answer({"success": True, "commitOid": sha, "commitUrl": address})
        return self.answer({"error": path}, 404)

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.large[oid] = data
        self.answer({})


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self):
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()

    def handle_error(self, *_):  # a client that has gone
        pass


@contextlib.contextmanager
def serving(hub):
    """A server of this hub, at the address that the client has from HF_ENDPOINT."""
    address = urlsplit(constants.ENDPOINT)
    server = Server((address.hostname, address.port), type("Own", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        close_session()  # the client would go on with the connections that it has
        server.shutdown()
        server.server_close()
        thread.join()
