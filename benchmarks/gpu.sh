#!/usr/bin/env bash
# Everything worth knowing from one GPU in one call of less than ten minutes: does it compute what the CPU computes, how
# fast is a step (ViT-B, L, S; peers; every means of the fast mode alone), does a real run train. The most wanted comes
# first: a stage gets what is left of TOTAL_SECONDS, and is cut or left out where that is too little.
# Calls for what takes longer: STAGES="evidence", "autotune" (matrix products by the fastest of many kernels),
# "plain-reductions" (without the compiler's kernels that reduce rows and columns at once), "plan".
# Results are summary.json and results.tar.gz in OUT (JSON, CSV, figures; written anew after every stage, so that a call
# that is cut short brings home what it had).
#
#   benchmarks/gpu.sh
#
#   OUT               results                                   (runs/gpu)
#   RUN               run folder of the pre-training            (runs/gpu-pretrain; started over)
#   DATA              folder with train-*.tar.gz, val-*.tar.gz  (the first of shared/data/nature, ../shared/data/nature)
#   PRETRAIN_EPOCHS   length of the pre-training                (20)
#   PRETRAIN_SECONDS  and its limit; stopped there, it is saved (110)
#   EVIDENCE_EPOCHS   length of a run of the evidence           (20)
#   EVIDENCE_SECONDS  and the limit of all of them              (400; seeds are the outer loop, so a cut loses seeds)
#   TOTAL_SECONDS     limit of the whole call                   (570)
#   PYTHON            interpreter                               (python3)
#   STAGES            which stages, always in this order        ("agreement base pretrain large peers small means")
#   DEVICE_SMALL=1    everything tiny, to try the script on a CPU
#
# A stage that fails does not stop the next. Exit code 0: every stage succeeded; 1: one failed, see OUT/summary.json.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

OUT=${OUT:-runs/gpu}
RUN=${RUN:-runs/gpu-pretrain}
PYTHON=${PYTHON:-python3}
SMALL=${DEVICE_SMALL:-0}
STAGES=${STAGES:-agreement base pretrain large peers small means}
TOTAL_SECONDS=${TOTAL_SECONDS:-570}
GRACE=45  # to stop well: a step of a benchmark that compiles may take so long
mkdir -p "$OUT" || exit 1
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
FOUND=$SCRATCH/results
mkdir -p "$FOUND"

# --- Dependencies and the package's version ------------------------------------------------------------------------

if compgen -G "wheels/*.whl" >/dev/null; then
    # Beside what is installed, which may belong to somebody else; before it, should a version differ.
    timeout 60 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SCRATCH/site" wheels/*.whl ||
        echo "gpu.sh: installing wheels/ failed" >&2
    export PYTHONPATH="$PYTHONPATH:$SCRATCH/site"
fi

knows_version() { "$PYTHON" -c 'from importlib.metadata import version; version("hardpatch")' 2>/dev/null; }

if ! knows_version; then
    timeout 60 "$PYTHON" -m pip install -q --no-deps --no-build-isolation -e . >"$SCRATCH/pip.log" 2>&1
    if ! knows_version; then
        # hardpatch asks the installed metadata for its version. Without an installation, say what pyproject.toml says.
        echo "gpu.sh: could not install hardpatch, running from src/ with the version in pyproject.toml" >&2
        version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
        mkdir -p "$SCRATCH/hardpatch-$version.dist-info"
        printf 'Metadata-Version: 2.1\nName: hardpatch\nVersion: %s\n' "$version" >"$SCRATCH/hardpatch-$version.dist-info/METADATA"
        export PYTHONPATH="$PYTHONPATH:$SCRATCH"
    fi
fi

# Better now than in every stage.
"$PYTHON" -c "import hardpatch.cli, hardpatch.training.pretrain, hardpatch.tools.benchmark.step, hardpatch.tools.ablate.ablate" || exit 1

# --- Stages --------------------------------------------------------------------------------------------------------

failed=0
pretrained=0
summary=()

# stage NAME SECONDS COMMAND...: run the command for at most SECONDS, and what is left of all, and note how it ended.
stage() {
    local name=$1 limit=$2 began=$SECONDS left=$((TOTAL_SECONDS - SECONDS - GRACE)) code
    shift 2
    case " $STAGES " in *" $name "*) ;; *) return 1 ;; esac
    if [ "$left" -lt 20 ]; then
        failed=1
        echo "gpu.sh: $name LEFT OUT, no time is left for it" >&2
        summary+=("{\"stage\": \"$name\", \"exit_code\": null, \"seconds\": 0}")
        return 1
    fi
    if [ "$limit" -gt "$left" ]; then limit=$left; fi
    echo "=== $name (at most $limit s)" >&2
    if [ "$name" = pretrain ]; then
        pretrained=1
        rm -f "$RUN/metrics.jsonl" "$RUN/config.yaml"  # of an earlier call
    fi
    # --foreground: the signal is for hardpatch, which saves and stops, not for its data workers.
    timeout --foreground --preserve-status --signal=TERM --kill-after="$GRACE" "$limit" "$@"
    code=$?
    if [ "$code" = 3 ]; then
        echo "gpu.sh: $name was stopped by its time limit, after saving: what it has up to there counts" >&2
    elif [ "$code" != 0 ]; then
        failed=1
        echo "gpu.sh: $name FAILED with code $code" >&2
    fi
    summary+=("{\"stage\": \"$name\", \"exit_code\": $code, \"seconds\": $((SECONDS - began))}")
    bring_home
    return "$code"
}

