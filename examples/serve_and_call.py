"""Serve a base with its adapters and call it with a stock client: `model` is a ref, or an expression over refs."""

import socket
import subprocess
import time

import openai
from small import adapter

adapter("me/law")
adapter("me/code")
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]

server = subprocess.Popen(["hub", "serve", "builtin:tiny-lm", "--port", str(port)])
try:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    while server.poll() is None:
        try:
            print([model.id for model in client.models.list()])
            break
        except openai.APIConnectionError:
            time.sleep(0.2)
    for model in ("me/law", "0.5 * me/law + me/code"):
        answer = client.completions.create(model=model, prompt="The parties", max_tokens=12, temperature=0)
        print(model, "->", repr(answer.choices[0].text))
finally:
    server.terminate()
    server.wait()
