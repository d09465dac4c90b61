#!/usr/bin/env bash
# Everything behind the results, from nothing: people, two corpora, synthesisers, ablations, evaluation.
#
#   runs/reproduce.sh small       40 people: shows that it works; the figures mean little
#   runs/reproduce.sh medium   2,000 people, 48 held out, 3 seeds: the table of the paper's claims
#   runs/reproduce.sh large    5,000 people, 64 held out
#
# Every step goes on where a killed run stopped, so the same command is also how to resume. Output: runs/<size>/.
#   OUT=s3://bucket/prefix        somewhere else (photos, corpora, checkpoints, results)
#   OTHER_RECIPE="finetune.train_A=true finetune.learning_rate=1e-2"
#                                 also builds the corpus by this recipe, for the factor `corpus` of the ablations
#   RAY_ADDRESS=auto              a running Ray instead of one on this machine
set -euo pipefail
cd "$(dirname "$0")/.."

size=${1:-small}
case $size in
  small) people=40 held_out=8 sizes='[20]' seeds=1 ;;
  medium) people=2000 held_out=48 sizes='[500, 1000]' seeds=3 ;;
  large) people=5000 held_out=64 sizes='[250, 500, 1000, 2000]' seeds=3 ;;
  *) echo "usage: runs/reproduce.sh small|medium|large" >&2; exit 2 ;;
esac
out=${OUT:-runs/$size}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-disabled}

step() { echo; echo "== $*"; "$python" "$@"; }

step jobs/world/make_faces.py --people 20000:$((20000 + people)) --views 10 --out "$out/people"
step jobs/world/make_faces.py --people 80000:$((80000 + held_out)) --views 10 --out "$out/people_held_out"

corpus() { step jobs/build_corpus.py people="$1" output="$2" "${@:3}"; }
corpus "$out/people" "$out/corpus"
corpus "$out/people_held_out" "$out/held_out"
others=()
if [ -n "${OTHER_RECIPE:-}" ]; then
  # shellcheck disable=SC2086
  corpus "$out/people" "$out/corpus_other" $OTHER_RECIPE
  others=("corpora.other_recipe=$out/corpus_other")
fi

# quicker where there is little to learn from
quick=()
[ "$size" = small ] && quick=(vae_training.steps=100 denoiser_training.steps=300)
for space in latent pca vector; do
  step jobs/train.py corpus="$out/corpus" output="$out/training_$space" code_space="$space" "${quick[@]}"
done

step jobs/ablate.py evaluation.corpus="$out/corpus" evaluation.held_out="$out/held_out" \
  evaluation.output="$out/ablations" evaluation.limit="$held_out" people="$sizes" \
  seeds="$seeds" other_seeds="$seeds" "${quick[@]/#/training.}" "${others[@]}"

step jobs/evaluate.py corpus="$out/corpus" held_out="$out/held_out" output="$out/evaluation" limit="$held_out" \
  synthesizers.denoiser="$out/training_pca/synthesizer" synthesizers.latent="$out/training_latent/synthesizer" \
  synthesizers.vector="$out/training_vector/synthesizer" \
  ablations="$out/ablations"

echo
echo "report: $out/evaluation/report.html"
