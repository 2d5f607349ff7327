#!/usr/bin/env bash
# TIPC: train, evaluate, export and infer as the first 32 lines of CONFIG say.
#
#   bash test_tipc/test_train_inference_python.sh CONFIG MODE
#
# MODE: lite_train_lite_infer, lite_train_whole_infer, whole_train_whole_infer or whole_infer.
#
# The lines of CONFIG ("key:value"; a key or value of null is left out; "MODE=a|MODE2=b" gives each
# mode its own value, and nothing to the modes that are not named):
#    1  ===train_params===                          heading
#    2  model_name:NAME                             names the folder of the logs
#    3  python:PROGRAM                              the environment variable python overrides it (relative: to the root)
#    4  gpu_list:ENTRY|ENTRY...                     0; 0,1 (several cards); ip1,ip2;0,1 (several machines); -1 (CPU);
#                                                   -1,-1 (two processes on the CPU)
#    5  use-GPU key                                 CPU: KEY=False; otherwise KEY=VALUE (one value per entry, by "|")
#    6  epochs key:value                            train
#    7  save folder key:value                       train; also replaces the same option in lines 17, 22 and 25
#    8  batch size key:value                        train
#    9  pretrained key:value                        train; for the evaluation KEY=SAVE_FOLDER/train_model_name
#   10  train_model_name:NAME                       the file that a training leaves in its save folder
#   11  data key:value                              train; also replaces the same option in lines 17, 22 and 25
#   12  ##
#   13  trainer:NAME|NAME...
#   14  NAME:COMMAND                                the trainer's command (a second trainer's is on line 15)
#   15  ##
#   16  ===eval_params===                           heading
#   17  eval:COMMAND                                after a training, and of line 24's model in whole_infer
#   18  ##
#   19  ===infer_params===                          heading
#   20  inference model folder key:value            export
#   21  pretrained key                              export: KEY=SAVE_FOLDER/train_model_name
#   22  norm_export:COMMAND
#   23  ##
#   24  infer_model:TRAINED|TRAINED...              whole_infer only: what was trained before, in place of SAVE_FOLDER/...
#   25  infer_export:COMMAND|COMMAND...             whole_infer only: null if line 24 is an inference model already
#   26  ##
#   27  inference:COMMAND
#   28  use-GPU key:True|False                      one inference per value of lines 28, 29 and 32
#   29  batch size key:1|4
#   30  model folder key:value                      KEY=what was exported; value only if nothing was
#   31  image key:value
#   32  benchmark key:True|False
# and where a config is about more than that this can be done:
#   35  tested:TEXT|TEXT...                         one of these is in the output of a training that did it; if none
#                                                   is, nothing has failed, but the exit code is 3
#   36  reason:TEXT                                 the line of that output with this text says why
set -u

# shellcheck source-path=SCRIPTDIR source=common_func.sh
source "$(dirname "${BASH_SOURCE[0]}")/common_func.sh"
start "$@"

train_model_name=$(line_value 10)
data_key=$(line_key 11)
save_key=$(line_key 7)
open_log results_python.log
# A run's logs tell of that run only.
rm -f "$output"/python_*.log

# trained_path FOLDER: what a pretrained key is given.
trained_path() {
    if is_null "$1" || is_null "$train_model_name"; then
        printf '%s' "$1"
    else
        printf '%s/%s' "${1%/}" "$train_model_name"
    fi
}

