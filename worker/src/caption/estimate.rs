//! What captioning will take: tokens, time and cost, before anything starts. Every number is shown with its formula.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::client::Probe;
use super::config::CaptionConfig;
use super::prompt::{fill, takes_caption};

/// Words of a dense caption, where none was made yet: the paper's Table 1.
const CAPTION_WORDS: u64 = 50;
/// Tokens of a price.
const MILLION: f64 = 1e6;

/// Tokens of a text: four for three words, as English has.
pub(super) fn text_tokens(text: &str) -> u64 {
    words_as_tokens(text.split_whitespace().count() as u64)
}

fn words_as_tokens(words: u64) -> u64 {
    (words * 4).div_ceil(3)
}

/// What is to be captioned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// Pictures without the caption that is wanted.
    pub pictures: u64,
    /// Words of the existing captions (mean), for prompts that show them.
    pub existing_words: u64,
    /// Processes that ask.
    pub workers: u64,
}

/// What captioning will take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// What is to be captioned.
    pub work: Work,
    /// Whether tokens are those of a request that was made, as the endpoint counts them; else they follow rules.
    pub measured: bool,
    /// Tokens in, per picture: the picture's.
    pub image_tokens: u64,
    /// Tokens in, per picture: the prompt's. Measured: 0, as the endpoint counts them in one.
    pub prompt_tokens: u64,
    /// Tokens out, per picture.
    pub caption_tokens: u64,
    /// The most tokens out, per picture.
    pub most_caption_tokens: u64,
    /// All tokens in.
    pub input_tokens: u64,
    /// All tokens out.
    pub output_tokens: u64,
    /// The most tokens out.
    pub most_output_tokens: u64,
    /// Bounds on the time; none where nothing was measured or limited.
    pub times: Vec<Bound>,
    /// The longest of them, in seconds.
    pub seconds: Option<f64>,
    /// The cost, in the prices' currency.
    pub cost: Option<Cost>,
}

/// A time that captioning takes at least, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bound {
    /// In seconds.
    pub seconds: f64,
    /// Its formula.
    pub formula: String,
}

/// What captioning costs, and at most.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Of a million tokens in.
    pub input_price: f64,
    /// Of a million tokens out.
    pub output_price: f64,
    /// As expected.
    pub expected: f64,
    /// If every answer has `max_tokens`.
    pub most: f64,
}

impl Estimate {
    /// What `work` will take, by what a probe showed, if one was made.
    pub fn new(config: &CaptionConfig, work: Work, probe: Option<&Probe>) -> Self {
        let usage = probe.map(Probe::usage).filter(|usage| usage.input_tokens > 0);
        let existing = if takes_caption(&config.prompt) { words_as_tokens(work.existing_words) } else { 0 };
        let text = text_tokens(config.system.as_deref().unwrap_or_default()) + text_tokens(&fill(&config.prompt, "")) + existing;
        let by_rule = (config.image_tokens, text, words_as_tokens(CAPTION_WORDS).min(config.max_tokens));
        let by_probe = usage.map(|usage| (usage.input_tokens, 0, usage.output_tokens));
        let (image_tokens, prompt_tokens, caption_tokens) = by_probe.unwrap_or(by_rule);
        let all = |each: u64| work.pictures.saturating_mul(each);
        let mut estimate = Self {
            work,
            measured: usage.is_some(),
            image_tokens,
            prompt_tokens,
            caption_tokens,
            most_caption_tokens: config.max_tokens.max(caption_tokens),
            input_tokens: all(image_tokens + prompt_tokens),
            output_tokens: all(caption_tokens),
            most_output_tokens: all(config.max_tokens.max(caption_tokens)),
            times: Vec::new(),
            seconds: None,
            cost: None,
        };
        estimate.times = estimate.bounds(config, probe);
        estimate.seconds = estimate.times.iter().map(|bound| bound.seconds).reduce(f64::max);
        estimate.cost = estimate.cost(config);
        estimate
    }

    fn bounds(&self, config: &CaptionConfig, probe: Option<&Probe>) -> Vec<Bound> {
        let Work { pictures, workers, .. } = self.work;
        let workers = workers.max(1);
        let tokens = self.input_tokens.saturating_add(self.output_tokens);
        let at_once = probe.map(|probe| {
            let each = probe.elapsed.as_secs_f64();
            let seconds = pictures as f64 * each / (config.concurrency as u64 * workers) as f64;
            let formula = format!("{} × {each:.2} s / ({} at once × {workers} workers)", grouped(pictures), config.concurrency);
            Bound { seconds, formula }
        });
        let limited = |amount: u64, limit: Option<u64>, what: &str| {
            let limit = limit?;
            let seconds = amount as f64 * 60.0 / (limit * workers) as f64;
            Some(Bound { seconds, formula: format!("{} / ({} {what} a minute × {workers} workers)", grouped(amount), grouped(limit)) })
        };
        let requests = limited(pictures, config.requests_per_minute, "requests");
        at_once.into_iter().chain(requests).chain(limited(tokens, config.tokens_per_minute, "tokens")).collect()
    }

