#!/usr/bin/env bash
# Training under faults at full size: a small world made here, then `ella chaos`: 10 seeds, 300 steps, 40 faults each. Everything lands in
# .chaos/ (or CHAOS_DIR). CHAOS_SEEDS, CHAOS_STEPS, CHAOS_FAULTS and CHAOS_WORKERS ask for others. CHAOS_BATCH, a multiple of 6, makes steps
# longer or shorter: there must be time for all faults.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${CHAOS_DIR:-.chaos}
bin=$(cargo metadata --format-version 1 --no-deps --offline | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')/release
ella=$bin/ella

if [ ! -e "$out/world" ]; then
    rm -rf "$out/making"
    mkdir -p "$out/making"
    "$ella" scenes --out "$out/making/scenes" --count 203 --seed 1 --size 64 --per-tar 32
    "$ella" prepare "$out/making/scenes" --out "$out/making/data" --resolution 64
    "$ella" init-base --preset nano --seed 1 --captions "$out/making/data" --out "$out/making/models"
    "$ella" embed "$out/making/data" --text "$out/making/models/text" --max-tokens 64
    mv "$out/making" "$out/world"
fi

cat >"$out/run.toml" <<TOML
[run]
output = "$out/run"
seed = 3
[base]
model = "$out/world/models/base"
[text]
model = "$out/world/models/text"
max_tokens = 64
[data]
path = "$out/world/data"
window = 2
[connector]
layers = 1
latents = 8
[train]
steps = ${CHAOS_STEPS:-300}
global_batch = ${CHAOS_BATCH:-96}
micro_batch = 6
eval_every = 0
ema_decay = 0.9
[train.optimizer]
lr = 1e-3
[checkpoint]
every = 10
[workers]
lease = "1s"
orphan_timeout = "10s"
step_timeout = "5s"
start_timeout = "60s"
join_window = "200ms"
TOML

cat >"$out/plan.toml" <<TOML
[chaos]
run = "$out/run.toml"
output = "$out/runs"
workers = ${CHAOS_WORKERS:-4}
faults = ${CHAOS_FAULTS:-40}
restart_after = ["100ms", "2s"]
lasts = ["50ms", "2s"]
stall = "30s"
TOML

"$ella" chaos "$out/plan.toml" --seeds "${CHAOS_SEEDS:-1..10}" "$@"
