"""A server of the standard library that answers as vLLM does, or as it should not."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


KEY = "secret-key-0123456789"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.respond(None)

    def do_POST(self):
        self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def respond(self, payload):
        server = self.server
        with server.lock:
            server.requests.append((self.path, payload, dict(self.headers)))
        if server.fault is not None and server.fault(self, payload):
            return
        if server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
            self.send(401, {"error": "Unauthorized"})
        elif self.path == "/v1/models":
            self.send(200, server.models)
        elif self.path == f"/{server.route}":
            self.send(200, server.answer(payload))
        else:
            self.send(404, {"detail": "Not Found"})

    def send(self, status, content, headers=(), length=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class FakeServer(ThreadingHTTPServer):
    """vLLM as far as it is asked: `route` "pooling" or "v1/completions"."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, model, root, route="pooling", key=None, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.route, self.key = model, route, key
        self.models = {"object": "list", "data": [{"id": "teacher", "root": root, "max_model_len": 32}]}
        self.requests, self.fault, self.lock = [], None, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    @torch.no_grad()
    def answer(self, payload):
        tokens = payload["input" if self.route == "pooling" else "prompt"]
        with self.lock:
            if self.route == "pooling":
                hidden = self.model.base_model(torch.tensor([tokens])).last_hidden_state[0]
                if payload["encoding_format"] == "float":
                    return {"data": [{"index": 0, "data": hidden.float().tolist()}]}
                return hidden.to(DTYPES[payload["embed_dtype"]]).view(torch.uint8).numpy().tobytes()
            logps = self.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        k = payload["prompt_logprobs"]
        positions = [None]
        for row, token in zip(logps, tokens[1:], strict=False):
            known = {token, *(row.topk(k).indices.tolist() if k else [])}
            positions.append({str(index): {"logprob": row[index].item(), "rank": 1} for index in known})
        return {"choices": [{"index": 0, "prompt_logprobs": positions}]}


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


def fail_first(count, status=500):
    """Fault: the first requests fail."""
    left = iter(range(count))

    def fault(handler, payload):
        if next(left, None) is None:
            return False
        handler.send(status, {"error": {"message": "try later"}})
        return True

    return fault


def always(status, content, **kwargs):
    return lambda handler, payload: handler.send(status, content, **kwargs) or True
