#!/usr/bin/env bash
# TIPC serving chain: train, evaluate, export, infer, serve, ask the service about the same pictures, stop it.
#
#   bash test_tipc/test_serving_infer_python.sh CONFIG MODE
#
# Lines 1 to 32 of CONFIG are those of test_train_inference_python.sh; line 27 is null, and the
# inference here uses lines 28 to 31. Then:
#   35  serving:COMMAND             prints "serving ... at http://ADDRESS" once it listens
#   36  inference:COMMAND
#   37  runs:OPTIONS                of the inference whose results the service must give too
#   38  check:COMMAND               is given the results of the inference, those of the service and lines 39 and 40
#   39  normal picture key:value    a picture that must be found normal
#   40  anomaly picture key:value   a picture that must be found anomalous
#   41  client:COMMAND              is given the service's address, the results of the inference, and where to write
#   42  model folder key            of the service
set -u

# shellcheck source-path=SCRIPTDIR source=common_func.sh
source "$(dirname "${BASH_SOURCE[0]}")/common_func.sh"
begin_chain serving "serving inference runs check" "$@"

infer_and_compare "$output/serving"

# The service runs beside the client; a failure of its own shows when it ends.
command_words "$(line_value 35)"
add_option "$(line_key 42)" "$model_folder"
serving=("${cmd[@]}")
serving_log=$output/serving_service.log
address=
if [[ -z $step_failed ]]; then
    printf '\n$ %s &\n' "$(shown "${serving[@]}")" | tee -a "$log"
    # Whatever goes wrong here, the service ends: after 10 minutes, or 60 seconds after it was asked to.
    # --foreground: else timeout signals its whole process group as well, and the service gets SIGTERM twice, the
    # second time perhaps when it has stopped listening to it (exit code 143).
    timeout --foreground --kill-after=60 600 "${serving[@]}" </dev/null >"$serving_log" 2>&1 &
    service=$!
    trap 'kill "$service" 2>/dev/null' EXIT
    while [[ -z $address ]] && kill -0 "$service" 2>/dev/null; do
        sleep 0.2
        address=$(sed -n 's|^serving .* at \(http://[^ ]*\)$|\1|p' "$serving_log") # warnings may name addresses too
    done
    [[ -n $address ]] || step_failed="the service did not start"
fi

command_words "$(line_value 41)"
cmd+=("$address" "$output/serving_1.jsonl" "$output/serving_answers.jsonl")
step "client"
command_words "$(line_value 38)"
cmd+=("$output/serving_1.jsonl" "$output/serving_answers.jsonl")
add_option "$(line_key 39)" "$(path_value 39)"
add_option "$(line_key 40)" "$(path_value 40)"
step "check"

cmd=("${serving[@]}")
if [[ -n ${service-} ]]; then
    kill -TERM "$service" 2>/dev/null
    wait "$service"
    report $? "$serving_log" 1
    trap - EXIT
else
    skip_command "$step_failed"
fi
finish
