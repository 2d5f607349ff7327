#!/usr/bin/env bash
# Before the TIPC driver: is the data of this mode there, and for whole_infer the trained model?
#
#   bash test_tipc/prepare.sh CONFIG MODE
#
# Nothing is downloaded. lite_* use the lite data of this repository (made again if it is missing);
# whole_* use MVTec AD in the folder that line 11 of CONFIG names, or in the one that the
# environment variable data names.
set -u

# shellcheck source-path=SCRIPTDIR source=common_func.sh
source "$(dirname "${BASH_SOURCE[0]}")/common_func.sh"
start "$@"
forget_logs

# is_category FOLDER: train/good with a picture in it, and a test folder.
is_category() {
    [[ -d $1/test && -d $1/train/good && -n $(find "$1/train/good/" -type f -print -quit) ]]
}

# option_in N NAME...: the value that the command of line N gives to the option of these names.
option_in() {
    local -a words
    local i name
    split_words "$(line_value "$1")"
    shift
    for (( i = 0; i < ${#words[@]}; i++ )); do
        for name in "$@"; do
            case ${words[i]} in
                "$name") printf '%s' "${words[i + 1]-}" && return ;;
                "$name="*) printf '%s' "${words[i]#*=}" && return ;;
            esac
        done
    done
}

data_dir=${data_value%/}
is_null "$data_dir" && die "line 11 of $1 names no data folder for the mode $mode"
category=$(option_in 14 -cat --category)

if [[ ${data_dir#./} == lite_data ]] && ! is_category "$data_dir/$category"; then
    echo "$data_dir/$category is not there: making the lite data again"
    "$python" -m datasets.lite_data || die "python -m datasets.lite_data failed"
fi

categories=()
for folder in "$data_dir"/*/; do
    folder=${folder%/}
    is_category "$folder" && categories+=("${folder##*/}")
done
where="put MVTec AD there as $data_dir/bottle/{train,test,ground_truth}, or name its folder: data=/path/to/mvtec bash test_tipc/..."
(( ${#categories[@]} )) || die "no category with train/good and test in $data_dir; $where"
is_category "$data_dir/$category" ||
    die "the config trains '$category', which is not in $data_dir (there: ${categories[*]}); $where"

if [[ $mode == whole_infer ]]; then
    split_list "$(line_value 24)"
    for experiment in "${list[@]}"; do
        checkpoint=results/${experiment%/}/$(option_in 25 -cat --category)/best.pdparams
        [[ -f $checkpoint ]] ||
            die "whole_infer needs a trained model: $checkpoint is missing; train it, or name another experiment on line 24 of $1"
        echo "trained model: $checkpoint"
    done
fi
echo "data for $mode: $data_dir (${categories[*]})"
