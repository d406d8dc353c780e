#!/usr/bin/env bash
# The whole study, from the repository's root: dense models, their copies, the sweep.
# It can be stopped and started again.
set -euo pipefail

python -m experiments.sweep --spec=experiments/upcycle/dense.py \
  --workdir=runs/upcycle/dense "$@"

for dense in runs/upcycle/dense/runs/*; do
  [[ $dense =~ num_steps=([0-9]+),seed=([0-9]+)- ]]
  age=${BASH_REMATCH[1]} seed=$((BASH_REMATCH[2] - 10))
  start=runs/upcycle/starts/age=$age,seed=$seed
  [[ -d $start ]] && continue
  mkdir -p runs/upcycle/starts
  python -m tools.surgery upcycle --workdir="$dense" --output="$start" --seed="$seed" \
    --config.moe.router=sigmoid_bias --config.moe.num_experts=16 \
    --config.moe.segments=4 --config.moe.renormalize=before_drop \
    --config.moe.balance_weight=0.0 --config.moe.sigmoid_bias.bias_update_rate=0.01 \
    --evaluate=false
done

python -m experiments.sweep --spec=experiments/upcycle/spec.py \
  --workdir=runs/upcycle/sweep "$@"
