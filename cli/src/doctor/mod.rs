//! `ella doctor`: what this machine has to train with, how fast it is, and what is wrong with it.

mod gpu;
mod machine;
mod speed;

use clap::Args;
use ella_proto::config::Device as Choice;
use ella_store::{Store, probe};
use ella_worker::device::{self, NoDevice};
use ella_worker::gpu::Unusable;
use ella_worker::gpu::fault::first_line;
use gpu::{Gpu, Gpus};
use machine::Machine;
use serde::Serialize;
use speed::{Kept, Speeds};

use crate::ui::{DONE, FAILED, Fail, Out, bytes, note};

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Say only what is there; measure nothing
    #[arg(long)]
    quick: bool,
    /// Also try whether runs can be kept in this store (a folder or URL): some objects are written there and deleted
    #[arg(long, value_name = "URL")]
    store: Option<String>,
}

/// All that was found.
#[derive(Debug, Serialize)]
struct Report {
    ella: &'static str,
    machine: Machine,
    libtorch: Libtorch,
    gpus: Gpus,
    nccl: Option<Nccl>,
    /// Of the processor, and of each GPU.
    speeds: Vec<Speeds>,
    store: Option<String>,
    /// What a run would stumble over.
    wrong: Vec<String>,
    ok: bool,
}

#[derive(Debug, Serialize)]
struct Libtorch {
    version: String,
    folder: String,
}

#[derive(Debug, Serialize)]
struct Nccl {
    version: String,
    known_fault: Option<&'static str>,
}

impl Doctor {
    pub(crate) fn run(&self, out: Out) -> Result<u8, Fail> {
        let store = self.store.as_deref().map(Store::open).transpose()?;
        let machine = Machine::look();
        let mut wrong = machine.wrong();
        let libtorch = libtorch();
        let gpus = Gpus::look();
        wrong.extend(gpus.wrong());
        // torch's own copy lies beside it; without a GPU there is nothing to look for.
        let nccl = (!gpus.devices.is_empty()).then(|| look_for_nccl(&mut wrong)).flatten();
        let mut speeds = Vec::new();
        if !self.quick {
            device::set_threads(machine.cores);
            speeds.extend(measure("the processor", speed::of_processor, &mut wrong));
            if gpus.usable() {
                speeds.extend(measure_gpus(&gpus.devices, &mut wrong));
            }
        }
        let store = store.map(|store| try_store(&store, &mut wrong)).transpose()?;
        let ok = wrong.is_empty();
        let report = Report { ella: env!("CARGO_PKG_VERSION"), machine, libtorch, gpus, nccl, speeds, store, wrong, ok };
        out.result(&report, || report.text());
        Ok(if ok { DONE } else { FAILED })
    }
}

/// What cannot be measured is wrong; the rest is told all the same.
fn measure(what: &str, all: impl FnOnce() -> Kept<Speeds>, wrong: &mut Vec<String>) -> Option<Speeds> {
    note(format_args!("measuring {what}"));
    all().map_err(|error| wrong.push(format!("{what} cannot be measured: {}", first_line(&error)))).ok()
}

/// One after the other, and what is slow beside the others.
fn measure_gpus(gpus: &[Gpu], wrong: &mut Vec<String>) -> Vec<Speeds> {
    let all: Vec<(&Gpu, Speeds)> =
        gpus.iter().filter_map(|gpu| Some((gpu, measure(&gpu.called(), || speed::of_gpu(gpu.number, gpu.free_bytes), wrong)?))).collect();
    let named: Vec<_> = all.iter().map(|(gpu, speeds)| (gpu.name.as_str(), gpu.called(), speeds)).collect();
    wrong.extend(speed::slow(&named));
    all.into_iter().map(|(_, speeds)| speeds).collect()
}

fn libtorch() -> Libtorch {
    // The first tensor loads what is to be found.
    drop(tch::Tensor::from(0));
    let Some(folder) = device::libtorch_folder() else {
        return Libtorch { version: "unknown".to_owned(), folder: "unknown".to_owned() };
    };
    Libtorch { version: device::libtorch_version(&folder), folder: folder.display().to_string() }
}

fn look_for_nccl(wrong: &mut Vec<String>) -> Option<Nccl> {
    match device::nccl().and_then(|library| library.version()) {
        Ok(version) => {
            wrong.extend(device::nccl_fault(version));
            Some(Nccl { version: version.to_string(), known_fault: version.known_fault() })
        }
        Err(error) => {
            let hint = "several workers with GPUs cannot train together; install the wheel nvidia-nccl-cu13 beside torch's";
            wrong.push(format!("NCCL cannot be used ({error}): {hint}"));
            None
        }
    }
}

fn try_store(store: &Store, wrong: &mut Vec<String>) -> Result<String, Fail> {
    let url = store.url().to_owned();
    if let Err(error) = crate::runtime()?.block_on(probe(store)) {
        wrong.push(format!("runs cannot be kept in {url}: {error}"));
    }
    Ok(url)
}

impl Report {
    fn text(&self) -> String {
        let Self { machine, libtorch, gpus, .. } = self;
        let mut text = format!("ella      {}\n", self.ella);
        text += &format!(
            "machine   {}, {} cores, {} of memory ({} free)\n",
            machine.system,
            machine.cores,
            bytes(machine.memory_bytes),
            bytes(machine.free_bytes)
        );
        text += &format!("libtorch  {}, {}\n", libtorch.version, libtorch.folder);
        text += &gpus.text();
        if let Some(Nccl { version, .. }) = &self.nccl {
            text += &format!("nccl      {version}\n");
        }
        self.speeds.iter().for_each(|speeds| text += &speeds.text());
        if let Some(url) = &self.store {
            text += &format!("store     {url}\n");
        }
        self.wrong.iter().for_each(|what| text += &format!("WRONG     {what}\n"));
        text + &match (self.ok, gpus.usable()) {
            (true, true) => "verdict   ready to train on the GPU".to_owned(),
            (true, false) => "verdict   ready to train on the processor: this machine has no GPU that ella can use".to_owned(),
            (false, _) => format!("verdict   {} to put right", crate::ui::count(self.wrong.len(), "thing")),
        }
    }
}

/// As workers choose it: the GPU, if there is one.
fn has_gpu() -> Result<(), Unusable> {
    device::set_up(Choice::Cuda, 1).map(drop).map_err(|NoDevice(why)| why)
}
