#!/usr/bin/env bash
# The main job, end to end, on the miniature: scenes → prepare → embed → train, killed half-way and resumed → audit → draw and score, the base beside
# the connector → report.
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
steps=${DEMO_STEPS:-420}
prompts=${DEMO_PROMPTS:-24}
began=$(date +%s)

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
field() { python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }

# The marker first, and never deleted: the folder is known again at whatever stage this ends.
mkdir -p "$out"
touch "$marker"
find "$out/" -mindepth 1 -maxdepth 1 ! -name "${marker##*/}" -exec rm -rf {} +

say "1. Scenes: pictures with dense captions whose truth is known, and prompts of others to draw"
"$ella" scenes --out "$out/scenes" --world mini --count 6144 --seed 7 --per-tar 1024 --short-every 6
"$ella" scenes --out "$out/suite" --world mini --objects 3-4 --count "$prompts" --seed 99 --prompts

say "2. Prepare: filter, resize, shard, and the VAE's latents"
"$ella" prepare "$out/scenes" --out "$out/data" --resolution 64 --min-edge 64 --latents mini/base

say "3. Embed: the text encoder's features of every caption"
"$ella" embed "$out/data" --text mini/text --max-tokens 96 --padding none

cat >"$out/run.toml" <<EOF
[run]
output = "$out/run"
seed = 7

[base]
model = "mini/base"

[text]
model = "mini/text"
max_tokens = 96
padding = "none"

[data]
path = "$out/data"

[connector]
latents = 16

[train]
steps = $steps
global_batch = 128
micro_batch = 64
eval_every = 40
eval_samples = 128
ema_decay = 0.99

[train.optimizer]
lr = 3e-3
betas = [0.9, 0.99]

[train.schedule]
kind = "cosine"
warmup = 20

[checkpoint]
every = 105

[sample]
every = 210
prompts = [
    "A large plain red circle is at the top left, while a medium-sized checkered blue square lies at the bottom right. The background is plain mint.",
    "Three shapes: a big plain yellow star in the top left corner, a big plain green ring in the top right corner, and a mid-sized solid purple cross in the bottom left corner. The background is plain navy.",
]
seed = 1
steps = 20
guidance = 3.0

[workers]
count = 2
device = "cpu"
EOF

say "4. Train with two workers, and kill everything (SIGKILL) half-way"
setsid "$ella" train "$out/run.toml" &
group=$!
deadline=$(($(date +%s) + 240))
until step=$("$ella" status "$out/run" --json 2>/dev/null | field last_commit_step 2>/dev/null) && [ "${step:-0}" -ge $((steps / 2)) ]; do
    kill -0 $group 2>/dev/null || { echo "the run ended before it could be killed" >&2; exit 1; }
    [ "$(date +%s)" -lt $deadline ] || { echo "no commit at half of the steps within 240 s" >&2; exit 1; }
    # Asking takes a fifth of a second of a core, which the training needs.
    sleep 2
done
kill -KILL -- -$group
wait $group 2>/dev/null || true
echo "killed after the commit of step $step"

say "5. The same command resumes from the last commit"
"$ella" train "$out/run.toml"

say "6. Audit: every sample exactly once, every byte as committed"
"$ella" audit "$out/run" --json >"$out/audit.json" || { cat "$out/audit.json"; exit 1; }
"$ella" audit "$out/run"

say "7. Export, and draw the prompts: by the base's own encoder, and by the connector, from the same noise"
"$ella" export "$out/run" --out "$out/connector.safetensors"
for by in base connector; do
    how=(--only-clip)
    [ $by = base ] || how=(--connector "$out/connector.safetensors" --text mini/text)
    "$ella" dpg generate --prompts "$out/suite/dense" --out "$out/drawn/$by" --base mini/base --steps 20 --guidance 3 --batch 64 --workers 2 "${how[@]}"
    "$ella" dpg look --suite "$out/suite" --images "$out/drawn/$by" --out "$out/$by.jsonl" --json >"$out/$by-look.json"
    "$ella" dpg score --csv "$out/suite/dense.csv" --answers "$out/$by.jsonl" --mode correct --out "$out/$by.html" --json >"$out/$by-score.json"
done
python3 - "$out" <<'EOF'
import json, sys
out = sys.argv[1]
base, connector = (json.load(open(f"{out}/{by}-score.json"))["correct"] for by in ("base", "connector"))
print(f"per cent of the questions about {base['score']['of']} dense prompts that are right{'base':>15}{'connector':>12}")
rows = [("score", base["score"], connector["score"])]
rows += [(name, base["level1"][name], connector["level1"][name]) for name in base["level1"]]
for name, a, b in rows:
    print(f"{name:>20}{a['value']:>50.1f}{b['value']:>12.1f}")
EOF
find "$out/suite/dense" -name '*.txt' | sort | head -8 | while read -r file; do tr '\n' ' ' <"$file"; echo; done >"$out/prompts.txt"
"$ella" sample --connector "$out/connector.safetensors" --base mini/base --text mini/text --compare --size 64 --steps 20 --guidance 3 --seed 1 \
    --prompts "$out/prompts.txt" --out "$out/samples.png"

say "8. Report"
"$ella" report "$out/run" --audit "$out/audit.json" --samples "$out/samples.png" --out "$out/report.html"
echo "done in $(($(date +%s) - began)) s: open $out/report.html"
