# shellcheck shell=bash
# Helpers shared by prepare.sh and the test_*.sh: reading the lines of a TIPC
# config, putting commands together, running and logging them.
# To be sourced, by bash 4.4 or newer.

tipc_modes=(lite_train_lite_infer lite_train_whole_infer whole_train_whole_infer whole_infer)

# die MESSAGE: one line on stderr, and the end.
die() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit 2
}

is_mode() {
    local mode
    for mode in "${tipc_modes[@]}"; do
        [[ $1 == "$mode" ]] && return 0
    done
    return 1
}

# start CONFIG MODE: check the arguments, read the config, go to the repository's root.
# Sets config_path, config_lines (config_lines[N] is line N), mode, python and data_value.
start() {
    (( $# == 2 )) || die "usage: bash test_tipc/${0##*/} CONFIG MODE (MODE: ${tipc_modes[*]})"
    local config=$1 root
    mode=$2
    is_mode "$mode" || die "unknown mode '$mode' (known: ${tipc_modes[*]})"
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
    # A relative CONFIG is meant from where the user stands, or from the root.
    [[ -f $config ]] || config=$root/$config
    [[ -f $config && -r $config ]] || die "no such config: $1"
    mapfile -O 1 -t config_lines <"$config"
    config_path=$(cd "$(dirname "$config")" && pwd)/${config##*/}
    cd "$root" || exit 2

    local number
    for number in "${!config_lines[@]}"; do
        config_lines[number]=$(trim "${config_lines[number]}")
    done
    (( ${#config_lines[@]} >= 32 )) ||
        die "$1 has ${#config_lines[@]} lines, 32 are expected (see test_tipc/README.md)"
    expect_lines "$1" 2 model_name 3 python 4 gpu_list 10 train_model_name 13 trainer
    python=$(python_program)
    is_null "$python" && die "line 3 of the config names no python"
    data_value=$(data_folder)
}

# expect_lines CONFIG NUMBER KEY...: these lines must have these keys. A line too many or too few
# shifts everything below it: better said than run.
expect_lines() {
    local config=$1
    shift
    while (( $# )); do
        [[ $(line_key "$1") == "$2" ]] ||
            die "$config, line $1 should be '$2:...' but is '${config_lines[$1]-}'"
        shift 2
    done
}

# forget_logs: remove what an earlier run of this config and mode has left, so that nothing of it is taken for this one.
forget_logs() {
    rm -f "test_tipc/output/$(line_value 2)/$mode"/*.log "test_tipc/output/$(line_value 2)/$mode"/*.jsonl
}

# open_log NAME: sets output (the folder of the logs) and results_log (NAME in it, emptied), and
# starts counting.
open_log() {
    output=test_tipc/output/$(line_value 2)/$mode
    mkdir -p "$output" 2>/dev/null || die "cannot write to $output"
    results_log=$output/$1
    : >"$results_log" || die "cannot write $results_log"
    run_count=0
    failures=()
    not_tested=()
    environment=(env)
    trap 'echo "interrupted" >&2; exit 130' INT TERM
}

# trim TEXT: without blanks (and the carriage return of a Windows file) at its ends.
trim() {
    local text=$1
    text=${text#"${text%%[![:space:]]*}"}
    text=${text%"${text##*[![:space:]]}"}
    printf '%s' "$text"
}

# line_key N, line_value N: what stands before and after the first colon of line N.
line_key() {
    local line=${config_lines[$1]-}
    trim "${line%%:*}"
}

line_value() {
    local line=${config_lines[$1]-}
    [[ $line == *:* ]] && trim "${line#*:}"
    return 0
}

is_null() {
    [[ -z $1 || $1 == null ]]
}

# mode_value N: line N's value in this mode. "MODE=a|MODE2=b" gives the part of this mode, or
# null when this mode is not among them; any other value is valid in every mode.
mode_value() {
    local value part named=no
    local -a parts
    value=$(line_value "$1")
    IFS='|' read -r -a parts <<<"$value"
    for part in "${parts[@]}"; do
        part=$(trim "$part")
        if [[ $part == "$mode="* ]]; then
            printf '%s' "${part#*=}"
            return
        fi
        if [[ $part == *=* ]] && is_mode "${part%%=*}"; then named=yes; fi
    done
    if [[ $named == yes ]]; then printf 'null'; else printf '%s' "$value"; fi
}

# split_list TEXT: sets list to the parts of "a|b|c"; an empty text is one empty part.
split_list() {
    local part
    local -a parts
    IFS='|' read -r -a parts <<<"$1"
    list=()
    for part in "${parts[@]}"; do list+=("$(trim "$part")"); done
    (( ${#list[@]} )) || list=("")
}

# split_words TEXT: sets words to its words. Quotes and backslashes hold a word together as in a
# shell; nothing is expanded or executed (xargs knows the quotes, unlike read).
split_words() {
    local text=$1
    words=()
    [[ -n $text ]] || return 0
    xargs printf '%s\0' <<<"$text" >/dev/null 2>&1 || die "cannot split into words: $text"
    mapfile -d '' -t words < <(xargs printf '%s\0' <<<"$text")
}

# data_folder: line 11's value. In the whole_* modes the environment variable `data` replaces it.
data_folder() {
    if [[ $mode == whole_* && -n ${data:-} ]]; then
        printf '%s' "$data"
    else
        mode_value 11
    fi
}

# python_program: the environment variable `python`, or line 3's value; where that program is not to be found (a config
# of another machine may say python3.7), the python that is.
python_program() {
    local program=${python:-$(line_value 3)}
    if [[ -z ${python:-} ]] && ! is_null "$program" && ! "$program" --version >/dev/null 2>&1; then
        local other
        other=$(command -v python || command -v python3) || other=$program
        printf '%s: line 3 names %s, which is not here; using %s\n' "${0##*/}" "$program" "$other" >&2
        program=$other
    fi
    printf '%s' "$program"
}

# path_value N: line N's value; the part of it that is line 11's folder follows the variable data.
path_value() {
    local path configured
    path=$(mode_value "$1")
    configured=$(mode_value 11)
    configured=${configured%/}
    if [[ $path == "$configured" || $path == "$configured"/* ]] && ! is_null "$configured"; then
        path=${data_value%/}${path#"$configured"}
    fi
    printf '%s' "$path"
}

# command_words TEXT: start the array cmd with python and the words of a config's command.
command_words() {
    local -a words
    split_words "$1"
    cmd=("$python" "${words[@]}")
}

# add_option KEY VALUE: append KEY=VALUE to the array cmd, nothing if either is null. A key of
# several words ("-o Global.epochs") keeps its first words apart.
add_option() {
    if is_null "$1" || is_null "$2"; then return; fi
    local -a words
    split_words "$1"
    cmd+=("${words[@]:0:${#words[@]}-1}" "${words[-1]}=$2")
}

# replace_option KEY VALUE: if the array cmd already gives KEY (as "KEY x" or "KEY=x"), give it
# VALUE instead; otherwise leave cmd alone.
replace_option() {
    if is_null "$1" || is_null "$2"; then return; fi
    local i
    for (( i = 0; i < ${#cmd[@]}; i++ )); do
        if [[ ${cmd[i]} == "$1="* ]]; then
            cmd[i]=$1=$2
        elif [[ ${cmd[i]} == "$1" ]]; then
            cmd[i + 1]=$2
        fi
    done
}

# shown WORD...: the command as one would type it.
shown() {
    local word text=
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./=:,@%+-]+$ ]] || word=${word@Q}
        text+=" $word"
    done
    printf '%s' "${text# }"
}

# run_command LOG: run the array cmd in the environment that the array environment ("env NAME=x")
# sets, its output going to the terminal and to the end of LOG, and write its status line to
# results_log. Counts in run_count and failures; gives back whether the command succeeded. Sets
# output_start, the line of LOG at which its output begins.
run_command() {
    local log=$1
    output_start=3
    [[ -f $log ]] && output_start=$(($(wc -l <"$log") + 3))
    printf '\n$ %s\n' "$(shown "${environment[@]}" "${cmd[@]}")" | tee -a "$log"
    "${environment[@]}" "${cmd[@]}" </dev/null 2>&1 | tee -a "$log"
    report "${PIPESTATUS[0]}" "$log" "$output_start"
}

# report STATUS LOG LINE: the status line of the array cmd, whose output begins at this line of LOG.
report() {
    local text
    text=$(shown "${cmd[@]}")
    run_count=$((run_count + 1))
    if (( $1 == 0 )); then
        echo "Run successfully with command - $text!" | tee -a "$results_log"
        return 0
    fi
    echo "Run failed with command - $text!" | tee -a "$results_log"
    # The command's own last lines; a progress bar's carriage returns count as line ends.
    failures+=("exit code $1: $text
$(tail -n "+$3" "$2" | tr '\r' '\n' | tail -n 15 | sed 's/^/    /')
    (all of it: $2)")
    return 1
}

# skip_command REASON: the array cmd is not attempted because of an earlier failure, and counts as
# failed.
skip_command() {
    local text
    text=$(shown "${cmd[@]}")
    run_count=$((run_count + 1))
    echo "Run skipped ($1) with command - $text!" | tee -a "$results_log"
    failures+=("skipped ($1): $text")
}

# finish: the summary, and the exit code of the whole.
finish() {
    (( run_count > 0 )) || die "the config asks for no command in mode $mode"
    if (( ${#failures[@]} )); then
        printf '\n%d of %d commands did not succeed:\n' "${#failures[@]}" "$run_count"
        printf -- '- %s\n' "${failures[@]}"
        echo "status lines: $results_log"
        exit 1
    fi
    printf '\nall %d commands succeeded; status lines: %s\n' "$run_count" "$results_log"
    if (( ${#not_tested[@]} )); then
        printf 'but not all was tested:\n'
        printf -- '- %s\n' "${not_tested[@]}"
        exit 3
    fi
    exit 0
}

# ---- chains that go on where the first 32 lines of their config end

# begin_chain NAME KEYS CONFIG MODE: what the first 32 lines of CONFIG say is done first; it makes one
# model, in model_folder. What this chain does with it stands in the lines from 35 on, which must have
# these keys. Its logs are called NAME.
begin_chain() {
    local name=$1 number=35 key
    local -a keys
    read -r -a keys <<<"$2"
    shift 2
    start "$@"
    for key in "${keys[@]}"; do
        expect_lines "$1" "$number" "$key"
        number=$((number + 1))
    done
    [[ $(line_value 4)$(line_value 13)$(line_value 24) != *'|'* ]] ||
        die "$1: lines 4, 13 and 24 must name one thing each, since this chain goes on with one model"
    model_folder=$(mode_value 20)
    is_null "$model_folder" && die "$1: line 20 names no folder for the exported model"
    model_folder=${model_folder%/}
    open_log "results_$name.log"
    rm -f "$output/${name}"[._]*
    log=$output/$name.log
    step_failed=
    bash test_tipc/test_train_inference_python.sh "$config_path" "$mode" || exit
}

# step WHAT: run the array cmd, unless a step before has failed.
step() {
    if [[ -n $step_failed ]]; then
        skip_command "$step_failed"
    elif ! run_command "$log"; then
        step_failed="$1 failed"
    fi
}

# inference_words TEXT: start the array cmd with an inference of the chain's model, with the options of
# lines 28 to 31.
inference_words() {
    command_words "$1"
    add_option "$(line_key 28)" "$(mode_value 28)"
    add_option "$(line_key 29)" "$(mode_value 29)"
    add_option "$(line_key 30)" "$model_folder"
    add_option "$(line_key 31)" "$(path_value 31)"
}

# infer_and_compare RESULTS: line 36's inference once for each of line 37's sets of options; then line
# 38's check that the first gives what each other one gives. RESULTS is where they go: RESULTS_1.jsonl
# and so on. One set of options only: no check.
infer_and_compare() {
    local i
    local -a list runs
    split_list "$(line_value 37)"; runs=("${list[@]}")
    for i in "${!runs[@]}"; do
        inference_words "$(line_value 36) ${runs[i]}"
        cmd+=("--save_json=$1_$((i + 1)).jsonl")
        step "inference"
    done
    for (( i = 2; i <= ${#runs[@]}; i++ )); do
        command_words "$(line_value 38)"
        cmd+=("$1_1.jsonl" "$1_$i.jsonl")
        step "comparison"
    done
}
