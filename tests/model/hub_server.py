"""The API of the Hugging Face hub, as far as a download uses it, for one model on loopback."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A server of the files under `folder`, as the model `name`.

    requests  (method, path) of all, without the query
    files     of `requests`, the files whose content was requested
    gated     files are refused with the hub's 403 of a gated model
    token     if set, whoever does not send it is refused with 401
    broken    a file's name: its first download breaks off halfway
    down      every request is answered with 503
    """

    def __init__(self, folder, name="owner/model"):
        self.folder, self.name = Path(folder), name
        self.requests, self.ranges = [], []
        self.gated, self.token, self.broken, self.down = False, None, None, False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def files(self):
        paths = [path for method, path in self.requests if method == "GET" and "/resolve/" in path]
        return sorted(path.split("/resolve/")[1].split("/", 1)[1] for path in paths)

    def answer(self, request):
        path = unquote(urlsplit(request.path).path)
        self.requests.append((request.command, path))
        api, resolve = f"/api/models/{self.name}", f"/{self.name}/resolve/"
        if self.down:
            return self._send(request, 503, {})
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            known = "Authorization" in request.headers
            wrong = {"X-Error-Message": "Invalid username or password."}
            return self._send(request, 401, wrong if known else {"X-Error-Code": "RepoNotFound"})
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self._names()]
            found = {"id": self.name, "sha": COMMIT, "siblings": siblings, "private": False}
            return self._send(request, 200, {}, json.dumps(found).encode())
        if path.startswith(f"{api}/revision/"):
            return self._send(request, 404, {"X-Error-Code": "RevisionNotFound"})
        if path in (f"{api}/tree/main", f"{api}/tree/{COMMIT}"):
            entries = [
                {
                    "type": "file",
                    "path": name,
                    "size": (self.folder / name).stat().st_size,
                    "oid": self._etag(name),
                }
                for name in self._names()
            ]
            return self._send(request, 200, {}, json.dumps(entries).encode())
        found = re.fullmatch(rf"{re.escape(resolve)}(main|{COMMIT})/(.+)", path)
        if found and (self.folder / found[2]).is_file():
            if self.gated:
                return self._send(request, 403, {"X-Error-Code": "GatedRepo"})
            return self._file(request, found[2])
        code = "EntryNotFound" if path.startswith(resolve) else "RepoNotFound"
        return self._send(request, 404, {"X-Error-Code": code})

    def _names(self):
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [path.relative_to(self.folder).as_posix() for path in paths]

    def _etag(self, name):
        return hashlib.sha1((self.folder / name).read_bytes()).hexdigest()

    def _file(self, request, name):
        data = (self.folder / name).read_bytes()
        headers = {
            "ETag": f'"{self._etag(name)}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        requested = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if requested:
            begin = int(requested[1])
            self.ranges.append((name, begin))
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            return self._send(request, 206, headers, data[begin:])
        half = name == self.broken and request.command == "GET"
        if half:
            self.broken = None
        self._send(request, 200, headers, data, len(data) // 2 if half else None)

    def _send(self, request, status, headers, data=b"", cut=None):
        request.send_response(status)
        for key, value in {**headers, "Content-Length": len(data)}.items():
            request.send_header(key, str(value))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(data[:cut])
        if cut is not None:
            request.close_connection = True
