"""A chat completions endpoint of the standard library on a local socket, that answers as OpenAI's does, or as it should not."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


KEY = "secret-key-0123456789"


def completion(content):
    """The answer of a model that says `content`."""
    message = {"role": "assistant", "content": content}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, payload, dict(self.headers)))
            fault = next(server.faults, None)
        if fault is not None:
            fault(self)
        elif server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
            self.send(401, {"error": "Unauthorized"})
        elif self.path != "/v1/chat/completions":
            self.send(404, {"error": "Not Found"})
        else:
            self.send(200, completion(server.say(payload["messages"])))

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


class FakeOpenAI(ThreadingHTTPServer):
    """
    `say(messages)` is the model. The first requests meet `faults`, each a function of the handler, `None` for none.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, say, faults=(), key=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.say, self.faults, self.key = say, iter(faults), key
        self.requests, self.lock = [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


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
    """Fault: an answer."""
    return lambda handler: handler.send(status, content, **kwargs)


def silence(seconds):
    """Fault: no answer for a while, then a closed connection."""
    return lambda handler: threading.Event().wait(seconds)
