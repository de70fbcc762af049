"""A tokenizer whose ids can be read: id = byte, and four special tokens."""

import base64
import json

from megakd.data.tokenizers.load import load_tokenizer

START, END, BOS, EOS = 256, 257, 258, 259
SPECIAL = {"<|im_start|>": START, "<|im_end|>": END, "<bos>": BOS, "<eos>": EOS}


def byte_tokenizer(folder):
    path = folder / "bytes.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(bytes([value])) + b" %d\n" % value for value in range(256)))
    settings = {"pattern": ".", "special_tokens": SPECIAL, "bos": "<bos>", "eos": "<eos>"}
    path.with_name("bytes.tiktoken.json").write_text(json.dumps(settings))
    return load_tokenizer(path)
