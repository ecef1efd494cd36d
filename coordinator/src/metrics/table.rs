//! The metrics.

use super::Kind::{Counter, Gauge, Histogram, Info};
use super::Of::{Any, Job, Process, Run};
use super::{Label, MOST_RANKS, Metric, Values};
use crate::machine::MOST_NAMES;

const fn of(name: &'static str, values: &'static [&'static str]) -> Label {
    Label { name, values: Values::Of(values) }
}

const fn some(name: &'static str, what: &'static str, most: usize) -> Label {
    Label { name, values: Values::Some { what, most } }
}

/// The phases of runs and jobs.
pub const PHASES: &[&str] = &["waiting", "starting", "training", "regrouping", "working", "draining", "done", "preempted", "failed"];
/// What workers are at: a job's are loading or working.
pub const STATES: &[&str] = &["loading", "spare", "rank", "returning", "working"];
/// What has befallen workers.
pub const EVENTS: &[&str] = &["joined", "lost", "left", "failed", "released", "stuck", "reattached"];
/// What the time of a step is spent on; `reduce_hidden` and `encode` are beside the rest.
pub const PARTS: &[&str] = &["data", "encode", "forward", "backward", "reduce", "update", "commit", "reduce_hidden", "draw"];
/// What is told of the workers together.
pub const STATS: &[&str] = &["least", "mean", "most"];
/// Where a job's units are.
pub const PLACES: &[&str] = &["waiting", "held", "done", "given_up"];
/// Whose store calls.
pub const PROCESSES: &[&str] = &["coordinator", "worker"];
/// What is done to stores.
pub const OPERATIONS: &[&str] = &["get", "head", "list", "put", "create", "upload", "delete"];
/// What became of captions that were encoded on the way.
pub const ENCODED: &[&str] = &["embedded", "truncated", "absent", "failed_ahead"];
/// What became of traces' spans.
pub const SPANS: &[&str] = &["sent", "dropped", "failed"];

const PART: Label = of("part", PARTS);
const RANK: Label = some("rank", "a rank's number", MOST_RANKS);
const STAT: Label = of("stat", STATS);
const PROCESS: Label = of("process", PROCESSES);
const OPERATION: Label = of("operation", OPERATIONS);
const NAME: Label = some("name", "a count's name, as ella status has it", MOST_NAMES);
const REASON: Label = some("reason", "a reason, in a word or two", MOST_NAMES);

macro_rules! metrics {
    ($($constant:ident = $kind:ident $name:literal $of:ident [$($label:expr),*] $help:literal;)+) => {
        $(#[doc = $help] pub const $constant: Metric = Metric { name: $name, kind: $kind, labels: &[$($label),*], of: $of, help: $help };)+
        /// Every metric, in the order in which they are told.
        pub const ALL: &[Metric] = &[$($constant),+];
    };
}

metrics! {
    BUILD_INFO = Info "ella_build_info" Any [some("version", "ella's version", 1)] "The version of the coordinator.";
    RUN_INFO = Info "ella_run_info" Any [some("run", "its URL", 1), some("kind", "run, or the kind of the job", 1)] "What is coordinated: a run folder, or of a job its data set.";
    PHASE = Gauge "ella_phase" Any [of("phase", PHASES)] "1 for the phase that the run or job is in, 0 for the others.";
    WORKERS = Gauge "ella_workers" Any [of("state", STATES)] "Workers that are here, by what they are at.";
    WORKERS_WANTED = Gauge "ella_workers_wanted" Run [] "Workers that the run begins with (workers.count).";
    WORKER_EVENTS = Counter "ella_worker_events_total" Any [of("event", EVENTS)] "What has befallen workers.";
    TERM = Gauge "ella_term" Run [] "Number of this coordinator incarnation.";
    GENERATION = Gauge "ella_generation" Run [] "Number of the membership.";
    GENERATIONS = Counter "ella_generations_total" Run [] "Memberships formed by this coordinator.";
    STEP = Gauge "ella_step" Run [] "Applied optimizer steps.";
    STEPS_TARGET = Gauge "ella_steps_target" Run [] "Steps in all (train.steps).";
    STEPS = Counter "ella_steps_total" Run [] "Steps that this coordinator was told of as they were applied.";
    STEPS_MISSED = Counter "ella_steps_missed_total" Run [] "Steps that were applied while no coordinator listened, and told later.";
    STEPS_NOT_FINITE = Counter "ella_steps_not_finite_total" Run [] "Steps that were left out because a loss or gradient was not finite.";
    STEP_DURATION = Histogram "ella_step_duration_seconds" Run [] "What steps took, by the clock of rank 0.";
    STEP_PART_SECONDS = Counter "ella_step_part_seconds_total" Run [PART] "What rank 0 has spent on steps, by part; reduce_hidden and encode are beside the others.";
    SAMPLES = Counter "ella_samples_total" Run [] "Samples of the steps that this coordinator was told of.";
    RUN_SAMPLES = Gauge "ella_run_samples" Run [] "Samples trained on since the run began, by all its coordinators.";
    SAMPLES_PER_SECOND = Gauge "ella_samples_per_second" Any [] "Throughput over the last steps; of a job, over the last minute.";
    EPOCH = Gauge "ella_epoch" Run [] "The epoch, from 0.";
    LOSS = Gauge "ella_loss" Run [] "Training loss of the newest step; NaN if it was not finite, or before the first.";
    HELD_OUT_LOSS = Gauge "ella_held_out_loss" Run [] "Loss on the held-out samples where it was measured last; NaN before that.";
    GRAD_NORM = Gauge "ella_grad_norm" Run [] "The gradient's norm at the newest step, before clipping.";
    LEARNING_RATE = Gauge "ella_learning_rate" Run [] "The learning rate of the newest step.";
    LAST_STEP_TIMESTAMP = Gauge "ella_last_step_timestamp_seconds" Run [] "When this coordinator was told of a step last, since 1970.";
    COMMITS = Counter "ella_commits_total" Run [] "Commits written by this coordinator.";
    COMMIT_BYTES = Counter "ella_commit_bytes_total" Run [] "Bytes of their files.";
    COMMIT_SECONDS = Counter "ella_commit_seconds_total" Run [] "What they took, from the first rank's report to the record; training goes on meanwhile.";
    COMMIT_BLOCKED = Counter "ella_commit_blocked_seconds_total" Run [] "How long commits have held up rank 0.";
    LAST_COMMIT_STEP = Gauge "ella_last_commit_step" Run [] "Step of the newest commit.";
    LAST_COMMIT_TIMESTAMP = Gauge "ella_last_commit_timestamp_seconds" Run [] "When this coordinator wrote its last commit, or began, since 1970.";
    STRAGGLERS = Counter "ella_stragglers_total" Run [] "Times that all waited far longer than usual for one rank.";
    SKIPPED = Counter "ella_skipped_total" Run [REASON] "Samples, captions and steps that were skipped or cut.";
    CAPTIONS_ENCODED = Counter "ella_captions_encoded_total" Run [of("result", ENCODED)] "Captions without stored features that were encoded on the way.";
    CACHE_HITS = Counter "ella_data_cache_hits_total" Run [] "Files of the data set that were in the cache of the machine that needed them.";
    CACHE_MISSES = Counter "ella_data_cache_misses_total" Run [] "Files of the data set that had to be fetched.";
    CACHE_FETCHED = Counter "ella_data_cache_fetched_bytes_total" Run [] "Bytes of them.";
    CACHE_EVICTED = Counter "ella_data_cache_evicted_bytes_total" Run [] "Bytes that had to leave caches for others.";
    REFUSED = Counter "ella_refused_total" Any [REASON] "Calls, messages and workers that were refused.";
    STORE_RETRIES = Counter "ella_store_retries_total" Any [PROCESS, OPERATION, REASON] "Store calls that were tried again.";
    STORE_FAILURES = Counter "ella_store_failures_total" Any [PROCESS, OPERATION, REASON] "Store calls that failed in the end.";
    STORE_READ = Counter "ella_store_read_bytes_total" Any [PROCESS] "Bytes read from stores; local files that are mapped are not counted.";
    STORE_WRITTEN = Counter "ella_store_written_bytes_total" Any [PROCESS] "Bytes written to stores.";
    JOURNAL_DROPPED = Counter "ella_journal_lines_dropped_total" Run [] "Lines of the run's journal that are lost.";
    JOURNAL_FAILED = Counter "ella_journal_writes_failed_total" Run [] "Writes of the run's journal that failed; most are tried again.";
    COUNTED = Counter "ella_counted_total" Any [NAME] "What else was refused, retried or skipped.";
    SPANS_TOLD = Counter "ella_trace_spans_total" Process [of("result", SPANS)] "Spans of the coordinator's traces.";
    WORKER_STEP = Gauge "ella_worker_step" Run [RANK] "A rank's newest known step.";
    WORKER_SILENT = Gauge "ella_worker_silent_seconds" Run [RANK] "Since a rank was last heard of.";
    WORKER_PART = Gauge "ella_worker_step_part_seconds" Run [RANK, PART] "A rank's newest step, by what it was spent on.";
    WORKER_MEMORY = Gauge "ella_worker_memory_bytes" Run [RANK] "Memory of a rank's process.";
    WORKER_CPU = Counter "ella_worker_cpu_seconds_total" Run [RANK] "Processor time of a rank's process.";
    WORKER_FEED = Gauge "ella_worker_feed_bytes" Run [RANK] "Samples of a rank that are made and wait for their step.";
    WORKER_GPU_USED = Gauge "ella_worker_gpu_memory_used_bytes" Run [RANK] "Memory of a rank's GPU that is in use, by all processes.";
    WORKER_GPU_SIZE = Gauge "ella_worker_gpu_memory_size_bytes" Run [RANK] "Memory of a rank's GPU.";
    WORKER_GPU_ALLOCATED = Gauge "ella_worker_gpu_memory_allocated_bytes" Run [RANK] "Of it, in a rank's tensors.";
    WORKER_GPU_BUSY = Gauge "ella_worker_gpu_busy_ratio" Run [RANK] "Of the time, in which a rank's GPU did anything.";
    WORKERS_SILENT = Gauge "ella_workers_silent_seconds" Any [STAT] "Since the workers were last heard of.";
    WORKERS_PART = Gauge "ella_workers_step_part_seconds" Run [STAT, PART] "The ranks' newest steps, by what they were spent on.";
    WORKERS_MEMORY = Gauge "ella_workers_memory_bytes" Any [STAT] "Memory of the workers' processes.";
    WORKERS_FEED = Gauge "ella_workers_feed_bytes" Run [STAT] "Samples that are made and wait for their step.";
    WORKERS_GPU_USED = Gauge "ella_workers_gpu_memory_used_bytes" Any [STAT] "Memory of the workers' GPUs that is in use.";
    WORKERS_GPU_BUSY = Gauge "ella_workers_gpu_busy_ratio" Any [STAT] "Of the time, in which the workers' GPUs did anything.";
    JOB_STAGE = Gauge "ella_job_stage" Job [] "The stage that is worked on, from 1.";
    JOB_UNITS = Gauge "ella_job_units" Job [of("place", PLACES)] "Units of this stage, by where they are.";
    JOB_UNITS_PER_SECOND = Gauge "ella_job_units_per_second" Job [] "Units done over the last minute.";
    JOB_SAMPLES = Gauge "ella_job_samples" Job [] "Samples of all stages, those of held units included.";
    JOB_REMAINING = Gauge "ella_job_remaining_seconds" Job [] "Until this stage ends, at the rate of the last minute; NaN until that is known.";
    JOB_RESULTS = Counter "ella_job_results_total" Job [NAME] "What came of the samples of units that are done.";
    PROCESS_CPU = Counter "process_cpu_seconds_total" Process [] "Processor time of the coordinator.";
    PROCESS_MEMORY = Gauge "process_resident_memory_bytes" Process [] "Memory of the coordinator.";
    PROCESS_START = Gauge "process_start_time_seconds" Process [] "When the coordinator began, since 1970.";
    PROCESS_FILES = Gauge "process_open_fds" Process [] "Files and connections that the coordinator has open.";
    PROCESS_MOST_FILES = Gauge "process_max_fds" Process [] "Files and connections that it may have open.";
}
