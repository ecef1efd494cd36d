//! docs/performance.md has the cost model's own figures: its tables are made here. `ELLA_WRITE_DOCS=1 cargo test -p ella-model --test
//! performance` writes them anew.

#![allow(clippy::unwrap_used)] // helpers of tests may panic as tests do

use std::fmt::Write as _;
use std::path::Path;

use ella_model::connector::{Connector, ConnectorConfig, ConnectorKind};
use ella_model::cost::{
    Family, Floor, GPUS, Operation, Total, by, connector, floor, optimizer_bytes, t5, total, unet, vae_decoder, vae_encoder,
};
use ella_model::presets::Preset;
use ella_model::t5::T5Config;

/// The micro-batch of the tables, and bytes of a bf16 number and of a float32 one.
const BATCH: u64 = 32;
const BF16: u64 = 2;
const FP32: u64 = 4;
/// Positions of a caption, and states that the U-Net attends to.
const TOKENS: i64 = 128;
const STATES: i64 = 64;

fn sd15() -> Vec<Operation> {
    unet(&Preset::Sd15.unet().unwrap(), (64, 64), STATES)
}

fn tsc() -> (ConnectorConfig, Vec<Operation>) {
    let config = ConnectorConfig::new(ConnectorKind::Tsc, 768, 2048);
    let operations = connector(&config, TOKENS);
    (config, operations)
}

fn parameters(config: &ConnectorConfig) -> u64 {
    Connector::layout(config).unwrap().iter().map(|(_, shape)| shape.iter().product::<i64>().unsigned_abs()).sum()
}

/// GFLOP and MB of a sample, forward and backward.
fn row(name: &str, sum: &Total, width: u64) -> String {
    let mega = |work: &ella_model::cost::Work| work.bytes(BATCH, width) / BATCH as f64 / 1e6;
    format!(
        "| {name} | {:.1} | {:.1} | {:.1} | {:.0} | {:.0} |\n",
        sum.forward.flops(1) / 1e9,
        sum.backward.flops(1) / 1e9,
        2.0 * sum.recompute as f64 / 1e9,
        mega(&sum.forward),
        mega(&sum.backward)
    )
}

const HEAD: &str = "| forward, GFLOP | backward, GFLOP | computed twice, GFLOP | forward, MB | backward, MB |\n|---|---|---|---|---|---|\n";

fn families() -> String {
    let (operations, mut text) = (sd15(), format!("| family {HEAD}"));
    let sums = by(&operations, |operation| operation.family);
    for (name, family) in Family::NAMES {
        text += &row(name, &sums[&family], BF16);
    }
    text += &row("**all**", &total(&operations), BF16);
    text + &row("all, fused", &total(operations.iter().filter(|operation| !operation.family.is_fused())), BF16)
}

fn levels() -> String {
    let mut text = format!("| level {HEAD}");
    for (level, sum) in by(&sd15(), |operation| operation.level) {
        let side = 64 >> level;
        text += &row(&format!("{level}: {side} × {side}"), &sum, BF16);
    }
    text
}

fn parts() -> String {
    let mut text = format!("| part {HEAD}");
    let (config, tsc) = tsc();
    text += &row("U-Net, 64 states", &total(&sd15()), BF16);
    text += &row("connector, 128 positions, float32", &total(&tsc), FP32);
    text += &row("Flan-T5-XL's encoder, 128 positions", &total(&t5(&T5Config::flan_t5_xl(), TOKENS)), BF16);
    let vae = Preset::Sd15.vae().unwrap();
    text += &row("VAE's encoder", &total(&vae_encoder(&vae, (512, 512))), BF16);
    text += &row("VAE's decoder (only for pictures)", &total(&vae_decoder(&vae, (512, 512))), BF16);
    let count = parameters(&config);
    writeln!(text, "\nThe update of {count} parameters moves {:.2} GB a step, whatever the batch.", optimizer_bytes(count) / 1e9).unwrap();
    text
}

fn bases() -> String {
    let mut text = "| base | latents | U-Net forward | there and back | with connector |\n|---|---|---|---|---|\n".to_owned();
    for (name, preset, latent, width) in [
        ("SD 1.5 at 256²", Preset::Sd15, 32, 768),
        ("SD 1.5 at 512²", Preset::Sd15, 64, 768),
        ("SDXL at 512²", Preset::Sdxl, 64, 2048),
        ("SDXL at 1024²", Preset::Sdxl, 128, 2048),
    ] {
        let sum = total(&unet(&preset.unet().unwrap(), (latent, latent), STATES));
        let pooled = preset.unet().unwrap().pooled_width().unwrap();
        let config = ConnectorConfig { pooled, ..ConnectorConfig::new(ConnectorKind::Tsc, width, 2048) };
        let own = total(&connector(&config, TOKENS)).flops();
        let tera = |flops: f64| flops / 1e12;
        let (forward, both) = (tera(sum.forward.flops(1)), tera(sum.flops()));
        writeln!(text, "| {name} | {latent} × {latent} | {forward:.3} | {both:.3} | {:.3} |", both + tera(own)).unwrap();
    }
    text
}

