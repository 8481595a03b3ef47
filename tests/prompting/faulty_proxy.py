"""A real HTTP proxy that counts what goes through it and misbehaves as told: 429, 500, dropped, torn, slow, garbled."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class FaultyProxy:
    """Forwards to ``upstream`` what its plan does not spoil.

    Args:
        upstream: ``http://HOST:PORT``; None where every request is answered by ``plan``.
        plan: (body, how many requests with this body there have been before) -> a fault or None. Faults: a number
            (that HTTP status), ``drop`` (no answer), ``torn`` (half of one), ``slow:SECONDS`` (late), ``html`` (no
            JSON), or a dict (that JSON).
    """

    def __init__(self, upstream: str | None, plan: Callable[[dict, int], object] = lambda body, before: None):
        self.plan = plan
        self.requests = 0
        self.at_once = self.most_at_once = 0
        self.seen: Counter[str] = Counter()
        self.keys: set[str] = set()
        self.lock = threading.Lock()
        proxy, target = self, urlsplit(upstream) if upstream else None

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_POST(self):
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                with proxy.lock:
                    proxy.requests += 1
                    proxy.at_once += 1
                    proxy.most_at_once = max(proxy.most_at_once, proxy.at_once)
                    before = proxy.seen[raw.decode()]
                    proxy.seen[raw.decode()] += 1
                    proxy.keys.add(self.headers.get("Authorization", ""))
                try:
                    self.handle_fault(raw, proxy.plan(json.loads(raw), before))
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    with proxy.lock:
                        proxy.at_once -= 1

            def handle_fault(self, raw, fault):
                if isinstance(fault, str) and fault.startswith("slow:"):
                    time.sleep(float(fault.partition(":")[2]))
                    fault = "drop" if target is None else None
                if fault == "drop":
                    self.close_connection = True
                elif isinstance(fault, int):
                    self.reply(fault, json.dumps({"error": {"message": f"made up {fault}"}}).encode())
                elif isinstance(fault, dict):
                    self.reply(200, json.dumps(fault).encode())
                elif fault == "html":
                    self.reply(200, b"<html>busy</html>", kind="text/html")
                else:
                    connection = http.client.HTTPConnection(target.hostname, target.port, timeout=60)
                    connection.request("POST", self.path, raw, {"Content-Type": "application/json"})
                    answer = connection.getresponse()
                    self.reply(answer.status, answer.read(), torn=fault == "torn")
                    connection.close()

            def reply(self, status, body, kind="application/json", torn=False):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if torn else body)
                self.close_connection = self.close_connection or torn

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
