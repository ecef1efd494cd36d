//! What is asked of which endpoint: a TOML table.

use ella_proto::config::{ConfigError, Millis, read};
use reqwest::Url;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::prompt::DEFAULT_PROMPT;

/// The variable that holds the key, unless the config names another.
const KEY_ENV: &str = "OPENAI_API_KEY";
/// Tokens of a 512×512 picture where each is a patch of 28×28 pixels, as in Qwen2-VL and Qwen2.5-VL: (512 / 28, rounded)².
const IMAGE_TOKENS: u64 = 324;
/// The most retries: with pauses that double, more would take hours.
const MOST_RETRIES: u64 = 20;
/// The most pictures asked for at once.
const MOST_CONCURRENT: u64 = 4096;

/// Keys that determine no caption.
const FREE: [&str; 10] = [
    "endpoint",
    "concurrency",
    "requests_per_minute",
    "tokens_per_minute",
    "timeout",
    "retries",
    "api_key_env",
    "image_tokens",
    "input_price",
    "output_price",
];

/// How a model declines. Found in a caption's first sentence, whatever the case and the apostrophe.
const REFUSALS: [&str; 14] = [
    "i'm sorry",
    "i am sorry",
    "i apologize",
    "i cannot",
    "i can't",
    "i can not",
    "i'm unable",
    "i am unable",
    "i'm not able",
    "i am not able",
    "i won't",
    "as an ai",
    "as a language model",
    "unable to assist",
];

/// What becomes of a caption that was cut off at `max_tokens`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cut {
    /// It is refused.
    #[default]
    Refuse,
    /// Its whole sentences are kept; without one it is refused.
    Trim,
}

/// How closely the model looks at the picture, where the endpoint lets one choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageDetail {
    /// At a small size, for few tokens.
    Low,
    /// At its full size.
    High,
    /// As the endpoint likes.
    Auto,
}

/// What is asked of which endpoint. Without `endpoint` and `model` it asks nothing; all else has a default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CaptionConfig {
    /// The base URL, such as `http://host:8000/v1`: captions come from `chat/completions` below it.
    pub endpoint: String,
    /// The model, as the endpoint names it.
    pub model: String,
    /// What is asked, beside the picture; `{caption}` becomes the sample's existing caption.
    pub prompt: String,
    /// The system's message; left out: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// The most tokens of an answer.
    pub max_tokens: u64,
    /// 0: the likeliest word each time.
    pub temperature: f64,
    /// Seeds the sampling, where the endpoint takes a seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// How closely the model looks; left out: not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_detail: Option<ImageDetail>,
    /// Pictures asked for at once, by each worker.
    pub concurrency: usize,
    /// The most requests a minute, of each worker; left out: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u64>,
    /// The most tokens a minute, in and out, of each worker; left out: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_minute: Option<u64>,
    /// How long an attempt may take, to the answer's last byte.
    pub timeout: Millis,
    /// How often a request that failed in passing is made again.
    pub retries: u64,
    /// The environment variable that holds the endpoint's key. Left out: `OPENAI_API_KEY`, if it is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key_env: Option<String>,
    /// What a model says that declines: found in a caption's first sentence, whatever the case, it is no caption.
    pub refusals: Vec<String>,
    /// Captions of fewer words are refused.
    pub min_words: usize,
    /// Captions of more words are refused.
    pub max_words: usize,
    /// What becomes of a caption that was cut off at `max_tokens`.
    pub cut: Cut,
    /// Tokens of a picture, for limits and estimates: of 512×512 pixels in patches of 28×28, unless said otherwise.
    pub image_tokens: u64,
    /// The price of a million tokens in, in any currency.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_price: Option<f64>,
    /// The price of a million tokens out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_price: Option<f64>,
    /// More fields of the request, such as `top_p`. `max_completion_tokens`, which some models insist on, takes the place of `max_tokens`.
    pub extra: Map<String, Value>,
}

impl Default for CaptionConfig {
    fn default() -> Self {
        Self {
            endpoint: String::new(),
            model: String::new(),
            prompt: DEFAULT_PROMPT.to_owned(),
            system: None,
            max_tokens: 300,
            temperature: 0.0,
            seed: None,
            image_detail: None,
            concurrency: 8,
            requests_per_minute: None,
            tokens_per_minute: None,
            timeout: Millis(120_000),
            retries: 6,
            api_key_env: None,
            refusals: REFUSALS.map(str::to_owned).to_vec(),
            min_words: 5,
            max_words: 250,
            cut: Cut::Refuse,
            image_tokens: IMAGE_TOKENS,
            input_price: None,
            output_price: None,
            extra: Map::new(),
        }
    }
}