fn floors() -> String {
    let head = "| GPU | FLOP over peak | fused floor | a kernel each | update | step at 32 | images/s at the fused floor |";
    let mut text = format!("{head}\n{}|\n", "|---".repeat(7));
    let (config, tsc) = tsc();
    for gpu in &GPUS {
        let (net, own): (Floor, Floor) = (floor(&sd15(), gpu, BATCH, BF16), floor(&tsc, gpu, BATCH, FP32));
        let ms = |seconds: f64| format!("{:.1} ms", 1e3 * seconds);
        let arithmetic = BATCH as f64 * (total(&sd15()).flops() + total(&tsc).flops()) / gpu.peak;
        let fused = net.fused + own.fused;
        let update = optimizer_bytes(parameters(&config)) / gpu.bandwidth;
        let step = fused + update;
        writeln!(
            text,
            "| {} | {} | {} | + {} | + {} | {} | {:.0} |",
            gpu.name,
            ms(arithmetic),
            ms(fused),
            ms(net.unfused + own.unfused),
            ms(update),
            ms(step),
            BATCH as f64 / step
        )
        .unwrap();
    }
    text
}

/// Where the floor lies by family on an H200.
fn floor_by_family() -> String {
    let gpu = &GPUS[0];
    let mut text = format!("| family | least time at {BATCH} on an {}, ms | share | bound by |\n|---|---|---|---|\n", gpu.name);
    let operations = sd15();
    let of = |family: Family| -> Vec<Operation> { operations.iter().filter(|operation| operation.family == family).copied().collect() };
    let seconds = |family| {
        let floor = floor(&of(family), gpu, BATCH, BF16);
        floor.fused + floor.unfused
    };
    let all: f64 = Family::NAMES.iter().map(|(_, family)| seconds(*family)).sum();
    for (name, family) in Family::NAMES {
        let (sum, least) = (total(&of(family)), seconds(family));
        let arithmetic = BATCH as f64 * sum.flops() / gpu.peak;
        let bound = if arithmetic > 0.5 * least { "arithmetic" } else { "memory" };
        writeln!(text, "| {name} | {:.2} | {:.1} % | {bound} |", 1e3 * least, 100.0 * least / all).unwrap();
    }
    text
}

/// Bytes a second of a GPU's part of a ring: in a node NVLink's 900 GB/s, half of it each way; between nodes of eight GPUs eight links of
/// 400 Gb/s, each of which carries an eighth of the sum.
const IN_NODE: f64 = 450e9;
const BETWEEN: f64 = 8.0 * 400e9 / 8.0;
/// Seconds that one hop is assumed to take by itself.
const HOP: f64 = 10e-6;

fn scaling() -> String {
    let mut text =
        "| reduction | bytes | GPUs | all-reduce | share of the step at 195 images/s | at 260 images/s |\n|---|---|---|---|---|---|\n"
            .to_owned();
    let count = parameters(&tsc().0) as f64;
    for (name, width) in [("fast, bf16", 2.0), ("fast", 4.0), ("exact", 8.0)] {
        for (gpus, bandwidth) in [(8.0f64, IN_NODE), (256.0, BETWEEN)] {
            let seconds = 2.0 * (gpus - 1.0) / gpus * count * width / bandwidth + 2.0 * gpus.log2() * HOP;
            let share = |rate: f64| format!("{:.1} %", 100.0 * seconds / (seconds + BATCH as f64 / rate));
            let (at, target) = (share(195.0), share(260.0));
            writeln!(text, "| {name} | {:.0} MB | {gpus} | {:.2} ms | {at} | {target} |", count * width / 1e6, 1e3 * seconds).unwrap();
        }
    }
    text
}

/// A table's name in the page, and what makes it.
type Table = (&'static str, fn() -> String);

#[test]
fn the_page_has_the_models_own_figures() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/performance.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let tables: [Table; 7] = [
        ("parts", parts),
        ("families", families),
        ("levels", levels),
        ("bases", bases),
        ("floors", floors),
        ("floor-by-family", floor_by_family),
        ("scaling", scaling),
    ];
    let mut wanted = page.clone();
    for (name, make) in tables {
        let (open, close) = (format!("<!-- cost: {name} -->\n"), "<!-- end -->");
        let from = wanted.find(&open).unwrap_or_else(|| panic!("the page has no table {name}")) + open.len();
        let to = from + wanted[from..].find(close).unwrap();
        wanted.replace_range(from..to, &make());
    }
    if std::env::var_os("ELLA_WRITE_DOCS").is_some() {
        std::fs::write(&path, &wanted).unwrap();
    } else {
        assert!(
            page == wanted,
            "docs/performance.md is not what the cost model says: write it anew with ELLA_WRITE_DOCS=1 (see this test's file)"
        );
    }
}
