//! What a run costs, by arithmetic: every figure with the formula that gave it. Pure.

use ella_dataset::order::open_bytes;
use serde::Serialize;

use crate::ui::{bytes, span};

/// A GPU that can be rented: its name, and its peak for products of dense bf16 (fp16 where it has no bf16) matrices, TFLOP/s, by its maker.
pub(super) const GPUS: [(&str, f64); 9] = [
    ("h200", 989.0),
    ("h100", 989.0),
    ("a100", 312.0),
    ("l40s", 362.0),
    ("l4", 121.0),
    ("a10", 125.0),
    ("4090", 165.0),
    ("v100", 125.0),
    ("t4", 65.0),
];

/// What the figures are made of.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Facts {
    pub(super) samples: u64,
    /// Of an average picture.
    pub(super) pixels: f64,
    /// Bytes of the prepared shards.
    pub(super) shard_bytes: u64,
    pub(super) shards: u64,
    pub(super) has_latents: bool,
    /// Columns of captions that are trained on.
    pub(super) columns: u64,
    /// FLOP of the text encoder on an average caption.
    pub(super) caption_flop: f64,
    pub(super) text_width: u64,
    /// Positions of a caption that are stored: all with fixed padding, the average caption's own without.
    pub(super) positions: f64,
    /// Bytes of a number of the features.
    pub(super) number: u64,
    /// FLOP of the VAE's encoder on an average picture.
    pub(super) vae_flop: f64,
    /// FLOP of a sample's step on an average picture: through the U-Net and back to its conditions, through the connector and back.
    pub(super) step_flop: f64,
    pub(super) steps: u64,
    pub(super) steps_per_epoch: u64,
    pub(super) global_batch: u64,
    pub(super) lanes: u64,
    pub(super) workers: u64,
    pub(super) window: u64,
    pub(super) features_cached: bool,
    /// What fetched files may take of a worker, and the key that says so; none for a data set that is here, which is mapped.
    pub(super) room: Option<(&'static str, u64)>,
}

/// What is assumed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Assumed {
    pub(super) gpu: String,
    /// TFLOP/s.
    pub(super) peak: f64,
    /// Share of the peak that is reached.
    pub(super) efficiency: f64,
    /// Of a GPU-hour and of a GB-month, in one currency.
    pub(super) gpu_hour: f64,
    pub(super) gb_month: f64,
    /// How long features are kept.
    pub(super) months: f64,
}

/// One figure, and how it was reckoned.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Figure {
    pub(super) name: &'static str,
    pub(super) value: f64,
    pub(super) unit: &'static str,
    pub(super) formula: String,
}

impl Figure {
    /// The value for people.
    pub(super) fn shown(&self) -> String {
        match self.unit {
            "bytes" => bytes(self.value as u64),
            "hours" if self.value < 1.0 => span(self.value * 3600.0),
            "hours" => format!("{:.1} h", self.value),
            "price" => format!("{:.2}", self.value),
            "" => format!("{:.0}", self.value),
            unit => format!("{:.3} {unit}", self.value),
        }
    }
}

/// Everything that can be told before anything is rented.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Costs {
    pub(super) figures: Vec<Figure>,
    /// "cache" or "recompute", and why.
    pub(super) cheaper: &'static str,
    pub(super) why: String,
}