impl CaptionConfig {
    /// Reads a TOML table, with overrides of the form `key=value`. `origin` names it in errors.
    ///
    /// # Errors
    /// No TOML, an unknown key (with the nearest known one), or a value outside its rule.
    pub fn parse(text: &str, origin: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        let (config, origin) = read(text, origin, overrides, &full())?;
        Self::check(&config, &origin)?;
        Ok(config)
    }

    /// Refuses the first value outside its rule.
    pub fn check(&self, origin: &str) -> Result<(), ConfigError> {
        let value = |key, found: String, rule: &str| ConfigError::Value { origin: origin.to_owned(), key, rule: rule.to_owned(), found };
        let holds = |good: bool, key, found: String, rule: &str| if good { Ok(()) } else { Err(value(key, found, rule)) };
        // The URL itself is not shown: what it holds besides may be a secret.
        let url = "it must be a base URL such as http://host:8000/v1, without user, password, query or fragment";
        let found = if self.endpoint.is_empty() { "left out" } else { "no such URL" };
        holds(plain(&self.endpoint), "endpoint", found.to_owned(), url)?;
        let said = |text: &str| !text.trim().is_empty();
        holds(said(&self.model), "model", "empty".to_owned(), "it must be the model's name at the endpoint")?;
        holds(said(&self.prompt), "prompt", "empty".to_owned(), "it must say what is asked")?;
        let named = |name: &String| said(name) && !name.contains(['=', '\0']);
        holds(
            self.api_key_env.as_ref().is_none_or(named),
            "api_key_env",
            "no such name".to_owned(),
            "it must name an environment variable",
        )?;
        holds(self.refusals.iter().all(|text| said(text)), "refusals", "an empty text".to_owned(), "that is found in every caption")?;
        for (key, found, most) in self.sizes() {
            holds((1..=most).contains(&found), key, found.to_string(), &format!("it must lie from 1 to {most}"))?;
        }
        holds(self.retries <= MOST_RETRIES, "retries", self.retries.to_string(), &format!("it must be {MOST_RETRIES} at most"))?;
        holds(self.min_words <= self.max_words, "min_words", self.min_words.to_string(), "it must be max_words at most")?;
        for (key, found) in
            [("temperature", Some(self.temperature)), ("input_price", self.input_price), ("output_price", self.output_price)]
        {
            let found = found.unwrap_or(0.0);
            holds(found >= 0.0 && found.is_finite(), key, found.to_string(), "it must be a number of 0 or more")?;
        }
        let ours = ["model", "messages", "stream", "n"].into_iter().find(|key| self.extra.contains_key(*key));
        holds(ours.is_none(), "extra", format!("with `{}`", ours.unwrap_or_default()), "that is the request's own")
    }

    fn sizes(&self) -> [(&'static str, u64, u64); 8] {
        let any = u64::from(u32::MAX);
        [
            ("max_tokens", self.max_tokens, any),
            ("concurrency", self.concurrency as u64, MOST_CONCURRENT),
            ("requests_per_minute", self.requests_per_minute.unwrap_or(1), any),
            ("tokens_per_minute", self.tokens_per_minute.unwrap_or(1), any),
            ("timeout", self.timeout.0, 24 * 3_600_000),
            ("max_words", self.max_words as u64, any),
            ("image_tokens", self.image_tokens, any),
            // TOML's integers are signed.
            ("seed", self.seed.unwrap_or(0).saturating_add(1), i64::MAX as u64),
        ]
    }

    /// The environment variable that holds the key.
    pub fn key_env(&self) -> &str {
        self.api_key_env.as_deref().unwrap_or(KEY_ENV)
    }

    /// What determines captions: model and prompt, and how answers are made and judged; not the endpoint, its limits and prices.
    pub fn binding(&self) -> Map<String, Value> {
        let mut all = match serde_json::to_value(self) {
            Ok(Value::Object(all)) => all,
            _ => Map::new(),
        };
        FREE.iter().for_each(|key| drop(all.remove(*key)));
        all
    }
}

/// A config in which all optional keys are set.
pub(super) fn full() -> CaptionConfig {
    CaptionConfig {
        system: Some(String::new()),
        seed: Some(0),
        image_detail: Some(ImageDetail::Auto),
        requests_per_minute: Some(1),
        tokens_per_minute: Some(1),
        api_key_env: Some(String::new()),
        input_price: Some(0.0),
        output_price: Some(0.0),
        ..CaptionConfig::default()
    }
}

/// Whether an endpoint is a base URL and no more.
fn plain(endpoint: &str) -> bool {
    Url::parse(endpoint).is_ok_and(|url| {
        let web = matches!(url.scheme(), "http" | "https") && url.has_host();
        web && url.username().is_empty() && url.password().is_none() && url.query().is_none() && url.fragment().is_none()
    })
}
