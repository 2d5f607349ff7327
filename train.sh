#!/bin/sh
# Train every category under the data folder over all devices, then evaluate them all; see train_all.py.
# Each of these can be set from the environment: dir_name=exp2 data=/disk/mvtec sh train.sh
dir_name=${dir_name:-exp}
python=${python:-$(command -v python || echo python3)}
data=${data:-./data}
config=${config:-./configs/resnet18.yaml}
# So can GPUS=0,1 (these cards; all of them otherwise), JOBS=2 (so many categories at a time), and for a trial epochs=30
# and options="-o lr=0.0005".
# shellcheck disable=SC2086  # options are several words
exec "$python" "$(dirname "$0")/train_all.py" -cfg "$config" --data "$data" --exp_dir "$dir_name" \
    ${GPUS:+--gpus "$GPUS"} ${JOBS:+--jobs "$JOBS"} ${epochs:+--epochs "$epochs"} ${options:-}
