#!/usr/bin/env bash
# The CUDA rows of docs/performance.md in one go, on a bare machine with a GPU and without network, in under 8 minutes.
#
#     benchmarks/gpu.sh --wheels FOLDER [--weights FOLDER] [--out FOLDER] [--python PYTHON] [--device=cpu --tiny]
#
# --wheels   a folder with all wheels, made where there is a network, for the Python of the GPU machine:
#            pip download -d FOLDER setuptools torch . && pip download -d FOLDER --no-deps recbole==1.2.1
# --weights  a model folder of transformers for the rows of streams against prompts; without it random weights are used
# --device=cpu --tiny   shows on any machine that the script runs
set -euo pipefail
cd "$(dirname "$0")/.."
wheels= weights= out=benchmarks/results python=python3 device=cuda tiny=
while [ $# -gt 0 ]; do
  case "$1" in
    --wheels) wheels=$2; shift ;;
    --weights) weights=$2; shift ;;
    --out) out=$2; shift ;;
    --python) python=$2; shift ;;
    --device=*) device=${1#*=} ;;
    --tiny) tiny=--tiny ;;
    *) echo "unknown argument: $1" >&2; exit 2 ;;
  esac
  shift
done
if [ -n "$wheels" ]; then
  "$python" -m venv .venv-bench
  python=.venv-bench/bin/python
  install=("$python" -m pip install --quiet --no-index --find-links "$wheels")
  "${install[@]}" setuptools
  "${install[@]}" --no-build-isolation .
  "${install[@]}" --no-deps recbole==1.2.1
fi
mkdir -p "$out"
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1
end=$((SECONDS + 470))
run() {  # NAME PROGRAM ARGUMENTS...: nothing starts that could not end in time; a failing program does not stop the others
  local name=$1 program=$2
  shift 2
  if [ $((end - SECONDS)) -lt 20 ]; then echo "$name: left out, no time"; return; fi
  timeout $((end - SECONDS)) "$python" "benchmarks/$program.py" --device "$device" $tiny --clock wall \
    --json "$out/speed-$device-$name.json" "$@" || echo "$name: failed"
}
if [ "$device" = cuda ]; then
  half="--dtype bfloat16" rounds="--rounds 5"
else
  half="--dtype float32" rounds="--rounds 1"
fi
# The most telling rows first.
run step-1b training_step --backbone random-1b $half $rounds --prompts 16 --chunks 4x1024
run scoring-1b scoring --backbone random-1b $half $rounds --full_prompts 20
run compute-1b compute --backbone random-1b --variants bfloat16 bfloat16+compile $rounds --chunks 4x1024
run streams streams $rounds --prompts 64 --labels 1024 ${weights:+--backbone "$weights"}
run step-7b training_step --backbone random-7b $half $rounds --prompts 8 --chunks 2x1024 --without_released
run scoring-7b scoring --backbone random-7b $half $rounds --full_prompts 20
