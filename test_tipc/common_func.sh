# shellcheck shell=bash
# Helpers shared by prepare.sh and test_train_inference_python.sh: reading the
# lines of a TIPC config, putting commands together, running and logging them.
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
# Sets config_lines (config_lines[N] is line N) and mode.
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
    cd "$root" || exit 2

    local number
    for number in "${!config_lines[@]}"; do
        config_lines[number]=$(trim "${config_lines[number]}")
    done
    (( ${#config_lines[@]} >= 32 )) ||
        die "$1 has ${#config_lines[@]} lines, 32 are expected (see test_tipc/README.md)"
    # A line too many or too few shifts everything below it: better said than run.
    local -A names=([2]=model_name [3]=python [4]=gpu_list [10]=train_model_name [13]=trainer)
    for number in 2 3 4 10 13; do
        [[ $(line_key "$number") == "${names[$number]}" ]] ||
            die "$1, line $number should be '${names[$number]}:...' but is '${config_lines[number]}'"
    done
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
    trim "${config_lines[$1]%%:*}"
}

line_value() {
    local line=${config_lines[$1]}
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

# python_program: line 3's value, or the environment variable `python`.
python_program() {
    printf '%s' "${python:-$(line_value 3)}"
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
# results_log. Counts in run_count and failures; gives back whether the command succeeded.
# shellcheck disable=SC2154  # environment and results_log are the driver's
run_command() {
    local log=$1 text status before=0
    text=$(shown "${cmd[@]}")
    [[ -f $log ]] && before=$(wc -l <"$log")
    printf '\n$ %s\n' "$(shown "${environment[@]}" "${cmd[@]}")" | tee -a "$log"
    "${environment[@]}" "${cmd[@]}" </dev/null 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    run_count=$((run_count + 1))
    if (( status == 0 )); then
        echo "Run successfully with command - $text!" | tee -a "$results_log"
        return 0
    fi
    echo "Run failed with command - $text!" | tee -a "$results_log"
    # The command's own last lines; a progress bar's carriage returns count as line ends.
    failures+=("exit code $status: $text
$(tail -n "+$((before + 3))" "$log" | tr '\r' '\n' | tail -n 15 | sed 's/^/    /')
    (all of it: $log)")
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
