"""A server of completions on a real socket: transformers behind the endpoints that vLLM and SGLang have."""

import contextlib
import http.server
import json
import socket
import struct
import threading
import time

LOADING = threading.Lock()


class Endpoint:
    """Serves until it is closed; what it was asked is kept.

    Args:
        answer: makes of the body of a completions request (a status, JSON or bytes); None: transformers on the folder
            that /reload has named last.
        hang: it takes connections, and answers nothing.
    """

    def __init__(self, answer=None, hang=False):
        self.answer, self.hang, self.model = answer or self.complete, hang, None
        self.folders, self.asked, self.lock = [], [], threading.Lock()
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self.reply(*endpoint.get(self.path))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.reply(*endpoint.post(self.path, body))

            def reply(self, status, value):
                if status == "break":
                    return self.break_off(value)
                with contextlib.suppress(OSError):  # whoever asked has gone
                    content = value if isinstance(value, bytes) else json.dumps(value).encode()
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def break_off(self, how):
                """End the connection in the middle, as a process that is killed does."""
                if how == "half an error":
                    self.wfile.write(b"HTTP/1.1 503 Busy\r\nContent-Length: 1000\r\n\r\n{")
                    self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def get(self, path):
        if self.hang:
            time.sleep(30)
        if path == "/v1/models":
            return 200, {"data": [{"id": "student"}]}
        return (200, {}) if path == "/health" else (404, {})

    def post(self, path, body):
        if self.hang:
            time.sleep(30)
        if path == "/reload":
            self.folders.append(body["model_path"])
            return 200, self.load(body["model_path"]) if self.answer == self.complete else {}
        self.asked.append(body)
        return self.answer(body)

    def load(self, folder):
        with LOADING:  # transformers is not made for several threads
            from transformers import AutoModelForCausalLM

            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        return {"success": True}

    def complete(self, body):
        """Draws of the whole distribution at the temperature, one token after the other."""
        import torch

        ids, logprobs = [], []
        with self.lock, torch.no_grad():
            generator = torch.Generator().manual_seed(body["seed"])
            while len(ids) < body["max_tokens"] and not set(ids) & set(body["stop_token_ids"]):
                logits_V = self.model(torch.tensor([[*body["prompt"], *ids]])).logits[0, -1].float()
                drawn = torch.multinomial((logits_V / body["temperature"]).softmax(0), 1, generator=generator)
                ids.append(int(drawn))
                logprobs.append(float(logits_V.log_softmax(0)[drawn]))
        ended = ids[-1] in body["stop_token_ids"]
        return 200, {"choices": [choice(body, ids, logprobs, "stop" if ended else "length")]}


def choice(body, ids, logprobs=None, reason="length", **more):
    answer = {"index": 0, "text": "…", "finish_reason": reason, "token_ids": ids, "prompt_token_ids": body["prompt"]}
    return answer | {"logprobs": {"token_logprobs": logprobs or [-1.0] * len(ids)}} | more
