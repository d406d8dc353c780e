#!/usr/bin/env bash
# The whole study, from the repository's root: whole models, their prunings, the sweep.
# It can be stopped and started again.
set -euo pipefail

python -m experiments.sweep --spec=experiments/prune/whole.py \
  --workdir=runs/prune/whole "$@"

mkdir -p runs/prune/starts
for whole in runs/prune/whole/runs/*; do
  [[ $whole =~ seed=([0-9]+)- ]]
  seed=$((BASH_REMATCH[1] - 10))
  ln -sfn "$PWD/$whole" "runs/prune/starts/whole,seed=$seed"
  for experts in 6 4; do
    for by in load reap norm mean_norm weights loss subset random; do
      start=runs/prune/starts/by=$by,experts=$experts,seed=$seed
      [[ -d $start ]] && continue
      # 64 batches of the validation split are the 65,536 tokens of the final evaluation.
      python -m tools.surgery prune --workdir="$whole" --output="$start" --seed="$seed" \
        --experts="$experts" --by="$by" --max_batches=64
    done
  done
done

python -m experiments.sweep --spec=experiments/prune/spec.py \
  --workdir=runs/prune/sweep "$@"