# bring_home: what was found so far, in OUT.
bring_home() {
    local file
    for file in metrics.jsonl config.yaml; do
        [ "$pretrained" = 1 ] && [ -f "$RUN/$file" ] && cp "$RUN/$file" "$FOUND/pretrain_$file"
    done
    for file in "$SCRATCH"/evidence/*.{md,csv,png,json}; do
        [ -f "$file" ] && cp "$file" "$FOUND/evidence_${file##*/}"
    done
    (
        IFS=,
        echo "{\"small\": $([ "$SMALL" = 1 ] && echo true || echo false), \"failed\": $failed, \"stages\": [${summary[*]-}]}"
    ) >"$OUT/summary.json"
    tar -czf "$SCRATCH/results.tar.gz" -C "$SCRATCH" results && mv "$SCRATCH/results.tar.gz" "$OUT/results.tar.gz"
}

step=(--image-size 224 --seconds 3 --rounds 4)
small_model=vit_small_patch16_224
base_model=vit_base_patch16_224
large_model=vit_large_patch16_224
batch=256
means=(exact exact+third exact+cross exact+shallow exact+half-teacher exact+4-masks)
pretrain=(--epochs "${PRETRAIN_EPOCHS:-20}" --batch-size 512 --base-learning-rate 1e-3 --checkpoint-steps 440)
evidence=(--scale 64px --epochs "${EVIDENCE_EPOCHS:-20}" --batch-size 512 --base-learning-rate 5e-4 --seeds 0 1)
budget=1h
data=${DATA:-}
for folder in shared/data/nature ../shared/data/nature; do
    if [ -z "$data" ] && [ -d "$folder" ]; then data=$folder; fi
done
train="$data/train-*.tar.gz"
val="$data/val-*.tar.gz"
if [ "$SMALL" = 1 ]; then
    step=(--image-size 64 --decoder-width 64 --decoder-depth 1 --seconds 0.2 --rounds 2)
    small_model=vit_tiny_patch16_224
    base_model=vit_tiny_patch16_224
    large_model=vit_tiny_patch16_224
    batch=4
    pretrain=(--epochs 1 --batch-size 16 --encoder-depth 1 --knn-images 40 --num-figure-images 2)
    train=shapes:160
    val=shapes:40@1
    evidence=(--scale micro --epochs 1 --batch-size 16 --encoder-depth 1 --seeds 0)
    budget=1m
elif [ -z "$data" ]; then
    echo "gpu.sh: no nature set in shared/data or ../shared/data: name its folder in DATA, or pretrain will fail" >&2
fi

bench=("$PYTHON" -m hardpatch benchmark)
stage agreement 150 "$PYTHON" benchmarks/cuda_agreement.py --out "$FOUND/agreement.json"
stage base 200 "${bench[@]}" step --encoder "$base_model" --batch-size "$batch" "${step[@]}" --variants reference mae exact fast \
    --out "$FOUND/step_base.json"
if stage pretrain "${PRETRAIN_SECONDS:-110}" "$PYTHON" -m hardpatch pretrain --recipe hpm-both-norm-pix-64px --data "$train" --val "$val" \
    --out "$RUN" --resume restart "${pretrain[@]}" --json >"$SCRATCH/pretrain.txt"; then
    tail -n 1 "$SCRATCH/pretrain.txt" >"$FOUND/pretrain.json"
fi
cat "$SCRATCH/pretrain.txt"
stage large 130 "${bench[@]}" step --encoder "$large_model" --batch-size "$batch" "${step[@]}" --variants exact mae fast \
    --out "$FOUND/step_large.json"
if "$PYTHON" -c "import transformers" 2>/dev/null || "$PYTHON" -c "import lightly" 2>/dev/null; then
    stage peers 60 "$PYTHON" benchmarks/peers.py --encoder "$base_model" --batch-size "$batch" "${step[@]}" --out "$FOUND/peers.json"
else
    echo "gpu.sh: no peer (transformers, lightly) is installed: not measured" >&2
fi
stage small 100 "${bench[@]}" step --encoder "$small_model" --batch-size "$batch" "${step[@]}" --out "$FOUND/step_small.json"
stage means 120 "${bench[@]}" step --encoder "$base_model" --batch-size "$batch" "${step[@]}" --variants mae "${means[@]}" \
    --out "$FOUND/step_means.json"

stage evidence "${EVIDENCE_SECONDS:-400}" "$PYTHON" -m hardpatch ablate --suite speed --rows mae-norm-pix random+lpred-fast-norm-pix hpm-fast-in-pixels \
    --data "$train" --val "$val" --equal-time --no-equal-compute "${evidence[@]}" --out "$SCRATCH/evidence"

# Do the compiler's newest reductions help or hurt? (They are on by default since torch 2.10.)
TORCHINDUCTOR_MIX_ORDER_REDUCTION=0 stage plain-reductions 150 "${bench[@]}" step --encoder "$base_model" --batch-size "$batch" "${step[@]}" \
    --variants exact --out "$FOUND/step_plain_reductions.json"
# Matrix products by the fastest of many kernels: does the exact step come nearer to the peak?
TORCHINDUCTOR_MAX_AUTOTUNE_GEMM=1 stage autotune 300 "${bench[@]}" step --encoder "$base_model" --batch-size "$batch" "${step[@]}" \
    --compile on --variants exact --out "$FOUND/step_base_autotune.json"
if stage plan 300 "$PYTHON" -m hardpatch plan --data "$train" --budget "$budget" --json >"$SCRATCH/plan.txt"; then
    tail -n 1 "$SCRATCH/plan.txt" >"$FOUND/plan.json"
fi
cat "$SCRATCH/plan.txt"

# --- Summary -------------------------------------------------------------------------------------------------------

bring_home
cat "$OUT/summary.json"
exit "$failed"
