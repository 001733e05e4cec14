"""A small hub on 127.0.0.1, of what huggingface_hub asks to fetch a model."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote


class LocalHub:
    """Serves folders as models; ``requests`` lists what was asked.

    Args:
        models: by id, its commits, the newest last: name of the commit and folder.
    """

    def __init__(self, models: dict[str, list[tuple[str, Path]]]) -> None:
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, body: bool) -> None:
                path = unquote(self.path.split("?")[0])
                hub.requests.append(path)
                found = hub.find(models, path)
                content, headers = found or (b"{}", {"X-Error-Code": "RepoNotFound"})
                self.send_response(200 if found else 404)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @staticmethod
    def find(
        models: dict[str, list[tuple[str, Path]]], path: str
    ) -> tuple[bytes, dict[str, str]] | None:
        """Content and headers of what a path names."""
        for name, commits in models.items():
            by_commit = {**dict(commits), "main": commits[-1][1]}
            shas = {**{sha: sha for sha, _ in commits}, "main": commits[-1][0]}
            asked, _, revision = path.removeprefix(f"/api/models/{name}/").partition("/")
            if asked in ("revision", "tree") and revision in by_commit:
                folder = by_commit[revision]
                files = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
                info: Any = {"id": name, "sha": shas[revision], "siblings": []}
                if asked == "tree":
                    size = {f: (folder / f).stat().st_size for f in files}
                    kind = {"type": "file", "oid": "0" * 40}
                    info = [{"path": str(f), "size": size[f]} | kind for f in files]
                return json.dumps(info).encode(), {"Content-Type": "application/json"}
            if path.startswith(f"/{name}/resolve/"):
                revision, file = path.removeprefix(f"/{name}/resolve/").split("/", 1)
                if revision not in by_commit or not (by_commit[revision] / file).is_file():
                    return None
                content = (by_commit[revision] / file).read_bytes()
                etag = hashlib.sha256(content).hexdigest()
                return content, {"ETag": f'"{etag}"', "X-Repo-Commit": shas[revision]}
        return None

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
