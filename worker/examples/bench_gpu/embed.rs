//! The text encoder by itself: `ella embed` without tokenizer and disk.

use crate::timing;
use crate::{Setting, TOKENS, gpu, networks, train};
use anyhow::Result;
use ella_model::cost;
use ella_model::text::Layers;
use serde_json::{Value, json};

pub(crate) fn run(setting: &Setting) -> Result<Value> {
    let peak = train::peak(setting)?;
    let (text, (ids, mask)) = (networks::text(setting)?, networks::captions(setting)?);
    let encode = || {
        let _ = tch::no_grad(|| text.features(&ids, &mask, Layers::Last))?;
        Ok(())
    };
    let timed = timing::time(setting.device, setting.measure, encode)?;
    let captions = setting.micro_batch as f64 / timed.median();
    let flops = cost::total(&cost::t5(&setting.text()?, TOKENS)).flops();
    Ok(json!({
        "captions": setting.micro_batch, "tokens": TOKENS, "captions_per_second": captions, "tokens_per_second": captions * TOKENS as f64,
        "windows": timed.windows.len(), "spread": timed.spread(), "tflop_per_caption": flops / 1e12, "tflops": captions * flops / 1e12,
        "peak_tflops": peak / 1e12, "share_of_peak": captions * flops / peak, "memory": gpu::memory(setting.device),
    }))
}
