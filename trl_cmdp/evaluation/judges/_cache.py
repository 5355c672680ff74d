"""Replies on disk: what a model once said is not asked again."""

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any


class ReplyCache:
    """
    Append-only JSONL file of replies, each under the SHA-256 of everything that decided it.

    A line is written whole or is cut by a crash; a cut or foreign line is left out when the file is read, and nothing
    but strings is read from it.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._lock = threading.Lock()
        self._replies: dict[str, str] = {}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            with self._path.open("rb") as lines:
                for line in lines:
                    if (entry := _entry(line)) is not None:
                        self._replies[entry[0]] = entry[1]

    @staticmethod
    def key(request: dict[str, Any]) -> str:
        """SHA-256 of a request."""
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> str | None:
        """The reply under a key, `None` if there is none."""
        return self._replies.get(key)

    def add(self, key: str, reply: str) -> None:
        """Keeps a reply, on disk before it returns."""
        line = json.dumps({"key": key, "reply": reply}).encode() + b"\n"  # ASCII, so no line break of any kind in it
        with self._lock:
            with self._path.open("ab+") as file:
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # cut by a crash: its rest must not swallow this line
                        line = b"\n" + line
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self._replies[key] = reply


def _entry(line: bytes) -> tuple[str, str] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.keys() != {"key", "reply"} or not line.endswith(b"\n"):
        return None
    key, reply = entry["key"], entry["reply"]
    return (key, reply) if isinstance(key, str) and isinstance(reply, str) else None
