#!/usr/bin/env bash
# What only a GPU can show, in one go: the tests marked gpu, then the records of `fastseg bench`.
#
#   bench/device.sh [--dry-run] [FOLDER]     results in FOLDER, by default build/device
#
# Needs CUDA's torch and triton of this machine's python3. Whatever else fastseg imports is installed from build/wheels
# where that folder is (`make wheels` fills it), so that the machine needs no package index.
set -euo pipefail
cd "$(dirname "$0")/.."
run=eval
if [ "${1:-}" = --dry-run ]; then
    run=echo
    shift
fi
out=${1:-build/device}
venv=build/device-venv
source=
if [ -d build/wheels ]; then source="--no-index --find-links build/wheels"; fi

$run "mkdir -p '$out'"
$run "python3 -m venv --system-site-packages $venv"
$run "$venv/bin/pip install --quiet $source -c constraints.txt -r bench/device.txt"
$run "$venv/bin/pip install --quiet --no-deps --no-build-isolation -e ."
# A failing test must not cost the measurements: its report comes back with them.
$run "$venv/bin/python -m pytest -m gpu tests/kernels > '$out/tests.txt' 2>&1 || echo 'gpu tests FAILED, see $out/tests.txt'"
$run "tail -3 '$out/tests.txt'"
for batch in 4 16 32; do
    $run "$venv/bin/fastseg bench kernels --device cuda --batch $batch --json > '$out/kernels-batch-$batch.json'"
    $run "$venv/bin/fastseg bench model --device cuda --batch $batch --json > '$out/model-batch-$batch.json'"
    $run "$venv/bin/fastseg bench ladder --device cuda --batch $batch --json > '$out/ladder-batch-$batch.json'"
done
