#!/usr/bin/env bash
# The one thing to run on a GPU machine that one has for minutes: what only a GPU can show, in the order of its worth.
#
#   bench/device.sh [--dry-run] [--minutes N] [--data CAMVID] [FOLDER]
#
# Results come into FOLDER, by default build/device, as they are made, with a page summary.md: each step has a limit of
# its own, and what does not fit into the minutes (15 unless given) is left out and said to be. Without --data, what
# needs photos trains on drawn scenes.
#
# Needs CUDA's torch and triton of this machine's python3. Whatever else fastseg imports is installed from build/wheels
# where that folder is (`make wheels` fills it), so that the machine needs no package index.
set -euo pipefail
cd "$(dirname "$0")/.."
began=$SECONDS minutes=15 data=synth dry= out=build/device
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=yes ;;
        --minutes) minutes=$2; shift ;;
        --data) data=$2; shift ;;
        -*) echo "bench/device.sh: no option $1; --dry-run, --minutes N, --data CAMVID" >&2; exit 2 ;;
        *) out=$1 ;;
    esac
    shift
done
venv=build/device-venv
source=
if [ -d build/wheels ]; then source="--no-index --find-links build/wheels"; fi

# step NAME LIMIT COMMAND: what it prints goes to NAME.txt; its time, outcome and last line go to the summary.
step() {
    local name=$1 limit=$2 command=$3 left=$((minutes * 60 - SECONDS + began)) start=$SECONDS code=0
    if [ -n "$dry" ]; then echo "$name, at most $limit s: $command"; return; fi
    if [ "$left" -lt 20 ]; then echo "| $name | | left out: no time | |" >> "$out/summary.md"; return; fi
    timeout --kill-after 10 $((limit < left ? limit : left)) bash -c "$command" > "$out/$name.txt" 2>&1 || code=$?
    case $code in 0) outcome=done ;; 124 | 137) outcome="stopped after its time" ;; *) outcome="FAILED ($code)" ;; esac
    echo "| $name | $((SECONDS - start)) | $outcome | $(tail -1 "$out/$name.txt" | tr '|' '/' | cut -c1-150) |" |
        tee -a "$out/summary.md"
}

if [ -z "$dry" ]; then
    mkdir -p "$out"
    printf '# %s\n\n%s\n\n| step | seconds | outcome | its last line |\n|---|---|---|---|\n' "$(date -u +%FT%TZ)" \
        "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || echo "no GPU here"), commit $(git rev-parse --short HEAD)" \
        > "$out/summary.md"
fi
step install 120 "python3 -m venv --system-site-packages $venv && $venv/bin/pip install --quiet $source -c constraints.txt -r bench/device.txt && $venv/bin/pip install --quiet --no-deps --no-build-isolation -e ."
fastseg=$venv/bin/fastseg
fast="$fastseg train --data '$data' --recipe fast --size 360x480 --device cuda"
step cudnn 60 "$venv/bin/pip install --quiet --no-deps $source nvidia-cudnn-frontend" # a peer: its graphs need nothing else
step tests 240 "$venv/bin/python -m pytest -m gpu tests/kernels tests/fastseg tests/bench"
# A captured step beside an eager one and what a user would take instead.
for batch in 4 16 8 32; do
    step "model-batch-$batch" 150 "$fastseg bench model --device cuda --size 360x480 --batch $batch --json > '$out/model-batch-$batch.json'"
done
step run 180 "$fast --epochs 30 --set train.validate_every=5 --run '$out/run'"
# What each regulariser is worth in a long run, on a sequence of the training images that none of them trains on.
if [ "$data" != synth ]; then
    step dev 20 "sed 's#CAMVID#$data#' bench/camvid-dev.toml > '$out/dev.toml' && $fastseg data check '$out/dev.toml'"
    long="$fastseg train --data '$out/dev.toml' --recipe fast --size 360x480 --device cuda --epochs 100 --set train.validate_every=20"
    step long-plain 150 "$long --run '$out/long-plain'"
    step long-scale 150 "$long --set augment.scale=2 --run '$out/long-scale'"
    step long-colour 150 "$long --set augment.colour=0.3 --run '$out/long-colour'"
fi
step profile 90 "$fastseg profile --data '$data' --recipe fast --size 360x480 --device cuda --out '$out/profile'"
# The operators, kernel by kernel and map by map.
for batch in 4 16; do
    step "kernels-batch-$batch" 120 "$fastseg bench kernels --device cuda --size 360x480 --batch $batch --json > '$out/kernels-batch-$batch.json'"
done
step parity 60 "$fastseg data parity '$data' --device cuda"
step pipelines 90 "$venv/bin/python -m pytest -m gpu tests/pipelines"
step fill 60 "$fastseg bench fill --data '$data' --size 360x480 --device cuda --rounds 3 --json > '$out/fill.json'"
step start 60 "$fast --epochs 1 --run '$out/start'" # with warm caches: what its time until the first step goes to
step jpeg 60 "$fastseg bench data --format jpeg --device cuda --minutes 0.7 --json > '$out/data-jpeg.json'"
step data 120 "$fastseg bench data --data '$data' --device cuda --size 360x480 --minutes 1.5 --quick --json > '$out/data.json'"
step eager 60 "$fast --epochs 3 --set runtime.capture=off --run '$out/eager'"
step fp16 60 "$fast --epochs 3 --dtype fp16 --run '$out/fp16'"
step resume 90 "$fast --epochs 2 --set train.schedule=constant --run '$out/resumed' && $fastseg train --resume --run '$out/resumed' --epochs 4"
for batch in 4 16; do
    step "ladder-batch-$batch" 120 "$fastseg bench ladder --data '$data' --device cuda --size 360x480 --batch $batch --json > '$out/ladder-batch-$batch.json'"
done
step host 60 "$fastseg bench host --json > '$out/host.json'"
if [ -z "$dry" ]; then cat "$out/summary.md"; fi
