#!/usr/bin/env bash
# Streams a video headless: runs an example workflow through the pack's own nodes, in an embedded ComfyUI host.
#   bash run.sh [--fp8 | --int8] [--blocks N] [--prompt "..."] [--model NAME] [--seed N] [--out output/stream.mp4]
set -euo pipefail
cd "$(dirname "$0")"
workflow=text_to_video_stream
for argument in "$@"; do
  case $argument in --fp8 | --int8) workflow=quantized_stream ;; esac
done
bash tools/make_venv.sh
exec .venv/bin/python tools/run_workflow.py "example_workflows/$workflow.json" "$@"
