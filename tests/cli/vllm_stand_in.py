"""
A program `vllm` that behaves as the real one as far as `trl-cmdp serve` sees it, of the standard library alone. The file
that STAND_IN names says what it answers and what goes wrong; beside it, it notes how it was called and what it started.
"""

import base64
import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


PLAN_FILE = Path(os.environ["STAND_IN"])
PLAN = json.loads(PLAN_FILE.read_text())


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(None)

    def do_POST(self):
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, payload):
        key = os.environ.get("VLLM_API_KEY")
        if key and self.headers.get("Authorization") != f"Bearer {key}":
            return self.send(401, b"{}")
        said = self.said(payload)
        if said is None:
            return self.send(404, b"{}")
        self.send(200, said)
        print("answered", self.path, flush=True)
        if payload is not None and PLAN["ends_after"] in (payload.get("input"), payload.get("prompt")):
            os._exit(3)

    def said(self, payload):
        if self.path == "/v1/models":
            root = sys.argv[2]
            return json.dumps({"data": [{"id": root, "root": root, "max_model_len": 128}]}).encode()
        if self.path == "/pooling" and "--runner" in sys.argv:
            answer = PLAN["hidden"][json.dumps(payload["input"])]
            if payload["encoding_format"] == "float":
                return json.dumps({"data": [{"data": answer["values"]}]}).encode()
            return base64.b64decode(answer["bytes"])
        if self.path == "/v1/completions" and "--runner" not in sys.argv:
            logps = PLAN["log_probs"][json.dumps(payload["prompt"])]
            positions = [{str(token): {"logprob": logp}} for token, logp in zip(payload["prompt"], logps, strict=True)]
            return json.dumps({"choices": [{"prompt_logprobs": [None, *positions[1:]]}]}).encode()
        return None

    def send(self, status, content):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


worker = subprocess.Popen(["sleep", "600"])
PLAN_FILE.with_name("called.json").write_text(
    json.dumps({"arguments": sys.argv[1:], "key": os.environ.get("VLLM_API_KEY"), "pids": [os.getpid(), worker.pid]})
)
print("loading", flush=True)
if PLAN["dies"]:
    sys.exit(f"RuntimeError: no memory, key {os.environ.get('VLLM_API_KEY')}")
time.sleep(PLAN["seconds_to_start"])
options = dict(zip(sys.argv[3:], sys.argv[4:], strict=False))
ThreadingHTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
