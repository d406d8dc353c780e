#!/usr/bin/env bash
# The whole study, from the repository's root. It can be stopped and started again.
set -euo pipefail
runs=runs/apart
sparse=(--config.moe.router=top_k --config.moe.num_selected=2
  --config.moe.renormalize=before_drop)

python -m experiments.sweep --spec=experiments/apart/seeds.py --workdir=$runs/seeds "$@"
mkdir -p $runs/starts
for path in $runs/seeds/runs/*; do
  [[ $path =~ seed=([0-9]+)- ]]
  ln -sfn "$PWD/$path" "$runs/starts/seed=$((BASH_REMATCH[1] - 10))"
done

python -m experiments.sweep --spec=experiments/apart/branches.py \
  --workdir=$runs/branches "$@"
# Branches on the text that all others are evaluated on.
for path in $runs/branches/runs/learning_rate=0.016,*; do
  compgen -G "$path/eval_*_first_*.json" > /dev/null && continue
  python -m experiments.evaluate --workdir="$path" --max_batches=256 \
    --config.data.domains=fonttools,matplotlib,pygments,tensorflow-datasets
done
for path in $runs/starts/seed=*; do
  seed=${path##*=}
  # 256 batches of the validation split are the tokens of the final evaluation.
  for start in joined means; do
    [[ -d $runs/starts/$start=$seed ]] && continue
    # A comma would end a directory of --runs; --workdir is one of those that match.
    branches=$runs/branches/runs/learning_rate=0.016?domains=*?seed=$seed-*
    first=("$runs"/branches/runs/learning_rate=0.016,domains=fonttools,seed="$seed"-*)
    router=$([[ $start == means ]] && echo means || echo random)
    python -m tools.surgery btx --workdir="${first[0]}" --runs="$branches" \
      --output="$runs/starts/$start=$seed" --router="$router" \
      --seed="$seed" --max_batches=256 "${sparse[@]}"
  done
  if [[ ! -d $runs/starts/upcycled=$seed ]]; then
    python -m tools.surgery upcycle --workdir="$path" \
      --output="$runs/starts/upcycled=$seed" --seed="$seed" --evaluate=false \
      --config.moe.num_experts=4 "${sparse[@]}"
  fi
done

python -m experiments.sweep --spec=experiments/apart/spec.py --workdir=$runs/sweep "$@"
