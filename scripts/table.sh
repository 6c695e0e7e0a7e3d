# Shared by e2e_table.sh and author_table.sh, which source it: their common options, runs that go on where they stopped,
# and a row of results for each. A script sets its defaults, defines own_option, prepare and make_run, and calls
# parse_options "$@" and make_table.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
FROM="$PWD"             # where the user is; paths of options are relative to it
MODELS=() EPSILONS=() METHODS=() SEEDS=() EXTRA=()
NPROC="" BATCH="" NAME="" RUNS="" RESULTS=results DRY="" CHILD=""
if [ -z "${PYTHON:-}" ]; then
    if [ -x "$ROOT/.venv/bin/python" ]; then PYTHON="$ROOT/.venv/bin/python"; else PYTHON=python3; fi
fi
export PYTHON OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# from_root PATH: prints the user's PATH as seen from the repository's root, into which the scripts change.
from_root() {
    (cd "$FROM" && realpath -m --relative-base="$ROOT" -- "$1")
}

# parse_options ARGUMENTS...: sets the variables above; other options go to own_option NAME VALUE.
parse_options() {
    local word
    while [ $# -gt 0 ]; do
        case "$1" in
            --) EXTRA=("${@:2}"); break ;;
            -h | --help) sed -n '2,/^set -/{/^set -/d; s/^# \{0,1\}//; p}' "$0"; exit 0 ;;
            --dry-run) DRY=1; shift; continue ;;
            --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
            --*) [ $# -ge 2 ] || die "$1: wants a value after it" ;;
            *) MODELS+=("$1"); shift; continue ;;
        esac
        case "$1" in
            --epsilon) read -ra EPSILONS <<< "${2//,/ }" ;;
            --method) read -ra METHODS <<< "${2//,/ }" ;;
            --seeds) read -ra SEEDS <<< "${2//,/ }" ;;
            --nproc) NPROC="$2" ;;
            --batch) BATCH="$2" ;;
            --name) NAME="$2" ;;
            --runs) RUNS="$(from_root "$2")" ;;
            --results) RESULTS="$(from_root "$2")" ;;
            *) own_option "$1" "$2" || die "$1: unknown flag; see --help" ;;
        esac
        shift 2
    done
    for word in "${EPSILONS[@]}"; do
        [[ "$word" =~ ^(inf|published|[0-9]+(\.[0-9]+)?)$ ]] ||
            die "--epsilon $word: expected a number, inf or published"
    done
    for word in "${METHODS[@]}"; do
        [[ "$word" =~ ^(lora|full)$ ]] || die "--method $word: expected lora or full"
    done
    for word in "${SEEDS[@]}"; do
        [[ "$word" =~ ^[0-9]+$ ]] || die "--seeds $word: expected whole numbers"
    done
    [[ "$BATCH" =~ ^[1-9][0-9]*$ ]] || die "--batch $BATCH: expected a whole number above 0"
    [[ "$NAME" =~ ^[A-Za-z0-9.-]+$ ]] || die "--name $NAME: expected letters, digits, dots and hyphens"
    cd "$ROOT"
    RUNS="${RUNS:-trained_models/table_$NAME}"
    count_processes
}

# count_processes: sets NPROC to the GPUs, or the cores where there is none, as far as they divide the logical batch.
count_processes() {
    if [ -n "$NPROC" ]; then
        [[ "$NPROC" =~ ^[1-9][0-9]*$ ]] || die "--nproc $NPROC: expected a whole number above 0"
        [ $((BATCH % NPROC)) -eq 0 ] || die "--nproc $NPROC: does not divide the logical batch of $BATCH, which would" \
            "change, and the noise with it; choose a divisor, or another --batch"
        return
    fi
    NPROC=0
    if [ -n "${CUDA_VISIBLE_DEVICES-all}" ] && command -v nvidia-smi > /dev/null; then
        NPROC="$(nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true)"
        [ -z "${CUDA_VISIBLE_DEVICES:-}" ] || NPROC="$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c .)"
    fi
    [ "$NPROC" -gt 0 ] || NPROC="$(env -u OMP_NUM_THREADS nproc)"  # which would print the threads of a process
    while [ $((BATCH % NPROC)) -ne 0 ]; do NPROC=$((NPROC - 1)); done
}

# split_batch LARGEST: sets PER_DEVICE (at most LARGEST) and ACCUMULATION; times NPROC they are the logical batch.
split_batch() {
    local share=$((BATCH / NPROC))
    PER_DEVICE="$1"
    while [ $((share % PER_DEVICE)) -ne 0 ]; do PER_DEVICE=$((PER_DEVICE - 1)); done
    ACCUMULATION=$((share / PER_DEVICE))
}

# refuse_extra INSTEAD FLAGS...: the flags may not stand behind --.
refuse_extra() {
    local flag word
    for flag in "${@:2}"; do
        for word in "${EXTRA[@]}"; do
            [ "${word%%=*}" != "$flag" ] || die "$flag after --: $1"
        done
    done
}

