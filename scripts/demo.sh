#!/usr/bin/env bash
# The main job, end to end: scenes → prepare → embed → train, killed half-way and resumed → audit → sample → export → report.
# Everything lands in demo/ (or DEMO_DIR); every number in demo/report.html comes from this run.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${DEMO_DIR:-demo}
marker=$out/.ella-demo
# All that is in it is deleted, so it must be ours.
if [ "$out" != demo ] && [ -n "$(ls -A "$out" 2>/dev/null)" ] && [ ! -e "$marker" ]; then
    echo "DEMO_DIR=$out: not empty, and made by no earlier demo, so nothing in it is touched: name a new folder, or empty this one" >&2
    exit 2
fi
bin=$(cargo metadata --format-version 1 --no-deps --offline | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')/release
ella=$bin/ella
steps=${DEMO_STEPS:-400}
began=$(date +%s)

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
field() { python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }

# The marker first, and never deleted: the folder is known again at whatever stage this ends.
mkdir -p "$out"
touch "$marker"
find "$out/" -mindepth 1 -maxdepth 1 ! -name "${marker##*/}" -exec rm -rf {} +

say "1. Scenes: pictures with dense captions whose truth is known"
"$ella" scenes --out "$out/scenes" --count 768 --seed 7 --size 64 --per-tar 256

say "2. Prepare: filter, resize, shard"
"$ella" prepare "$out/scenes" --out "$out/data" --resolution 64 --min-edge 64

say "3. A small random base and text encoder to train on"
"$ella" init-base --preset nano --seed 7 --captions "$out/data" --out "$out/models"

say "4. Embed: the text encoder's features of every caption"
"$ella" embed "$out/data" --text "$out/models/text" --max-tokens 128

cat >"$out/run.toml" <<EOF
[run]
output = "$out/run"
seed = 7

[base]
model = "$out/models/base"

[text]
model = "$out/models/text"
max_tokens = 128

[data]
path = "$out/data"

[connector]
layers = 2
latents = 16

[train]
steps = $steps
global_batch = 16
micro_batch = 4
eval_every = 5
eval_samples = 32
ema_decay = 0.99

[train.optimizer]
lr = 1e-3

[train.schedule]
warmup = 20

[checkpoint]
every = 50

[sample]
every = 100
prompts = [
    "A large red circle on the left of a small blue square, on a plain grey background.",
    "Three green triangles in a row above a yellow star on a white background.",
]
seed = 1
steps = 20
guidance = 3.0

[workers]
count = 2
EOF

say "5. Train with two workers, and kill everything (SIGKILL) half-way"
setsid "$ella" train "$out/run.toml" &
group=$!
deadline=$(($(date +%s) + 240))
until step=$("$ella" status "$out/run" --json 2>/dev/null | field last_commit_step 2>/dev/null) && [ "${step:-0}" -ge $((steps / 2)) ]; do
    kill -0 $group 2>/dev/null || { echo "the run ended before it could be killed" >&2; exit 1; }
    [ "$(date +%s)" -lt $deadline ] || { echo "no commit at half of the steps within 240 s" >&2; exit 1; }
    sleep 0.1
done
kill -KILL -- -$group
wait $group 2>/dev/null || true
echo "killed after the commit of step $step"

say "6. The same command resumes from the last commit"
"$ella" train "$out/run.toml"

say "7. Audit: every sample exactly once, every byte as committed"
"$ella" audit "$out/run" --json >"$out/audit.json" || { cat "$out/audit.json"; exit 1; }
"$ella" audit "$out/run"

say "8. Sample and export"
"$ella" export "$out/run" --out "$out/connector.safetensors"
"$ella" sample --connector "$out/connector.safetensors" --base "$out/models/base" --text "$out/models/text" --compare --size 64 --steps 20 --guidance 3 --seed 1 \
    --prompt "A large red circle on the left of a small blue square, on a plain grey background." \
    --prompt "Three green triangles in a row above a yellow star on a white background." \
    --prompt "A striped purple ring in the centre of the picture, on an orange background." \
    --prompt "A small white cross at the top right and a big brown hexagon at the bottom left." \
    --out "$out/samples.png"

say "9. Report"
"$ella" report "$out/run" --audit "$out/audit.json" --samples "$out/samples.png" --out "$out/report.html"
echo "done in $(($(date +%s) - began)) s: open $out/report.html"
