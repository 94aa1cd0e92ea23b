#!/usr/bin/env bash
# Streams a video headless: runs an example workflow through the pack's own nodes, in an embedded ComfyUI host.
#   bash run.sh [--fp8 | --int8] [--blocks N] [--prompt "..." | --track FILE] [--seed N] [--out stream.mp4]
#               [--start-image FILE] [--video FILE --strength X]
#               [--models DIR] [--model NAME] [--vae NAME] [--text-encoder NAME] [--lora NAME[:STRENGTH]]...
# FILE holds prompts over time, such as "0-3: a calm sea" and "4: storm"; see web/docs/StreamBlocksPromptTrack.md.
# DIR is a ComfyUI models folder. A NAME is what the loader lists, such as vae/wan_2.1_vae.safetensors, or a path, which
# is linked into the models folder. More options: --help.
set -euo pipefail
root="$(cd "$(dirname "$0")" && pwd)"
workflow=text_to_video_stream
for argument in "$@"; do
  case $argument in --fp8 | --int8) workflow=quantized_stream ;; esac
done
bash "$root/tools/make_venv.sh"
exec "$root/.venv/bin/python" "$root/tools/run_workflow.py" "$root/example_workflows/$workflow.json" "$@"