    fn cost(&self, config: &CaptionConfig) -> Option<Cost> {
        let (input_price, output_price) = match (config.input_price, config.output_price) {
            (None, None) => return None,
            (input, output) => (input.unwrap_or(0.0), output.unwrap_or(0.0)),
        };
        let with = |output: u64| (self.input_tokens as f64 * input_price + output as f64 * output_price) / MILLION;
        Some(Cost { input_price, output_price, expected: with(self.output_tokens), most: with(self.most_output_tokens) })
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pictures = grouped(self.work.pictures);
        writeln!(f, "pictures    {pictures}")?;
        let each = if self.measured {
            format!("{} as measured", self.image_tokens)
        } else {
            format!("({} of the picture + {} of the prompt, 4 for 3 words)", self.image_tokens, self.prompt_tokens)
        };
        writeln!(f, "tokens in   {pictures} × {each} = {}", grouped(self.input_tokens))?;
        let by = if self.measured { "as measured".to_owned() } else { format!("of {CAPTION_WORDS} words") };
        let (each, most, total) = (self.caption_tokens, self.most_caption_tokens, grouped(self.most_output_tokens));
        writeln!(f, "tokens out  {pictures} × {each} {by} = {}; at most × {most} = {total}", grouped(self.output_tokens))?;
        for Bound { seconds, formula } in &self.times {
            writeln!(f, "time        {formula} = {} at least", clock(*seconds))?;
        }
        if self.times.is_empty() {
            writeln!(f, "time        not known: no request was made, and no limit is set")?;
        }
        if let Some(Cost { input_price, output_price, expected, most }) = self.cost {
            let formula = format!("in × {input_price} / 10⁶ + out × {output_price} / 10⁶");
            writeln!(f, "cost        {formula} = {expected:.2}; at most {most:.2}")?;
        }
        Ok(())
    }
}

/// A number with commas between thousands.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let comma = |at: usize| at > 0 && (digits.len() - at).is_multiple_of(3);
    digits.chars().enumerate().flat_map(|(at, digit)| comma(at).then_some(',').into_iter().chain([digit])).collect()
}

/// Seconds in the unit that suits them.
fn clock(seconds: f64) -> String {
    match seconds {
        short if short < 120.0 => format!("{short:.1} s"),
        some if some < 7200.0 => format!("{:.1} min", some / 60.0),
        long if long < 172_800.0 => format!("{:.1} h", long / 3600.0),
        _ => format!("{:.1} days", seconds / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::caption::{Captioned, Usage};
    use std::time::Duration;

    const WORK: Work = Work { pictures: 1_200_000, existing_words: 9, workers: 4 };

    fn config() -> CaptionConfig {
        let prompt = "Say what is here, and mind that somebody called it {caption}".to_owned();
        CaptionConfig { prompt, input_price: Some(0.5), output_price: Some(2.0), ..CaptionConfig::default() }
    }

    #[test]
    fn by_rule_and_without_a_limit_the_time_is_not_known() {
        let estimate = Estimate::new(&config(), WORK, None);
        // 10 words of its own are 14 tokens, 9 of the caption are 12.
        assert_eq!((estimate.image_tokens, estimate.prompt_tokens, estimate.caption_tokens), (324, 26, 67));
        assert_eq!(estimate.input_tokens, 1_200_000 * 350);
        assert_eq!(estimate.seconds, None);
        let expected = "pictures    1,200,000\n\
            tokens in   1,200,000 × (324 of the picture + 26 of the prompt, 4 for 3 words) = 420,000,000\n\
            tokens out  1,200,000 × 67 of 50 words = 80,400,000; at most × 300 = 360,000,000\n\
            time        not known: no request was made, and no limit is set\n\
            cost        in × 0.5 / 10⁶ + out × 2 / 10⁶ = 370.80; at most 930.00\n";
        assert_eq!(estimate.to_string(), expected);
        assert_eq!(serde_json::from_str::<Estimate>(&serde_json::to_string(&estimate).unwrap()).unwrap(), estimate);
    }

    #[test]
    fn a_probe_and_limits_tell_the_time() {
        let usage = Usage { input_tokens: 400, output_tokens: 100 };
        let outcome = Ok(Captioned { caption: "x".to_owned(), trimmed: false, usage });
        let probe = Probe { outcome, elapsed: Duration::from_millis(1600) };
        let limited = CaptionConfig { requests_per_minute: Some(1000), tokens_per_minute: Some(2_000_000), ..config() };
        let estimate = Estimate::new(&limited, WORK, Some(&probe));
        assert_eq!(estimate.times.iter().map(|bound| bound.seconds).collect::<Vec<_>>(), [60_000.0, 18_000.0, 4_500.0]);
        assert_eq!(estimate.seconds, Some(60_000.0));
        let text = estimate.to_string();
        for line in [
            "tokens in   1,200,000 × 400 as measured = 480,000,000",
            "time        1,200,000 × 1.60 s / (8 at once × 4 workers) = 16.7 h at least",
            "time        1,200,000 / (1,000 requests a minute × 4 workers) = 5.0 h at least",
            "time        600,000,000 / (2,000,000 tokens a minute × 4 workers) = 75.0 min at least",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([1.0, 120.0, 7200.0, 172_800.0].map(clock), ["1.0 s", "2.0 min", "2.0 h", "2.0 days"]);
    }
}