# read_gpu_entry ENTRY: sets launcher (words between python and the trainer), train_environment (the
# training's) and environment (that of the steps after it, which are one process on one card), label.
read_gpu_entry() {
    local gpus=${1#*;}
    launcher=()
    if is_null "$1" || [[ $1 =~ ^-1(,-1)*$ ]]; then
        device=cpu label=cpu
        environment=(env CUDA_VISIBLE_DEVICES=)
        train_environment=("${environment[@]}")
        if [[ $1 == *,* ]]; then
            split_list "${1//,/|}"
            label=cpu_${#list[@]}
            launcher=(-m paddle.distributed.launch "--nproc_per_node=${#list[@]}" --backend=gloo)
        fi
        return
    fi
    device=gpu label=gpus_${gpus//,/_}
    environment=(env "CUDA_VISIBLE_DEVICES=${gpus%%,*}")
    if [[ $1 == *';'* ]]; then
        launcher=(-m paddle.distributed.launch "--ips=${1%%;*}" "--gpus=$gpus")
    elif [[ $1 == *,* ]]; then
        launcher=(-m paddle.distributed.launch "--gpus=$gpus")
    fi
    # The launcher itself deals out the cards.
    train_environment=(env)
    if (( ${#launcher[@]} == 0 )); then train_environment=("${environment[@]}"); fi
}

# use_gpu_value INDEX: what line 5's key is given for the gpu_list entry of this index.
use_gpu_value() {
    if [[ $device == cpu ]]; then
        printf 'False'
        return
    fi
    split_list "$(mode_value 5)"
    # Fewer values than entries: the last one goes on.
    local i=$1
    (( i < ${#list[@]} )) || i=$(( ${#list[@]} - 1 ))
    printf '%s' "${list[i]}"
}

# evaluate FOLDER MODEL USE_GPU [SKIP_REASON]
evaluate() {
    is_null "$(line_value 17)" && return
    command_words "$(line_value 17)"
    replace_option "$save_key" "$1"
    replace_option "$data_key" "$data_value"
    add_option "$(line_key 9)" "$2"
    add_option "$(line_key 5)" "$3"
    if [[ -n ${4-} ]]; then
        skip_command "$4"
    else
        run_command "$output/python_eval.log"
    fi
}

# infer MODEL_FOLDER [SKIP_REASON]: every inference that lines 28, 29 and 32 ask for.
infer() {
    local use_gpu batch batch_name benchmark where
    local -a list gpu_values batch_values benchmark_values
    is_null "$(line_value 27)" && return
    split_list "$(mode_value 28)"; gpu_values=("${list[@]}")
    split_list "$(mode_value 29)"; batch_values=("${list[@]}")
    split_list "$(mode_value 32)"; benchmark_values=("${list[@]}")
    for use_gpu in "${gpu_values[@]}"; do
        # The log is named after what was asked for: True, gpu, 1 or False, cpu, 0.
        case ${use_gpu,,} in
            true | gpu* | 1) where=gpu ;;
            "" | null) where=$device ;;
            *) where=cpu ;;
        esac
        for batch in "${batch_values[@]}"; do
            batch_name=$batch
            is_null "$batch" && batch_name=1
            for benchmark in "${benchmark_values[@]}"; do
                command_words "$(line_value 27)"
                add_option "$(line_key 28)" "$use_gpu"
                add_option "$(line_key 29)" "$batch"
                add_option "$(line_key 30)" "$1"
                add_option "$(line_key 31)" "$(path_value 31)"
                add_option "$(line_key 32)" "$benchmark"
                if [[ -n ${2-} ]]; then
                    skip_command "$2"
                else
                    run_command "$output/python_infer_${where}_batchsize_$batch_name.log"
                fi
            done
        done
    done
}

# export_and_infer COMMAND FOLDER MODEL INFERENCE_FOLDER [SKIP_REASON]: without a COMMAND, what
# lies in INFERENCE_FOLDER is inferred as it is.
export_and_infer() {
    local reason=${5-}
    if ! is_null "$1"; then
        command_words "$1"
        replace_option "$save_key" "$2"
        replace_option "$data_key" "$data_value"
        add_option "$(line_key 21)" "$3"
        add_option "$(line_key 20)" "$4"
        if [[ -n $reason ]]; then
            skip_command "$reason"
        elif ! run_command "$output/python_export.log"; then
            reason="export failed"
        fi
    fi
    infer "$4" "$reason"
}

# check_tested LOG: the array cmd, a training whose output begins at line output_start of LOG, has
# succeeded; has it done what this config is about?
check_tested() {
    local text reason
    local -a list
    [[ $(line_key 35) == tested ]] || return
    split_list "$(line_value 35)"
    for text in "${list[@]}"; do
        tail -n "+$output_start" "$1" | grep -q -F -- "$text" && return
    done
    reason=$(tail -n "+$output_start" "$1" | grep -m 1 -F -- "$(line_value 36)")
    reason=${reason:-"its output says nothing of '$(line_value 36)'"}
    not_tested+=("$reason")
    echo "Not tested ($reason) with command - $(shown "${cmd[@]}")!" | tee -a "$results_log"
}

# train_chain TRAINER ENTRY_INDEX SUFFIX: training, evaluation, export, inferences. SUFFIX keeps
# the results of several trainings apart.
train_chain() {
    local command="" number reason="" folder inference_folder gpu_value
    for number in 14 15; do
        [[ $(line_key "$number") == "$1" ]] && command=$(line_value "$number")
    done
    is_null "$command" && return
    folder=$(mode_value 7)
    is_null "$folder" || folder=${folder%/}$3
    inference_folder=$(mode_value 20)
    is_null "$inference_folder" || inference_folder=${inference_folder%/}$3
    gpu_value=$(use_gpu_value "$2")

    command_words "$command"
    cmd=("$python" "${launcher[@]}" "${cmd[@]:1}")
    add_option "$(line_key 5)" "$gpu_value"
    add_option "$(line_key 6)" "$(mode_value 6)"
    add_option "$save_key" "$folder"
    add_option "$(line_key 8)" "$(mode_value 8)"
    add_option "$(line_key 9)" "$(mode_value 9)"
    add_option "$data_key" "$data_value"
    local -a single_environment=("${environment[@]}")
    environment=("${train_environment[@]}")
    if run_command "$output/python_train.log"; then
        check_tested "$output/python_train.log"
    else
        reason="training failed"
    fi
    environment=("${single_environment[@]}")

    evaluate "$folder" "$(trained_path "$folder")" "$gpu_value" "$reason"
    is_null "$(line_value 22)" && inference_folder=$(mode_value 30)
    export_and_infer "$(line_value 22)" "$folder" "$(trained_path "$folder")" "$inference_folder" "$reason"
}

split_list "$(line_value 4)"
gpu_entries=("${list[@]}")

if [[ $mode == whole_infer ]]; then
    # Nothing is trained: what line 24 names is evaluated, exported by line 25's command and
    # inferred, on the first entry.
    read_gpu_entry "${gpu_entries[0]}"
    split_list "$(line_value 24)"; models=("${list[@]}")
    split_list "$(line_value 25)"; exports=("${list[@]}")
    for i in "${!models[@]}"; do
        is_null "${models[i]}" && die "line 24 of the config names no trained model"
        # Fewer export commands than models: the last one goes on.
        export_command=${exports[i]-${exports[-1]}}
        if is_null "$export_command"; then
            inference_folder=${models[i]}
        else
            inference_folder=$(mode_value 20)
            inference_folder=${inference_folder%/}
            (( ${#models[@]} > 1 )) && inference_folder+=_run$((i + 1))
            evaluate "${models[i]}" "${models[i]}" "$(use_gpu_value 0)"
        fi
        export_and_infer "$export_command" "${models[i]}" "${models[i]}" "$inference_folder"
    done
else
    split_list "$(line_value 13)"
    trainers=("${list[@]}")
    for trainer in "${trainers[@]}"; do
        [[ $trainer == "$(line_key 14)" || $trainer == "$(line_key 15)" ]] ||
            die "line 13 of the config names the trainer '$trainer', lines 14 and 15 do not"
    done
    run_number=0
    for i in "${!gpu_entries[@]}"; do
        read_gpu_entry "${gpu_entries[i]}"
        for trainer in "${trainers[@]}"; do
            run_number=$((run_number + 1))
            suffix=
            if (( ${#gpu_entries[@]} * ${#trainers[@]} > 1 )); then
                suffix=_run${run_number}_$label
            fi
            train_chain "$trainer" "$i" "$suffix"
        done
    done
fi

finish