/// Reckons.
pub(super) fn costs(facts: &Facts, assumed: &Assumed) -> Costs {
    let mut figures = Vec::new();
    let mut add = |name, value: f64, unit, formula: String| {
        figures.push(Figure { name, value, unit, formula });
        value
    };
    let samples = facts.samples as f64;
    let epochs = facts.steps as f64 / facts.steps_per_epoch.max(1) as f64;
    add(
        "steps per epoch",
        facts.steps_per_epoch as f64,
        "",
        format!("{} samples in global batches of {}", facts.samples, facts.global_batch),
    );
    add("epochs", epochs, "epochs", format!("{} steps / {} per epoch", facts.steps, facts.steps_per_epoch));

    let caption = facts.positions * facts.text_width as f64 * facts.number as f64;
    let Facts { text_width, number, .. } = facts;
    // As many digits as make the product true.
    let positions = format!("{:.2}", facts.positions);
    let positions = positions.trim_end_matches('0').trim_end_matches('.');
    let columns = facts.columns.max(1) as f64;
    add("features of a caption", caption, "bytes", format!("{positions} positions × {text_width} × {number} bytes"));
    let captions = samples * columns;
    let features = add("features of the data set", captions * caption, "bytes", format!("{captions:.0} captions × the above"));
    add("shards", facts.shard_bytes as f64, "bytes", format!("{} shards, as prepared", facts.shards));
    let stored = facts.shard_bytes as f64 + if facts.features_cached { features } else { 0.0 };
    let read =
        add("read in training", stored / columns * epochs, "bytes", format!("what is stored of one caption a sample × {epochs:.2} epochs"));
    let lanes_each = facts.lanes.div_ceil(facts.workers.max(1));
    let shard = stored / facts.shards.max(1) as f64;
    let cache = open_bytes(stored as u64, facts.shards as usize, lanes_each as usize, facts.window as usize);
    let fits = match facts.room {
        None => "; the data set is on this machine, where nothing is fetched".to_owned(),
        Some((key, room)) => {
            format!("; {key} = {}{}", bytes(room), if cache > room { ": TOO LITTLE, raise it or lower data.window" } else { "" })
        }
    };
    add(
        "cache of a worker",
        cache as f64,
        "bytes",
        format!("{lanes_each} lanes × (window {} + 1) shards × {}, at most all{fits}", facts.window, bytes(shard as u64)),
    );

    let rate = assumed.peak * assumed.efficiency * 1e12;
    let hours = |flop: f64| flop / rate / 3600.0;
    let at = format!("{:.0} TFLOP/s × {:.2} of {}", assumed.peak, assumed.efficiency, assumed.gpu);
    let Facts { caption_flop, vae_flop, step_flop, .. } = *facts;
    let embed = add(
        "embed",
        hours(captions * caption_flop),
        "hours",
        format!("{captions:.0} captions of {positions} positions × {:.3} GFLOP / ({at})", caption_flop / 1e9),
    );
    let vae = add(
        "latents",
        hours(samples * vae_flop),
        "hours",
        format!("{samples:.0} pictures of {:.0} pixels × {:.3} GFLOP / ({at})", facts.pixels, vae_flop / 1e9),
    );
    // An epoch's last step is smaller, and every one of a data set that has less than a global batch.
    let trained = epochs * samples;
    let mut all = if facts.features_cached { embed } else { hours(trained * caption_flop) };
    all += if facts.has_latents { vae } else { hours(trained * vae_flop) };
    let step = hours(trained * step_flop);
    add("training", step, "hours", format!("{trained:.0} samples × {:.3} GFLOP, there and back / ({at})", step_flop / 1e9));
    let total = add("GPU-hours in all", all + step, "hours", "training, features and latents, each made where this config makes it".into());
    add("price of the GPUs", total * assumed.gpu_hour, "price", format!("{total:.1} h × {}", assumed.gpu_hour));
    let gb = features / 1e9;
    let keep = gb * assumed.gb_month * assumed.months;
    let once = embed * assumed.gpu_hour;
    let cache = add(
        "caching features",
        once + keep,
        "price",
        format!("{embed:.1} h × {} + {gb:.1} GB × {} × {} months", assumed.gpu_hour, assumed.gb_month, assumed.months),
    );
    let again_hours = hours(trained * caption_flop);
    let again = add(
        "recomputing features",
        again_hours * assumed.gpu_hour,
        "price",
        format!("{trained:.0} captions in training, as for embed: {again_hours:.1} h × {}", assumed.gpu_hour),
    );
    let cheaper = if cache <= again { "cache" } else { "recompute" };
    let per_epoch = once / columns;
    let even = if per_epoch > 0.0 { (once + keep) / per_epoch } else { f64::INFINITY };
    let why = format!(
        "{cache:.2} against {again:.2}; even at {even:.1} epochs, and this run has {epochs:.2}. Reading {} from the store is not counted",
        bytes(read as u64)
    );
    Costs { figures, cheaper, why }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ella_model::connector::{ConnectorConfig, ConnectorKind};
    use ella_model::cost;
    use ella_model::presets::Preset;
    use ella_model::t5::T5Config;

    fn paper() -> Facts {
        let unet = cost::unet(&Preset::Sd15.unet().unwrap(), (64, 64), 64);
        let connector = cost::connector(&ConnectorConfig::new(ConnectorKind::Tsc, 768, 2048), 128);
        // ELLA's own run: 34 million pairs, Flan-T5-XL's encoder, 280,000 steps of 243.
        Facts {
            samples: 34_000_000,
            pixels: 512.0 * 512.0,
            shard_bytes: 34_000_000 * 65_536,
            shards: 17_000,
            has_latents: true,
            columns: 1,
            caption_flop: cost::total(&cost::t5(&T5Config::flan_t5_xl(), 128)).flops(),
            text_width: 2048,
            positions: 128.0,
            number: 2,
            vae_flop: cost::total(&cost::vae_encoder(&Preset::Sd15.vae().unwrap(), (512, 512))).flops(),
            step_flop: cost::total(&unet).flops() + cost::total(&connector).flops(),
            steps: 280_000,
            steps_per_epoch: 140_000,
            global_batch: 243,
            lanes: 9,
            workers: 8,
            window: 16,
            features_cached: true,
            room: Some(("data.cache_bytes", 50 << 30)),
        }
    }

    fn assumed() -> Assumed {
        Assumed { gpu: "h200".into(), peak: 989.0, efficiency: 0.35, gpu_hour: 3.0, gb_month: 0.023, months: 1.0 }
    }

    fn value(costs: &Costs, name: &str) -> f64 {
        costs.figures.iter().find(|figure| figure.name == name).unwrap().value
    }

    #[test]
    fn the_papers_run_has_the_sizes_that_are_known_of_it() {
        let costs = costs(&paper(), &assumed());
        assert_eq!(value(&costs, "features of a caption"), 524_288.0, "512 KiB at T5-XL");
        assert!((value(&costs, "features of the data set") / 17.8e12 - 1.0).abs() < 0.01, "17.8 TB");
        assert_eq!(value(&costs, "epochs"), 2.0);
        // 0.300 TFLOP a caption.
        assert!((value(&costs, "embed") - 34e6 * 0.2996 / (989.0 * 0.35) / 3600.0).abs() < 0.1);
        // About 1.7 TFLOP an image: 195 images a second at that efficiency.
        let rate = 280_000.0 * 243.0 / value(&costs, "training") / 3600.0;
        assert!((195.0..210.0).contains(&rate), "{rate}");
    }

    #[test]
    fn a_captions_formula_has_the_product_that_is_told() {
        for (positions, shown) in [(53.653, "53.65 positions"), (128.0, "128 positions"), (100.0, "100 positions")] {
            let costs = costs(&Facts { positions, ..paper() }, &assumed());
            let figure = costs.figures.iter().find(|figure| figure.name == "features of a caption").unwrap();
            assert!(figure.formula.starts_with(shown), "{}", figure.formula);
        }
    }

    /// Not the steps' global batches, which a small data set does not fill.
    #[test]
    fn an_epoch_trains_on_each_sample_once() {
        let few = costs(&Facts { samples: 100, steps: 10, steps_per_epoch: 1, ..paper() }, &assumed());
        for (name, count) in [("training", "1000 samples"), ("recomputing features", "1000 captions")] {
            let figure = few.figures.iter().find(|figure| figure.name == name).unwrap();
            assert!(figure.formula.starts_with(count), "{}", figure.formula);
        }
    }

    #[test]
    fn a_cache_that_is_too_small_is_told_with_its_key() {
        let cache = |facts: &Facts| costs(facts, &assumed()).figures.into_iter().find(|figure| figure.name == "cache of a worker").unwrap();
        let (enough, little) = (cache(&paper()), cache(&Facts { room: Some(("data.memory_bytes", 2 << 30)), ..paper() }));
        assert!((enough.value / (2.0 * 17.0 * 2000.0 * (65_536.0 + 524_288.0)) - 1.0).abs() < 1e-6, "{enough:?}");
        assert!(enough.formula.ends_with("data.cache_bytes = 50.0 GiB"), "{}", enough.formula);
        assert!(little.formula.contains("data.memory_bytes = 2.0 GiB: TOO LITTLE"), "{}", little.formula);
        assert!(cache(&Facts { room: None, ..paper() }).formula.contains("on this machine"));
    }

    #[test]
    fn caching_pays_once_there_are_epochs_enough() {
        let one = Facts { steps: 140_000, ..paper() };
        assert_eq!(costs(&one, &assumed()).cheaper, "recompute");
        let many = Facts { steps: 2_800_000, ..paper() };
        assert_eq!(costs(&many, &assumed()).cheaper, "cache");
        let free = Assumed { gb_month: 0.0, ..assumed() };
        assert_eq!(costs(&paper(), &free).cheaper, "cache");
    }
}
