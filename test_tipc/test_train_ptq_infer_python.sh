#!/usr/bin/env bash
# TIPC post-training quantisation chain: train, evaluate, export, quantise, infer with INT8 and compare.
#
#   bash test_tipc/test_train_ptq_infer_python.sh CONFIG MODE
#
# Lines 1 to 32 of CONFIG are those of test_train_inference_python.sh; line 27 is null, and the
# inferences here use lines 28 to 31. Then:
#   35  quantize:COMMAND            is given the data of line 11 and the folder of the exported model (line 30's key)
#   36  inference:COMMAND
#   37  runs:OPTIONS|OPTIONS...     one inference with each; the first is what the others are compared with
#   38  check:COMMAND               is given the results of the first and of another one
set -u

# shellcheck source-path=SCRIPTDIR source=common_func.sh
source "$(dirname "${BASH_SOURCE[0]}")/common_func.sh"
begin_chain ptq "quantize inference runs check" "$@"

command_words "$(line_value 35)"
add_option "$(line_key 11)" "$data_value"
add_option "$(line_key 30)" "$model_folder"
step "quantisation"
infer_and_compare "$output/ptq"
finish
