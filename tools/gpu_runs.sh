#!/usr/bin/env bash
# The full-length runs of CIFAR-10-LT on one GPU, in slices: tools/gpu_runs.sh OUT MINUTES [RUNS.tar]
#
# Trains the lines of the list below in order, SIDE at a time (3), until MINUTES are over; then it stops the runs, which save
# their state, and writes OUT/runs.tar. The next call goes on from that file. A finished run is not trained again.
# CIFAR10 is a folder with the 12,406 rows of CIFAR-10-LT IF 100, in their order, and the 10,000 test images.
# LIST=FILE trains other lines, with the settings FAST.
set -uo pipefail
out=$1 end=$((SECONDS + $2 * 60)) before=${3:-} side=${SIDE:-3}
runs=$out/runs; mkdir -p "$runs"
[ -n "$before" ] && tar xf "$before" -C "$out"
cifar="data.source=${CIFAR10:-.gpu/cifar10_lt} data.index=all"
fast="${FAST-train.precision=bf16 speed.capture=true speed.resident=true checkpoint.every=20 checkpoint.keep=1 evaluation.every=50}"

# NAME RECIPE WORDS ...; nothing is selected on test: the last epoch counts
list() {
    for seed in 0 1 2; do
        echo "if100_bs2-$seed cifar10_lt_if100_r32 +balanced_softmax seed=$seed $cifar"
        echo "if100_rescom-$seed cifar10_lt_if100_r32 ${LIVING:-method.positives=16} seed=$seed $cifar"
        echo "if100_vs_sam-$seed cifar10_lt_if100_r32 +vs_loss +sam seed=$seed $cifar"
        echo "if100_proco-$seed cifar10_lt_if100_r32 +proco train.epochs=400 schedule.milestones=[360,380] schedule.warmup_epochs=10 seed=$seed $cifar"
    done
}

train() { # NAME RECIPE WORDS ...; stopped in time it saves its state, finished it leaves a file
    local name=$1 recipe=$2; shift 2
    timeout --signal TERM $((end - SECONDS)) python3 tools/train.py "recipes/$recipe.yaml" "$@" $fast name="$name" output="$runs" \
        --resume > "$out/$name.log" 2>&1 && touch "$runs/$name.done"
}

if [ -n "${LIST:-}" ]; then cp "$LIST" "$out/list.txt"; else list > "$out/list.txt"; fi
while read -r name words; do
    [ -f "$runs/$name.done" ] && continue
    while [ "$(jobs -rp | wc -l)" -ge "$side" ] && [ $SECONDS -lt $end ]; do sleep 1; done
    [ $SECONDS -ge $end ] && break
    train "$name" $words &
done < "$out/list.txt"
wait
tar cf "$out/runs.tar" -C "$out" runs
for log in "$out"/*.log; do echo "$(basename "$log" .log): $(tr '\r' '\n' < "$log" | grep -v '^$' | tail -n 1 | cut -c1-150)"; done
