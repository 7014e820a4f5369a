"""A GGUF file in llama.cpp, by xllamacpp, in a process of its own: python -m tests.conversion.llama_cpp FILE < requests.json"""

import json
import math
import subprocess
import sys

import pytest


def ask(path, requests):
    """Return the answers of `main`. Skip the test where llama.cpp is missing."""
    pytest.importorskip("xllamacpp")
    command = [sys.executable, "-m", "tests.conversion.llama_cpp", str(path)]
    done = subprocess.run(command, input=json.dumps(requests), text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def log_probabilities(answer, vocab_size):
    """[v], -inf where llama.cpp left one out."""
    import torch

    found = torch.full((vocab_size,), -math.inf)
    for one in answer:
        found[one["id"]] = one["logprob"]
    return found


def main(path):
    """Answer requests: {"ids": [...], "vocab_size": v} with the next token's log-probabilities, {"text": t} with its ids."""
    import urllib.request

    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.cpuparams.n_threads = 256, 1, False, 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)

    def answer(request):
        if "text" in request:
            data = json.dumps({"content": request["text"], "add_special": True, "parse_special": True}).encode()
            sent = urllib.request.Request(
                server.listening_address + "/tokenize", data, {"Content-Type": "application/json"}
            )
            return json.loads(urllib.request.urlopen(sent).read())["tokens"]
        options = {"n_predict": 1, "n_probs": request["vocab_size"], "temperature": -1, "ignore_eos": True}
        found = server.handle_completions({"prompt": request["ids"], "cache_prompt": False, **options})
        return found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]

    print(json.dumps([answer(request) for request in json.load(sys.stdin)]))


if __name__ == "__main__":
    main(sys.argv[1])
