#!/usr/bin/env bash
# From photos and a base model to a synthesiser behind an endpoint: Stable Diffusion 1.5, one node of GPUs or a cluster.
#
#   PHOTOS=s3://bucket/photos HELD_OUT=s3://bucket/other_people BASE=s3://bucket/models/sd15 OUT=s3://bucket/run runs/sd15.sh
#   PEOPLE=2000 runs/sd15.sh --dry-run --price 2.50     seconds, GPU-hours and money; reads nothing, starts nothing
#   SHAPE=tiny runs/sd15.sh                             the same steps in the embedded world, on two CPU cores
#
# Every step goes on where a killed run stopped, so the same command is also how to resume.
#   PICTURES=s3://bucket/third_people     photos for the stage `pictures`, of people who are in neither of the others
#   RECOGNISER=s3://bucket/buffalo_l      default: the pack buffalo_l of insightface
#   RAY_ADDRESS=auto                      a running Ray (a cluster) instead of one on this machine
#   SERVE=true                            the last step keeps the endpoint until Ctrl-C, instead of asking it once about PHOTO=face.jpg
#   CORPUS_SET, TRAIN_SET, EVALUATE_SET   more settings of that step, such as TRAIN_SET="workers.num_workers=8"
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-disabled}

if [ "${1:-}" = "--dry-run" ]; then
  exec "$python" runs/sd15_cost.py --people "${PEOPLE:-2000}" --gpus "${GPUS:-8}" "${@:2}"
fi

step() { echo; echo "== $*"; "$python" "$@"; }
read -ra corpus <<< "${CORPUS_SET:-}"
read -ra train <<< "${TRAIN_SET:-}"
read -ra evaluate <<< "${EVALUATE_SET:-}"
serve=configs/serve_sd15.yaml
out=${OUT:-runs/sd15}

case ${SHAPE:-sd15} in
  sd15)
    : "${PHOTOS:?the photos of the people to learn from: a folder, or s3://...}"
    : "${HELD_OUT:?photos of a few dozen other people, for the evaluation}"
    : "${BASE:?a diffusers folder of Stable Diffusion 1.5, or s3://...}"
    recogniser=${RECOGNISER:-buffalo_l}
    evaluate=(second_recogniser=null prompt_scorer=null worker_gpus=1 render.guidance_scale=5.0 "${evaluate[@]}")
    ;;
  tiny)
    out=${OUT:-runs/sd15-tiny}
    PHOTOS=$out/people HELD_OUT=$out/people_held_out BASE=tiny-sd recogniser=tiny
    step jobs/world/make_faces.py --people 20000:20008 --views 4 --out "$PHOTOS"
    step jobs/world/make_faces.py --people 80000:80002 --views 4 --out "$HELD_OUT"
    corpus=(people_per_group=4 class_images=2 finetune.steps=2 score.num_inference_steps=2 photos.crop=centre
      workers.finetune_gpus=0 workers.finetune_max=1 workers.finetune_cpus=0.5 workers.embed_cpus=0.2 workers.embed_max=1 "${corpus[@]}")
    tiny=(pca.num_components=4 vae.latent_size=4 'vae.hidden=[8]' denoiser.width=16 denoiser.depth=1 workers.use_gpu=false
      workers.max_workers=null workers.cpus=1)
    for stage in vae denoiser; do
      tiny+=("${stage}_training.steps=4" "${stage}_training.batch_size=4" "${stage}_training.warmup=1" "${stage}_training.validate_every=2")
    done
    train=("${tiny[@]}" "${train[@]}")
    evaluate=(second_recogniser=null prompt_scorer=null render.num_inference_steps=2 'scales=[1.0]' diversity_people=0 "${evaluate[@]}")
    serve=configs/serve_tiny.yaml PHOTO=${PHOTO-$HELD_OUT/person-080000/00.jpg}
    ;;
  *) echo "SHAPE is sd15 or tiny, not $SHAPE" >&2; exit 2 ;;
esac
[ -z "${PICTURES:-}" ] || train+=("pictures.people=$PICTURES")

fine_tune() { step jobs/build_corpus.py configs/sd15.yaml people="$1" output="$2" base="$BASE" embedder.model="$recogniser" "${corpus[@]}"; }
fine_tune "$PHOTOS" "$out/corpus"
fine_tune "$HELD_OUT" "$out/held_out"
step jobs/train.py configs/train_sd15.yaml corpus="$out/corpus" output="$out/training" "${train[@]}"
step jobs/evaluate.py corpus="$out/corpus" held_out="$out/held_out" output="$out/evaluation" \
  synthesizers.denoiser="$out/training/synthesizer" "${evaluate[@]}"
step jobs/publish.py synthesizer="$out/training/synthesizer" output="$out/published" neighbours=false

endpoint=("$serve" synthesizer="$out/published" port="${PORT:-8000}")
if [ "${SERVE:-}" = true ]; then
  step -m lora_diffusion.cli serve "${endpoint[@]}"
elif [ -n "${PHOTO:-}" ]; then
  case $out in s3://*) pictures=runs/personalised ;; *) pictures=$out/personalised ;; esac
  step -m lora_diffusion.endpoint.demo --photo "$PHOTO" --out "$pictures" "${endpoint[@]}"
fi

echo
echo "synthesiser: $out/published   report: $out/evaluation/report.html"
echo "endpoint: lora-diffusion serve ${endpoint[*]}"
