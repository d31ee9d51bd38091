#!/bin/sh
# vLLM serves the store by its names: refs, aliases and expressions as `model`. PYTHON has vllm and moduloom; BASE is a directory.
#   PYTHON=~/vllm/bin/python sh examples/vllm.sh BASE "acme/tone@prod" "0.5 * acme/tone + acme/law" ...
set -eu
base=$1 python=${PYTHON:-python} port=${PORT:-8010}
shift
export VLLM_PLUGINS=moduloom VLLM_ALLOW_RUNTIME_LORA_UPDATING=True
"$python" -m vllm.entrypoints.openai.api_server --model "$base" --port "$port" --enable-lora \
    --max-lora-rank "${RANK:-32}" --dtype float32 --enforce-eager ${OPTIONS:-} >vllm.log 2>&1 &
server=$!
trap 'kill $server' EXIT
until curl -sf "localhost:$port/health"; do
    kill -0 $server || { tail vllm.log; exit 1; }
    sleep 1
done
for model in "$@"; do
    "$python" -c 'import json, sys; print(json.dumps({"model": sys.argv[1], "prompt": "The parties", "max_tokens": 24, "temperature": 0}))' "$model" |
        curl -s "localhost:$port/v1/completions" -H 'Content-Type: application/json' -d @- |
        "$python" -c 'import json, sys; got = json.load(sys.stdin); print(got.get("model"), "->", repr(got["choices"][0]["text"]) if "choices" in got else got["error"])'
done
