"""A stand-in for the Hugging Face Hub on the loopback address: it speaks the Hub's protocol, and can be ill.

`with Hub(repos) as hub` serves `repos`, {"openai-community/gpt2": {path: bytes}, "datasets/org/name": {...}}, at
`hub.url`, which is what HF_ENDPOINT takes. `openai_files` makes random weights in OpenAI's own layout, `parquet` and
`jsonl` the forms in which data sets lie there.
"""

import gzip
import hashlib
import io
import json
import re
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

ERRORS = {"limited": (429, "You have reached your 'api' rate limit."),
          "gated": (403, "Access to this repository is restricted. You must be authenticated to access it."),
          "unauthorized": (401, "Invalid username or password."), "down": (503, "Service unavailable.")}


class Hub(ThreadingHTTPServer):
    """mood: "well", "silent" (takes a request and never answers), "portal" (a login page for all), or one of ERRORS."""

    daemon_threads, block_on_close = True, False

    def __init__(self, repos: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.mood, self.cut = repos, "well", 0  # cut: bytes after which one download breaks off
        self.asked: list[tuple[str, str, str]] = []  # method, path, range
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def fetched(self) -> list[str]:
        return [path for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]


def commit(files: dict[str, bytes]) -> str:
    return hashlib.sha1(b"".join(content for _, content in sorted(files.items()))).hexdigest()


def is_large(path: str) -> bool:
    """Large files are git-lfs's, and known by the sha256 of their content."""
    return not path.endswith((".json", ".md"))


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path, self.headers.get("Range", "")))
        if hub.mood == "silent":
            time.sleep(120)
            return
        if hub.mood == "portal":
            return self.send(200, b"<html>Welcome to the hotel</html>", {"Content-Type": "text/html"})
        if hub.mood in ERRORS:
            code, words = ERRORS[hub.mood]
            return self.send(code, json.dumps({"error": words}).encode(), {"X-Error-Message": words} | (
                {"X-Error-Code": "GatedRepo"} if hub.mood == "gated" else {}))
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            kind, name, what, _ = found.groups()
            repo = name if kind == "models" else f"datasets/{name}"
            if repo in hub.repos:
                about = self.tree(hub.repos[repo]) if what == "tree" else {
                    "id": name, "sha": commit(hub.repos[repo]), "private": False, "tags": [], "downloads": 0,
                    "likes": 0, "siblings": [{"rfilename": file} for file in hub.repos[repo]]}
                return self.send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
        elif found := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            files = hub.repos.get(found[1], {})
            if found[2] in files:
                return self.send_file(found[2], files[found[2]], commit(files))
        self.send(404, b'{"error": "Not found"}', {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Not found"})

    def tree(self, files: dict[str, bytes]) -> list[dict]:
        return [{"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()} | (
                {"lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}
                if is_large(path) else {}) for path, content in files.items()]

    def send_file(self, path: str, content: bytes, sha: str):
        hub, whole = self.server, len(content)
        etag = (hashlib.sha256 if is_large(path) else hashlib.sha1)(content).hexdigest()
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes",
                   "Content-Type": "application/octet-stream", "Last-Modified": formatdate(0, usegmt=True)}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(part[1]), int(part[2] or whole - 1)
            content = content[start:end + 1]
            return self.send(206, content, headers | {"Content-Range": f"bytes {start}-{end}/{whole}"})
        if self.command == "GET" and 0 < hub.cut < whole:
            content, hub.cut = content[:hub.cut], 0
            self.send(200, content, headers, length=whole)
            self.close_connection = True
            return self.connection.close()
        self.send(200, content, headers)

    def send(self, code: int, body: bytes, headers: dict[str, str], length: int | None = None):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.wfile.flush()

    def log_message(self, *args):
        pass


def openai_files(n_embd: int = 32, n_layer: int = 2, n_head: int = 2) -> dict[str, bytes]:
    """config.json and model.safetensors as OpenAI's are: no prefix in the names, and each layer's mask among them."""
    import torch
    from safetensors.torch import save

    import model

    torch.manual_seed(0)
    gpt = model.GPT(model.GPTConfig(n_embd=n_embd, n_layer=n_layer, n_head=n_head))
    weights = {name: (w.t() if model._is_conv1d(name) else w).contiguous() for name, w in gpt.state_dict().items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 1024, 1024).tril() for i in range(n_layer)}
    about = {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
             "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
             "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": n_embd, "n_head": n_head,
             "n_layer": n_layer, "n_positions": 1024, "resid_pdrop": 0.1, "vocab_size": 50257}
    return {"config.json": json.dumps(about).encode(), "model.safetensors": save(weights | masks, {"format": "pt"}),
            "pytorch_model.bin": b"a pickle", "README.md": b"---\nlicense: mit\n---\n", "tf_model.h5": b"0" * 1000}


def parquet(rows: list[dict]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def jsonl(rows: list[dict], zipped: bool = False) -> bytes:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return gzip.compress(text) if zipped else text
