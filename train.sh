#!/bin/sh
# Train every category under the data folder, then evaluate them all.
# Each of these can be set from the environment: dir_name=exp2 data=/disk/mvtec sh train.sh
dir_name=${dir_name:-exp}
python=${python:-python}
data=${data:-./data}
config=${config:-./configs/resnet18.yaml}

# The published fifteen, then the folders of your own.
categories="toothbrush screw hazelnut transistor tile pill bottle cable capsule carpet grid leather metal_nut wood zipper"
own=
for folder in "$data"/*/; do
    name=$(basename "$folder")
    case " $categories " in
        *" $name "*) ;;
        *) { [ -d "$folder/test" ] || [ -d "$folder/train/good" ]; } && own="$own
$name" ;;
    esac
done

trap 'exit 130' INT
status=0
trained=0
train() {
    if [ ! -d "$data/$1" ]; then
        echo "train.sh: $1 skipped: no folder $data/$1" >&2
        return
    fi
    trained=1
    if ! "$python" train.py -cfg "$config" --data "$data" --exp_dir "$dir_name" -cat "$1"; then
        echo "train.sh: $1 failed; going on with the next" >&2
        status=1
    fi
}

for name in $categories; do train "$name"; done
while IFS= read -r name; do
    if [ -n "$name" ]; then train "$name"; fi
done <<EOF
$own
EOF

if [ "$trained" = 0 ]; then
    echo "train.sh: no category under $data; set data= to the folder of MVTec AD" >&2
    exit 1
fi
"$python" eval.py -cfg "$config" --data "$data" -cat all --exp_dir "$dir_name" || status=1
exit $status
