#!/usr/bin/env bash
# TIPC post-training quantisation chain: train, evaluate, export, and ask for an inference in INT8.
#
#   bash test_tipc/test_train_ptq_infer_python.sh CONFIG MODE
#
# Lines 1 to 32 of CONFIG are those of test_train_inference_python.sh; line 27 is null, and the
# inference here uses lines 28 to 31. Then:
#   35  inference:COMMAND   in INT8
#   36  refusal:TEXT        with which the command says that there is no INT8: the chain ends with 3 then
set -u

# shellcheck source-path=SCRIPTDIR source=common_func.sh
source "$(dirname "${BASH_SOURCE[0]}")/common_func.sh"
begin_chain ptq "inference refusal" "$@"

inference_words "$(line_value 35)"
printf '\n$ %s\n' "$(shown "${cmd[@]}")" | tee "$log"
"${cmd[@]}" </dev/null 2>&1 | tee -a "$log"
status=${PIPESTATUS[0]}
if (( status )) && reason=$(grep -m1 -F -- "$(line_value 36)" "$log"); then
    run_count=1
    not_tested+=("$reason")
    echo "Not tested ($reason) with command - $(shown "${cmd[@]}")!" | tee -a "$results_log"
else
    report "$status" "$log" 3
fi
finish