# launch SCRIPT: sets LAUNCH, the words that start SCRIPT on NPROC processes; the variable LAUNCHER names other words.
launch() {
    LAUNCH=(python)
    [ "$NPROC" -eq 1 ] || LAUNCH=(python -m torch.distributed.run --standalone "--nproc_per_node=$NPROC")
    [ -z "${LAUNCHER:-}" ] || read -ra LAUNCH <<< "$LAUNCHER"
    LAUNCH+=("$1")
}

# quoted WORDS...: prints them as a line that a shell can read.
quoted() {
    local line
    printf -v line '%q ' "$@"
    printf '%s\n' "${line% }"
}

# start COMMAND...: say it and, unless this is a dry run, do it. A signal is handed on: a run then writes its
# checkpoint.
start() {
    local status=0
    quoted "$@"
    [ -z "$DRY" ] || return 0
    [ "$1" != python ] || set -- "$PYTHON" "${@:2}"
    "$@" &
    CHILD=$!
    wait "$CHILD" || status=$?
    CHILD=""
    return "$status"
}

# stop SIGNAL STATUS: end what runs, and this script.
stop() {
    trap '' INT TERM
    if [ -n "$CHILD" ]; then
        kill -TERM "$CHILD" 2> /dev/null || true
        wait "$CHILD" || true
    fi
    echo "$1: stopped; the same command goes on from here" >&2
    exit "$2"
}
trap 'stop SIGINT 130' INT
trap 'stop SIGTERM 143' TERM

# train COMMAND...: train in $RUN, from its last checkpoint where an earlier call was stopped.
train() {
    if [ -z "$DRY" ] && grep -qs '"train_runtime"' "$RUN/privacy.json"; then
        return
    fi
    if [ -z "$DRY" ] && [ -s "$RUN/privacy_ledger.jsonl" ]; then set -- "$@" --resume; fi
    start "$@"
}

# keep FILE LINES...: what FILE's folder is made of; refused where an earlier call made it of something else.
keep() {
    if [ -f "$1" ] && ! printf '%s\n' "${@:2}" | cmp -s - "$1"; then
        printf '%s\n' "${@:2}" | diff "$1" - >&2 || true
        die "$(dirname "$1"): was begun with other data or commands, see above; choose another --name"
    fi
    mkdir -p "$(dirname "$1")"
    printf '%s\n' "${@:2}" > "$1"
}

# begin COMMANDS...: whether there is anything to do for $RUN, which the lines COMMANDS make.
begin() {
    [ -z "$DRY" ] || return 0
    mkdir -p "$TABLE/rows"
    keep "$RUN/commands.txt" "$@"
    [ ! -f "$TABLE/rows/${RUN##*/}.json" ] || {
        echo "$TABLE/rows/${RUN##*/}.json: already there (another --name would run it anew)"; return 1; }
}

# make_table TASK: every run that is not there yet, then the table and the plot of all.
make_table() {
    local model method epsilon seed found runs=() row path
    found="$(compgen -G "$RESULTS/????-??-??_$NAME" | sort | tail -n 1 || true)"
    TABLE="${found:-$RESULTS/$(date +%F)_$NAME}"
    [ -n "$DRY" ] || "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' ||
        die "PYTHON=$PYTHON: has no torch; pip install -r requirements.txt, or name another Python by this variable"
    prepare
    for model in "${MODELS[@]}"; do
        for epsilon in "${EPSILONS[@]}"; do
            for method in "${METHODS[@]}"; do
                [ "$epsilon" != 0 ] || method=none
                for seed in "${SEEDS[@]}"; do
                    RUN="$RUNS/$(basename "$model")-$method-epsilon_$epsilon-seed_$seed"
                    [ -n "$DRY" ] || printf '\n== %s\n' "${RUN##*/}"
                    make_run "$model" "$method" "$epsilon" "$seed"
                    row=(--run "$RUN" --out "$TABLE/rows/${RUN##*/}.json" --task "$1" --model "$(basename "$model")"
                         --method "$method" --epsilon "$epsilon" --seed "$seed" --processes "$NPROC")
                    if [ -n "$DRY" ] || [ ! -f "$TABLE/rows/${RUN##*/}.json" ]; then
                        start python scripts/table_row.py "${row[@]}"
                    fi
                    runs+=("$RUN")
                    [ "$epsilon" != 0 ] || break 2  # nothing is trained, so nothing else varies
                done
            done
        done
    done
    if [ -z "$DRY" ]; then
        grep -qsxF -- "$COMMAND" "$TABLE/command.txt" || printf '%s\n' "$COMMAND" >> "$TABLE/command.txt"
        runs=()  # of the whole table, those of earlier calls too
        for path in "$TABLE"/rows/*.json; do
            path="$RUNS/$(basename "$path" .json)"
            [ ! -f "$path/metrics.jsonl" ] || runs+=("$path")
        done
        echo
    fi
    [ ${#runs[@]} -eq 0 ] || start python scripts/plot_run.py "${runs[@]}" --out "$TABLE/plot.png"
    start python scripts/results_tables.py "$TABLE"
}
COMMAND="$(quoted bash "scripts/$(basename "$0")" "$@")"
