#!/bin/bash
# Tests and measures the package on a machine with one GPU and no network, in one call:
#   bash benchmarks/gpu.sh CARRIED OUT SECONDS [DEVICE]
# CARRIED may have the folder wheels with what the machine lacks (docs/gpu.md says which), and diffusers'
# train_text_to_image.py. OUT receives tests.log, measured.json, table.md and bench.log, each as far as time went.
# DEVICE is cuda; cpu rehearses all of it with networks of a few weights.
carried=$(realpath "$1") output=$2 seconds=$3 device=${4:-cuda}
root=$(cd -P "$(dirname "$0")/.." && pwd)
begun=$SECONDS
left() { echo $((seconds - SECONDS + begun)); }
mkdir -p "$output" && output=$(realpath "$output") && cd "$root" || exit 1
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
if [ -d "$carried/wheels" ]; then
    python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" \
        "$carried"/wheels/*.whl || exit 1
fi
export PYTHONPATH=$work/site:$root HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export TMPDIR=$work LATENTDIFF_CACHE=$work/cache LATENTDIFF_TEST_DEVICE=$device
more=() workers=()
[ ! -f "$carried/train_text_to_image.py" ] || more+=(--script "$carried/train_text_to_image.py")
[ "$device" = cuda ] || more+=(--device "$device" --tiny --steps 2 --repeats 1 --train-steps 5 --train-batch 2)
python3 -c 'import xdist' 2>/dev/null && [ "$(nproc)" -ge 8 ] && workers=(-n 4)
timeout --signal=INT --kill-after=10 $(($(left) * 45 / 100)) python3 -m pytest tests/gpu "${workers[@]}" -p no:cacheprovider -v \
    --durations=15 --tb=short -rs >"$output/tests.log" 2>&1
tested=$?
tail -n 25 "$output/tests.log"
echo "tests ended with status $tested; $(left) s are left"
timeout --kill-after=5 $(($(left) - 5)) python3 benchmarks/gpu.py "$output" --seconds $(($(left) - 20)) "${more[@]}" \
    >"$output/bench.log" 2>&1
measured=$?
cat "$output/table.md"
echo "measuring ended with status $measured; $(left) s are left"
[ $tested = 0 ] && [ $measured = 0 ]
