#!/usr/bin/env bash
# TIPC Paddle2ONNX chain: train, evaluate, export to ONNX, check the ONNX model, infer with it and compare.
#
#   bash test_tipc/test_paddle2onnx_infer_python.sh CONFIG MODE
#
# Lines 1 to 32 of CONFIG are those of test_train_inference_python.sh; line 27 is null, and the
# inferences here use lines 28 to 31. Then:
#   35  onnx_checker:COMMAND        is given the ONNX model
#   36  inference:COMMAND
#   37  runs:OPTIONS|OPTIONS...     one inference with each; the first is what the others are compared with
#   38  check:COMMAND               is given the results of the first and of another one
set -u

# shellcheck source-path=SCRIPTDIR source=common_func.sh
source "$(dirname "${BASH_SOURCE[0]}")/common_func.sh"
begin_chain paddle2onnx "onnx_checker inference runs check" "$@"

command_words "$(line_value 35)"
cmd+=("$model_folder/inference.onnx")
step "ONNX checker"
infer_and_compare "$output/paddle2onnx"
finish
