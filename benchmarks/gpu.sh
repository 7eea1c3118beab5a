#!/usr/bin/env bash
# Everything worth knowing from one GPU in one call of less than ten minutes: does it compute what the CPU computes, how
# fast is a step (ViT-S, B, L; every means of the fast mode alone; peers), does a real run train. Results are JSON files (few, so that they are easy to bring home) in OUT.
#
#   benchmarks/gpu.sh
#
#   OUT               results                                   (runs/gpu)
#   RUN               run folder of the pre-training            (runs/gpu-pretrain; started over)
#   DATA              folder with train-*.tar.gz, val-*.tar.gz  (the first of shared/data/nature, ../shared/data/nature)
#   PRETRAIN_EPOCHS   length of the pre-training                (60)
#   PRETRAIN_SECONDS  and its limit; stopped there, it is saved (100)
#   PYTHON            interpreter                               (python3)
#   STAGES            which stages                    ("agreement small base large means peers pretrain")
#   DEVICE_SMALL=1    everything tiny, to try the script on a CPU
#
# A stage that fails does not stop the next. Exit code 0: every stage succeeded; 1: one failed, see OUT/summary.json.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

OUT=${OUT:-runs/gpu}
RUN=${RUN:-runs/gpu-pretrain}
PYTHON=${PYTHON:-python3}
SMALL=${DEVICE_SMALL:-0}
STAGES=${STAGES:-agreement small base large means peers pretrain}
mkdir -p "$OUT" || exit 1
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT

# --- Dependencies and the package's version ------------------------------------------------------------------------

if compgen -G "wheels/*.whl" >/dev/null; then
    timeout 60 "$PYTHON" -m pip install -q --no-index --no-deps wheels/*.whl || echo "gpu.sh: installing wheels/ failed" >&2
fi

knows_version() { "$PYTHON" -c 'from importlib.metadata import version; version("hpm")' 2>/dev/null; }

if ! knows_version; then
    timeout 60 "$PYTHON" -m pip install -q --no-deps --no-build-isolation -e . >"$SCRATCH/pip.log" 2>&1
    if ! knows_version; then
        # hpm asks the installed metadata for its version. Without an installation, say what pyproject.toml says.
        echo "gpu.sh: could not install hpm, running from src/ with the version in pyproject.toml" >&2
        version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
        mkdir -p "$SCRATCH/hpm-$version.dist-info"
        printf 'Metadata-Version: 2.1\nName: hpm\nVersion: %s\n' "$version" >"$SCRATCH/hpm-$version.dist-info/METADATA"
        export PYTHONPATH="$PYTHONPATH:$SCRATCH"
    fi
fi

# --- Stages --------------------------------------------------------------------------------------------------------

failed=0
summary=()

# stage NAME SECONDS COMMAND...: run the command for at most SECONDS and note how it ended.
stage() {
    local name=$1 limit=$2 began=$SECONDS code
    shift 2
    case " $STAGES " in *" $name "*) ;; *) return 1 ;; esac
    echo "=== $name (at most $limit s)" >&2
    # --foreground: the signal is for hpm, which saves and stops, not for its data workers.
    timeout --foreground --preserve-status --signal=TERM --kill-after=30 "$limit" "$@"
    code=$?
    if [ "$name" = pretrain ] && [ "$code" = 3 ]; then
        echo "gpu.sh: pretrain was stopped by its time limit, after saving: the metrics up to there count" >&2
    elif [ "$code" != 0 ]; then
        failed=1
        echo "gpu.sh: $name FAILED with code $code" >&2
    fi
    summary+=("{\"stage\": \"$name\", \"exit_code\": $code, \"seconds\": $((SECONDS - began))}")
    return "$code"
}

step=(--image-size 224 --seconds 3 --rounds 4)
small_model=vit_small_patch16_224
base_model=vit_base_patch16_224
large_model=vit_large_patch16_224
batch=256
large_batch=128
means=(exact exact+third exact+cross exact+shallow exact+half-teacher exact+4-masks exact+4-steps exact+progressive)
pretrain=(--epochs "${PRETRAIN_EPOCHS:-60}")
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
    large_batch=4
    pretrain=(--epochs 1 --batch-size 16 --encoder-depth 1 --knn-images 40 --num-figure-images 2)
    train=shapes:160
    val=shapes:40@1
elif [ -z "$data" ]; then
    echo "gpu.sh: no nature set in shared/data or ../shared/data: name its folder in DATA, or pretrain will fail" >&2
fi

bench=("$PYTHON" -m hpm benchmark)
stage agreement 60 "$PYTHON" benchmarks/cuda_agreement.py --out "$OUT/agreement.json"
stage small 80 "${bench[@]}" step --encoder "$small_model" --batch-size "$batch" "${step[@]}" --out "$OUT/step_small.json"
stage base 110 "${bench[@]}" step --encoder "$base_model" --batch-size "$batch" "${step[@]}" --profile --out "$OUT/step_base.json"
stage large 80 "${bench[@]}" step --encoder "$large_model" --batch-size "$large_batch" "${step[@]}" --variants exact mae fast \
    --out "$OUT/step_large.json"
stage means 90 "${bench[@]}" step --encoder "$base_model" --batch-size "$batch" "${step[@]}" --variants mae "${means[@]}" \
    --out "$OUT/step_means.json"
if "$PYTHON" -c "import transformers" 2>/dev/null || "$PYTHON" -c "import lightly" 2>/dev/null; then
    stage peers 50 "${bench[@]}" peers --encoder "$base_model" --batch-size "$batch" "${step[@]}" --out "$OUT/peers.json"
else
    echo "gpu.sh: no peer (transformers, lightly) is installed: not measured" >&2
fi
if stage pretrain "${PRETRAIN_SECONDS:-100}" "$PYTHON" -m hpm pretrain --recipe hpm-both-norm-pix-64px --data "$train" --val "$val" \
    --out "$RUN" --resume restart "${pretrain[@]}" --json >"$SCRATCH/pretrain.txt"; then
    tail -n 1 "$SCRATCH/pretrain.txt" >"$OUT/pretrain.json"
fi
cat "$SCRATCH/pretrain.txt"
for file in metrics.jsonl config.yaml; do
    case " $STAGES " in *" pretrain "*) [ -f "$RUN/$file" ] && cp "$RUN/$file" "$OUT/pretrain_$file" ;; esac
done

# --- Summary -------------------------------------------------------------------------------------------------------

(
    IFS=,
    echo "{\"small\": $([ "$SMALL" = 1 ] && echo true || echo false), \"failed\": $failed, \"stages\": [${summary[*]-}]}"
) | tee "$OUT/summary.json"
exit "$failed"
