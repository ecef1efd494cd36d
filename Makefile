# Each target is one command on a fresh machine with Rust, a C++ compiler and Python 3 (pip). The first one fetches libtorch, and the tools
# that build the JPEG library where they are missing (cmake, nasm), once.
.DEFAULT_GOAL := build
.PHONY: build demo claims docs test test-k8s test-stores test-dashboard test-cluster test-monitoring chaos chaos-train bench bench-recovery bench-scale bench-feed bench-prepare bench-gpu bench-gpu-pack images lint audit libtorch proto parity-full reference

# One profile for all: a second one would compile everything again.
CARGO ?= cargo
FLAGS := --release --workspace --locked
# Where that leaves programs, whatever folder cargo is told to build in.
BUILT = "$$($(CARGO) metadata --format-version 1 --no-deps --offline | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')"/release
# Where scripts/codec-tools.sh puts a cmake if the machine has none.
export PATH := $(PATH):$(CURDIR)/.tools/bin

libtorch:
	@scripts/libtorch.sh
	@scripts/codec-tools.sh

# Leaves ella, ella-coordinator and ella-worker in cargo's target folder, under release/.
build: libtorch
	$(CARGO) build $(FLAGS) --bins

# The main job, end to end, on data made here: see demo/report.html afterwards.
demo: build
	@scripts/demo.sh

# The paper's claims, measured in the miniature: see claims/report.html afterwards. CLAIMS=--quick makes it shorter.
claims: build
	@$(BUILT)/ella claims --out $(or $(CLAIMS_OUT),claims) $(CLAIMS)

test: build
	python3 -m unittest discover -q -s bench
	python3 -m unittest discover -q -s scripts
	$(CARGO) test $(FLAGS) --tests --no-fail-fast

# Stores on real servers: moto (S3) and azurite (Azure Blob), which are installed into .stores/ once. Opt-in: it needs Node.js, and half a GB.
test-stores: build
	@scripts/test-stores.sh

# A run in containers of one Docker network (coordinator, three workers, an S3 server), killed, paused and cut off: the bytes of the run without them.
# Opt-in: it needs root, a Docker engine (Debian: docker.io), and debootstrap or a BASE image.
test-cluster: build
	@scripts/test-cluster.sh

# What Prometheus is told, the alert rules and the dashboard's queries by promtool, which is taken out of Debian's package if it is not installed.
test-monitoring: libtorch
	@scripts/test-monitoring.sh

# The dashboard in a real Chromium, with 10^6 steps of history. Opt-in: it needs chromium, Node.js with npm (playwright-core, axe-core), and 400 MB of
# disk. Pictures are in target/dashboard/shots/ afterwards.
test-dashboard:
	$(CARGO) build $(FLAGS) --example dashboard
	@scripts/test-dashboard.sh

# The Kubernetes manifests against kubectl 1.36 and the API's schemas, and the API's client. Opt-in: it installs both into .k8s/ (150 MB).
test-k8s:
	@scripts/test-k8s.sh

# Jobs under kills and failing stores at full size: 200 tars, 4 workers, 40 kills, in a folder and on both servers. ELLA_CHAOS_SEED draws others.
chaos: build
	@ELLA_CHAOS=full scripts/test-stores.sh chaos

# Training under faults of all kinds at full size: 10 seeds, 300 steps, 40 faults each. CHAOS_SEEDS=11..20 tries others.
chaos-train: build
	@scripts/chaos-train.sh

# A program that measures, built and run; with the whole workspace's features, or all would be compiled again.
define measure
	$(CARGO) build $(FLAGS) $(2) --example $(1)
	$(BUILT)/examples/$(1)
endef
# What is measured is compiled for speed, which the tests beside it are not.
FAST := --config profile.release.package.ella-tests.opt-level=3

# Programs that print ratios; nothing here is a test. Commits are beside torch.save and DCP's async_save if PEERS_PYTHON names a Python that has
# torch. BENCH_FOLDER: on the disk to measure them on, with 3 GB free.
bench: build
	$(call measure,bench,$(FAST))
	$(call measure,bench_commit)
	$(call measure,bench_step)

# What a death and a joiner cost at the connector's true size, beside torchrun if PEERS_PYTHON names a Python that has torch. 16 GB of memory.
bench-recovery: build
	$(call measure,bench_recovery,$(FAST))

# The control plane under 100, 1,000 and 10,000 workers.
bench-scale: build
	$(call measure,bench_scale)

# The feed beside MosaicML Streaming and litdata, which PEERS_PYTHON must name a Python with; else alone. BENCH_FOLDER: on the disk to measure,
# with 8 GiB free.
bench-feed: libtorch
	$(call measure,bench_feed,$(FAST))

# ella prepare beside cv2 and PIL, image by image and core by core. PEERS_PYTHON names a Python that has opencv-python-headless, pillow
# and numpy; nothing is installed.
bench-prepare: build
	$(call measure,bench_prepare,$(FAST))

# On a machine with a GPU: correctness on it, ella's step beside PyTorch's, the text encoder, a profile; ten minutes. BENCH_OUT: where results go.
# PEERS_PYTHON names a Python that has torch 2.11 and diffusers.
bench-gpu: build
	$(CARGO) build $(FLAGS) --example bench_gpu
	bench/gpu.sh $(or $(BENCH_OUT),target/bench-gpu)

# What a GPU machine needs to run that without building: target/bench-gpu-pack/, a few MiB; with PEER_PYTHON=3.12 the peer's wheels too.
bench-gpu-pack: build
	$(CARGO) build $(FLAGS) --example bench_gpu
	rm -rf target/bench-gpu-pack
	bench/pack.sh target/bench-gpu-pack

# ella-coordinator, ella-worker and ella-worker-cuda, with the Docker of this machine. TAG, BASE, RUST, PREBUILT=1: see the script.
# IMAGES="coordinator worker" builds some of them.
images:
	@scripts/images.sh $(IMAGES)

# ella beside diffusers and transformers at full size (SD 1.5's U-Net, Flan-T5-XL's encoder): errors, seconds, peak memory. Opt-in: it
# installs both, unless PARITY_PYTHON names a Python that has them, and needs 14 GiB of memory.
parity-full: build
	@scripts/parity-full.sh

# The wire contract's generated types, which are checked in.
proto:
	$(CARGO) run --quiet --manifest-path proto/codegen/Cargo.toml --target-dir target/codegen

# What is known against the dependencies: RustSec's database, from its repository. Not in lint, which needs no network but the registries.
audit:
	@scripts/deny.sh advisories bans licenses sources

# The pages and tables of docs/ that are made of the code, which are checked in; `make test` says if they are stale.
reference: build
	ELLA_WRITE_DOCS=1 $(CARGO) test --release --locked -p ella-tests --test reference

# The docs as a site: target/book/index.html. The first time compiles mdBook into .tools/, which takes minutes.
docs:
	@scripts/docs.sh

lint: libtorch
	python3 scripts/check_docs.py
	@scripts/deny.sh
	$(CARGO) run --quiet --manifest-path proto/codegen/Cargo.toml --target-dir target/codegen --locked -- --check
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(FLAGS) --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc $(FLAGS) --no-deps
	python3 bench/draw.py --check
