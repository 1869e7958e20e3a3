"""A W&B server on loopback: the few calls that wandb's client makes to upload and resume a run.

It keeps what the real one keeps of a run. History lines are written where the client says that
they begin, so two writers of one run overwrite each other's rows here too.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VIEWER = {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "admin": False}
VIEWER |= {"teams": {"edges": []}}


@dataclass
class Run:
    """What the server knows of a run."""

    about: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    exit_code: int | None = None

    def status(self, name: str) -> dict[str, Any]:
        """Return what a client that resumes the run is told."""
        return {
            "id": f"id-{name}",
            "name": name,
            "config": json.dumps(self.config),
            "wandbConfig": json.dumps({"t": 1}),
            "summaryMetrics": json.dumps(self.summary),
            "historyLineCount": len(self.history),
            "historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": self.about.get("tags"),
        }


class WandbServer:
    """The runs of the server by id, and the names of the GraphQL operations that it was asked."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.asked: list[str] = []
        self.url = ""

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer a GraphQL request."""
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = found[1] if found else ""
        self.asked.append(operation)
        name, project = variables.get("name"), variables.get("project") or "p"
        place = {"name": project, "entity": {"name": "me"}}
        if operation == "RunResumeStatus":
            run = self.runs.get(str(name))
            bucket = run.status(str(name)) if run else None
            return {"model": {"id": "m", **place, "bucket": bucket}}
        if operation == "UpsertBucket":
            run = self.runs.setdefault(str(name), Run())
            run.about |= {key: value for key, value in variables.items() if value is not None}
            run.config |= json.loads(variables.get("config") or "{}")
            bucket = {"id": f"id-{name}", "name": name, "displayName": name, "project": place}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateRunFiles":
            run = self.runs[variables["runId" if "runId" in variables else "run"]]
            run.files |= set(variables["files"])
            files = [
                {"name": n, "uploadUrl": f"{self.url}/storage/{n}"} for n in variables["files"]
            ]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {"viewer": VIEWER, "serverInfo": {"features": []}}

    def stream(self, name: str, request: dict[str, Any]) -> None:
        """Take in a part of the file stream of a run."""
        run = self.runs[name]
        for file, part in (request.get("files") or {}).items():
            rows = [json.loads(line) for line in part["content"]]
            if file == "wandb-history.jsonl":
                end = part["offset"] + len(rows)
                run.history[part["offset"] : end] = rows
            elif file == "wandb-summary.json":
                run.summary = rows[-1]
        if request.get("complete"):
            run.exit_code = request.get("exitcode")


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """Run the server on a free port of loopback."""
    server = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _body(self) -> Any:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                content = gzip.decompress(content)
            return content

        def _reply(self, document: Any) -> None:
            content = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            content = self._body()
            if self.path != "/graphql" and not self.path.endswith("/file_stream"):
                return self._reply({})
            body = json.loads(content)
            if self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], body)
                return self._reply({})
            variables = body.get("variables") or {}
            self._reply({"data": server.answer(body["query"], variables)})

        def do_PUT(self) -> None:
            self._body()
            self._reply({})

        def do_GET(self) -> None:
            self._reply({})

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """Print nothing: clients that are killed cut their connections."""

    with Quiet(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
