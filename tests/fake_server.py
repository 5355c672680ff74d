"""What our stand-ins for vLLM and OpenAI share: HTTP on a local socket, requests recorded, answers broken on demand."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


KEY = "secret-key-0123456789"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.respond(None)

    def do_POST(self):
        self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def respond(self, payload):
        server = self.server
        with server.lock:
            server.requests.append((self.path, payload, dict(self.headers)))
        if server.fault is not None and server.fault(self, payload) is not False:
            return
        if server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
            self.send(401, {"error": "Unauthorized"})
        else:
            said = server.answer(self.path, payload)
            self.send(*((404, {"detail": "Not Found"}) if said is None else (200, said)))

    def send(self, status, content, headers=(), content_type="application/json", length=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class LocalServer(ThreadingHTTPServer):
    """
    `answer(path, payload)` is what a request gets, `None` for HTTP 404. A fault, called with the handler and the
    payload, answers in its place unless it returns `False`.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, key=None, fault=None, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.key, self.fault = key, fault
        self.requests, self.lock = [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(status, content, **kwargs):
    """Fault: this answer."""
    return lambda handler, payload: handler.send(status, content, **kwargs)


def silence(seconds):
    """Fault: no answer for a while, then a closed connection."""
    return lambda handler, payload: threading.Event().wait(seconds) or None


def in_turn(faults):
    """Fault: each of these for one request, `None` for none, and none after them."""
    left = iter(faults)

    def fault(handler, payload):
        one = next(left, None)
        return False if one is None else one(handler, payload)

    return fault


def fail_first(count, status=500):
    """Fault: the first requests fail."""
    return in_turn([answer(status, {"error": {"message": "try later"}})] * count)
