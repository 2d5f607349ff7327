#!/usr/bin/env bash
# One TIPC chain from its data to its exit code.
#
#   bash test_tipc/run.sh CHAIN [MODE]
#
# CHAIN is the name of a config in configs/fastflow without .txt, MODE lite_train_lite_infer if left
# out. 0: all was run and is right; 1: something failed; 2: wrong arguments, config or data; 3: all was
# run, but what the chain is about is not possible on this machine.
set -u

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 2
chain=${1-} mode=${2-lite_train_lite_infer}
config=$here/configs/fastflow/$chain.txt
if [[ -z $chain || ! -f $config ]] || (( $# > 2 )); then
    known=("$here"/configs/fastflow/*.txt)
    known=("${known[@]##*/}")
    echo "run.sh: usage: bash test_tipc/run.sh CHAIN [MODE] (CHAIN: ${known[*]%.txt})" >&2
    exit 2
fi
script=$here/test_$chain.sh
[[ -f $script ]] || script=$here/test_train_inference_python.sh
bash "$here/prepare.sh" "$config" "$mode" || exit
exec bash "$script" "$config" "$mode"
